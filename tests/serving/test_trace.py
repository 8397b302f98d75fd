"""One timeline across both sites: clocks that differ, what is told of the other site, and a file that the viewer understands."""

import itertools
import json
import pathlib
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_fixtures import decode_server, generate, prefill_engine, prefill_server, prompt_of, request, serving

from prfaas_jax.errors import TransferError
from prfaas_jax.serving import remote_prefill
from prfaas_jax.serving.clock import ClockOffset, clock_offset
from prfaas_jax.serving.launcher import module_command
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.prefill_site import MAX_SPANS, PrefillSite
from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.serving.trace import Traced, write_requests
from prfaas_jax.testing.relay import Relay

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIFT_S = 5000.0
# Spans are told in doubles of seconds that count from a machine's start.
ROUNDING_S = 1e-6
SECONDS = st.floats(0, 10)


class Shifted(PrefillServer):
    """On a machine that was started at another time."""

    def _accepted(self, *args):
        accepted = super()._accepted(*args)
        for field in ("received_s", "submitted_s", "sent_s"):
            setattr(accepted, field, getattr(accepted, field) + SHIFT_S)
        return accepted


@pytest.fixture
def offsets(monkeypatch) -> list[ClockOffset]:
    """What decode servers find out about clocks."""
    found: list[ClockOffset] = []

    def spy(*times):
        found.append(clock_offset(*times))
        return found[-1]

    monkeypatch.setattr(remote_prefill, "clock_offset", spy)
    return found


def check_spans(usage: generation_pb2.Usage) -> None:
    """What the prefill site did lies within the request, as far as its clock is known, and adds up."""
    end, error = usage.ttft_s - usage.parts.route + sum(usage.itl_s), usage.clock_error_s + ROUNDING_S
    theirs = [span for span in usage.spans if span.site == "prefill"]
    assert theirs and all(-error <= span.start_s <= span.end_s <= end + error for span in theirs)
    for before, after in itertools.pairwise(theirs):
        assert before.end_s == pytest.approx(after.start_s, abs=ROUNDING_S)
    assert sum(span.end_s - span.start_s for span in theirs[1:]) == pytest.approx(usage.parts.prefill, abs=1e-3)
    ours = {span.name: span for span in usage.spans if span.site == ""}
    sent = [span for span in usage.spans if span.site == "link"]
    assert sent and all(-error <= span.start_s <= span.end_s <= ours["admit"].start_s + ROUNDING_S for span in sent)
    assert min(span.end_s for span in sent) >= ours["transfer"].start_s - ROUNDING_S


# --- clocks --------------------------------------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), SECONDS, SECONDS, SECONDS, SECONDS)
def test_the_offset_is_never_further_off_than_it_says(offset, sent, up, held, down):
    received = sent + up + offset
    found = clock_offset(sent, received, received + held, sent + up + held + down)
    assert abs(found.offset_s - offset) <= found.error_s + 1e-8
    assert found.error_s == pytest.approx((up + down) / 2, abs=1e-8)
    assert abs(found.here(received) - (sent + up)) <= found.error_s + 1e-8


def test_equal_ways_give_the_offset_itself():
    found = clock_offset(10.0, 510.25, 510.5, 10.75)
    assert (found.offset_s, found.error_s, found.here(510.5)) == (500.0, 0.25, 10.5)


@pytest.mark.parametrize("times", [(10.0, 500.0, 499.0, 11.0), (10.0, 500.0, 502.0, 11.0)])
def test_times_that_cannot_be_are_refused(times):
    with pytest.raises(TransferError, match="held"):
        clock_offset(*times)


def test_another_machines_clock_changes_no_timeline(offsets):
    engine = prefill_engine(tokens_per_s=4000)
    with serving(lambda: Shifted(engine, PrefillServerOptions())) as prefill, decode_server() as decode:
        usage = generate(decode.address, request(prompt_of(300), 4, prefill.address)).usage
    engine.close()
    assert abs(offsets[0].offset_s - SHIFT_S) <= offsets[0].error_s == usage.clock_error_s
    check_spans(usage)
    names = [span.name for span in usage.spans if span.site == "prefill"]
    assert names == ["queue", "prefill 0-64", "prefill 64-128", "prefill 128-192", "prefill 192-256", "prefill 256-300"]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_way_that_is_longer_than_the_other_is_within_the_error(offsets, direction):
    with prefill_server(prefill_engine(tokens_per_s=4000)) as prefill, decode_server() as decode, Relay(prefill.address) as relay:
        relay.set_link(rtt_ms=200, direction=direction)
        usage = generate(decode.address, request(prompt_of(200), 4, relay.address)).usage
    (found,) = offsets
    assert abs(found.offset_s) <= found.error_s == usage.clock_error_s
    assert found.error_s >= 0.045  # half of 100 ms, and the relay's clock ticks in milliseconds
    check_spans(usage)


def test_a_long_prompts_account_is_short_and_whole():
    site = PrefillSite()
    site.accepted(ClockOffset(1000.0, 0.01), 1005.0)
    for i in range(1, 1001):
        site.progressed(64 * i, 0.5 + 0.1 * i)
        site.handed_out(64 * i, 0.5 + 0.1 * i + 0.01)
        site.handed_out(64 * i, 0.5 + 0.1 * i)
        site.arrived(64 * i, 5.0 + 0.5 + 0.1 * i + 0.3)
    spans = site.spans(4.0, 64_000, 0.5, 100.0)
    assert len(spans) <= MAX_SPANS
    chunks, sent = ([s for s in spans if s.name.startswith(kind)] for kind in ("prefill", "transfer"))
    assert (chunks[0].start_s, chunks[-1].end_s) == pytest.approx((1.5, 101.5))
    assert (sent[0].start_s, sent[-1].end_s) == pytest.approx((1.6, 101.8))
    for bars in (chunks, sent):
        ranges = [tuple(map(int, s.name.split()[1].split("-"))) for s in bars]
        assert ranges[0][0] == 0 and ranges[-1][1] == 64_000
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


def test_a_bar_over_the_link_never_ends_before_it_starts():
    site = PrefillSite()
    site.accepted(ClockOffset(0.0, 0.5), 10.0)  # half a second behind, perhaps
    site.handed_out(64, 1.0)
    site.arrived(64, 10.9)
    (bar,) = [span for span in site.spans(10.0, 64, 0.0, 1.0) if span.site == "link"]
    assert bar.start_s == bar.end_s == pytest.approx(0.9)


# --- the file ------------------------------------------------------------------------------------------------------------------------


def read_trace(path: pathlib.Path) -> tuple[list[dict], list[dict], dict[int, str]]:
    """Slices, flow events and names of processes, after a look at what the format asks for."""
    events = json.loads(path.read_text())["traceEvents"]
    slices, flows = [e for e in events if e["ph"] == "X"], [e for e in events if e["ph"] in "stf"]
    assert all(e["dur"] >= 0 and isinstance(e["pid"], int) and isinstance(e["tid"], int) for e in slices)
    for row in {(e["pid"], e["tid"]) for e in slices}:
        ends: list[float] = []
        for e in sorted((e for e in slices if (e["pid"], e["tid"]) == row), key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= e["ts"] + 1e-3:
                ends.pop()
            assert not ends or e["ts"] + e["dur"] <= ends[-1] + 1e-3, "slices of a row nest"
            ends.append(e["ts"] + e["dur"])
    for number in {e["id"] for e in flows}:
        arrow = [e for e in flows if e["id"] == number]
        assert [e["ph"] for e in arrow] == ["s", *["t"] * (len(arrow) - 2), "f"] and arrow[-1]["bp"] == "e"
        assert [e["ts"] for e in arrow] == sorted(e["ts"] for e in arrow)
        for e in arrow:
            around = [s for s in slices if (s["pid"], s["tid"]) == (e["pid"], e["tid"]) and s["ts"] <= e["ts"] <= s["ts"] + s["dur"]]
            assert around, "an arrow begins and ends at a slice"
    return slices, flows, {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}


def test_a_trace_shows_every_site_of_every_request(tmp_path):
    with prefill_server(prefill_engine(tokens_per_s=4000)) as prefill, decode_server() as decode:
        routed = request(prompt_of(300), 4, prefill.address)
        routed.placement.route_s = 0.25
        usages = [generate(decode.address, message).usage for message in (routed, request(prompt_of(40), 2))]
        sites = {"router", f"prefill {prefill.address}", f"link {prefill.address} -> {decode.address}", f"decode {decode.address}"}
    write_requests(tmp_path / "trace.json", [Traced("first", usages[0], 100.0), Traced("second", usages[1], 103.0)])
    slices, flows, processes = read_trace(tmp_path / "trace.json")
    assert set(processes.values()) == sites and len(processes) == 4
    (route,) = [s for s in slices if s["name"] == "route"]
    assert (route["ts"], route["dur"]) == (0.0, 250_000.0)
    # The first request passes all four sites, the second one only one, for which there is no arrow.
    assert [(e["id"], processes[e["pid"]].split()[0]) for e in flows] == [(0, name) for name in ("router", "prefill", "link", "decode")]
    (whole,) = [s for s in slices if s["name"] == "first" and processes[s["pid"]].startswith("decode")]
    assert whole["ts"] == 250_000.0
    assert whole["dur"] == pytest.approx(1e6 * (usages[0].ttft_s - 0.25 + sum(usages[0].itl_s)), abs=1)
    error = 1e6 * usages[0].clock_error_s + 1
    for s in slices:
        if processes[s["pid"]].startswith("prefill"):
            assert s["args"]["clock_error_us"] == pytest.approx(1e6 * usages[0].clock_error_s)
            assert whole["ts"] - error <= s["ts"] and s["ts"] + s["dur"] <= whole["ts"] + whole["dur"] + error
    (second,) = [s for s in slices if s["name"] == "second"]
    assert second["ts"] == 3e6


def test_bars_that_overlap_get_rows_of_their_own(tmp_path):
    at = [(0.0, 2.0), (1.0, 3.0), (1.5, 3.5), (2.0, 4.0)]
    spans = [generation_pb2.Span(name=f"transfer {i}-{i + 1}", start_s=a, end_s=b, site="link") for i, (a, b) in enumerate(at)]
    usage = generation_pb2.Usage(placement="remote", prefill_address="a:1", decode_address="b:1", spans=spans)
    write_requests(tmp_path / "trace.json", [Traced("x", usage)])
    slices, flows, _ = read_trace(tmp_path / "trace.json")
    rows = {s["name"]: s["tid"] for s in slices}
    assert rows["transfer 0-1"] == rows["transfer 3-4"] == rows["x"] and len(set(rows.values())) == 3
    assert not flows


def test_the_client_leaves_a_trace(tmp_path):
    prompt, trace = tmp_path / "ids.json", tmp_path / "trace.json"
    prompt.write_text(json.dumps([prompt_of(100)]))
    with prefill_server() as prefill, decode_server() as decode:
        flags = {"address": decode.address, "prompt_tokens": prompt, "max_new_tokens": 3, "prefill": prefill.address, "trace": trace}
        command = module_command("experiments.client", flags)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        slices, flows, _ = read_trace(trace)
        assert {"prefill 0-64", "prefill 64-100", "queue", "tokens"} <= {s["name"] for s in slices} and len(flows) == 3
        bad = subprocess.run(
            module_command("experiments.client", {**flags, "trace": tmp_path / "none" / "x.json"}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert bad.returncode == 2 and "trace=" in bad.stderr

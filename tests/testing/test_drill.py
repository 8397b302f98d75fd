"""The pure parts of the fault drill: what is broken, what a request came to, what is wrong with it, what the report says."""

import contextlib
import time
import types

import grpc
import pytest
from ml_collections import ConfigDict

from configs.clusters import load_deployment
from configs.clusters.fault_drill_cpu import get_config
from configs.clusters.two_sites_cpu import get_config as two_sites
from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.client import Answer
from prfaas_jax.serving.proto import common_pb2, generation_pb2, prefill_pb2
from prfaas_jax.testing.drill_faults import LINK_FAULTS, PHASES, ROLE_FAULTS, Fault, Injector, all_faults, chosen
from prfaas_jax.testing.drill_load import Asked, Prompt, Reference, judge, make_prompts
from prfaas_jax.testing.drill_report import FaultReport, outcomes, summary, table, worst_extra
from prfaas_jax.testing.drill_watch import leftovers
from prfaas_jax.testing.relay import Relay

PROMPT = Prompt(0, (1, 2, 3), 4)
REFERENCE = Reference((7, 8, 9, 7), 0.5, 1.0)


class Refused(grpc.RpcError):
    def __init__(self, code, metadata=()):
        self._code, self._metadata = code, metadata

    def code(self):
        return self._code

    def trailing_metadata(self):
        return self._metadata


def kv_bytes(tokens: int) -> int:
    return 10 * tokens


def usage(**fields) -> generation_pb2.Usage:
    account = {"placement": "remote", "prompt_tokens": 3, "output_tokens": 4, "attempts": 1}
    account |= {"kv_bytes_expected": 30, "kv_bytes_moved": 30, "kv_bytes_wire": 30, "codec": "none"}
    return generation_pb2.Usage(**account | fields)


def asked(tokens=REFERENCE.tokens, account=None, **fields) -> Asked:
    answer = Answer(list(tokens), usage=account, first_s=10.8, last_s=11.5, returns=fields.pop("returns", 0))
    return Asked(PROMPT, "load", 10.0, 30.0, answer, ended_s=11.6, **fields)


FAILED = {phase: [generation_pb2.Failure(address="h:1", phase=phase, code="UNAVAILABLE")] for phase in ("handshake", "transfer")}


def test_every_role_and_link_meets_every_fault_in_every_phase():
    faults = all_faults(load_deployment(get_config()))
    assert len({fault.name for fault in faults}) == len(faults)
    for role in ("(alpha|beta)/0", "home/prefill/0", "home/decode/[01]"):
        found = {(fault.kind, fault.phase) for fault in chosen(faults, f" {role} ")}
        assert found == {(kind, phase) for kind in ROLE_FAULTS for phase in PHASES}
    found = [(fault.kind, fault.phase) for fault in chosen(faults, "->home")]
    assert sorted(found) == sorted((kind, phase) for kind in LINK_FAULTS for phase in PHASES)
    assert {fault.target for fault in faults if fault.breaks == "link"} == {"alpha->home", "beta->home"}
    assert {fault.target for fault in faults if "decode" in fault.target} == {"home/decode/0", "home/decode/1"}
    assert [fault.name for fault in chosen(faults, "^kill router")] == ["kill router during"]


@pytest.mark.parametrize("kind", LINK_FAULTS)
def test_a_link_is_broken_and_is_as_before_when_it_is_healed(tmp_path, kind):
    fault = Fault(kind, "alpha->home", "during")
    with contextlib.ExitStack() as stack:
        lane, control = (stack.enter_context(Relay("127.0.0.1:9", gbps=0.03)) for _ in range(2))
        process = types.SimpleNamespace(ready={"lane_addresses": ["127.0.0.1:10"], "address": "127.0.0.1:11"})
        live = types.SimpleNamespace(
            lanes={fault.target: lane},
            controls={fault.target: control},
            deployment=load_deployment(get_config()),
            processes={"alpha/0": process},
        )
        injector = Injector(live, tmp_path)
        before = lane.status()
        assert 0 < injector.inject(fault) <= 10
        during = lane.status()["down"]
        assert during["stalled"] == kind.startswith("black hole")
        assert during["gbps"] == pytest.approx(0.003 if kind == "slow 10x" else 0.03)
        injector.heal(fault)
        assert lane.status() == control.status() == before
        injector.close()


@pytest.mark.parametrize("pattern", ["(", "earthquake"])
def test_a_pattern_that_is_no_use_is_refused(pattern):
    with pytest.raises(InvalidInput, match="only="):
        chosen((Fault("kill", "alpha/0", "before"),), pattern)


def test_a_deployment_where_nobody_can_take_over_is_refused():
    with pytest.raises(InvalidInput, match="two decode servers and two prefill clusters"):
        all_faults(load_deployment(two_sites()))
    config = ConfigDict(get_config())
    config.clusters.home.prefill = 0
    with pytest.raises(InvalidInput, match="near prefill"):
        all_faults(load_deployment(config))


def test_prompts_are_alternately_long_and_short_and_a_seeds_own():
    prompts = make_prompts(6, 512, (64, 480), (576, 1200), 8, seed=3)
    assert [p.number for p in prompts] == list(range(6))
    assert all(64 <= len(p.ids) <= 480 for p in prompts[1::2]) and all(576 <= len(p.ids) <= 1200 for p in prompts[::2])
    assert all(0 < token < 512 for p in prompts for token in p.ids)
    assert prompts == make_prompts(6, 512, (64, 480), (576, 1200), 8, seed=3) != make_prompts(6, 512, (64, 480), (576, 1200), 8, seed=4)
    request = prompts[0].request()
    assert request.allow_fallback and request.ignore_eos and request.max_new_tokens == 8 and request.sampling.temperature == 0


@pytest.mark.parametrize(
    ("one", "outcome"),
    [
        (asked(account=usage()), "as planned"),
        (asked(account=usage(), returns=1), "came back"),
        (asked(account=usage(attempts=2), returns=1), "restarted"),
        (asked(account=usage(failures=FAILED["handshake"], resumes=1)), "retried elsewhere"),
        (asked(account=usage(failures=FAILED["transfer"], resumes=1)), "resumed"),
        (asked(account=usage(placement="local", failures=FAILED["transfer"], fallbacks=1)), "local"),
        (asked(error=Refused(grpc.StatusCode.DEADLINE_EXCEEDED)), "DEADLINE_EXCEEDED"),
        (asked(hung=True), "hung"),
        (asked(), "cancelled"),
    ],
)
def test_what_became_of_a_request(one, outcome):
    assert one.outcome() == outcome
    assert outcomes([one, one]) == {outcome: 2}


@pytest.mark.parametrize(
    ("one", "wrong"),
    [
        (asked(account=usage()), []),
        (asked((7, 8), error=Refused(grpc.StatusCode.DEADLINE_EXCEEDED)), []),
        (asked((7, 9, 9, 7), account=usage()), ["wrong tokens from 1 on, of 4"]),
        (asked((7, 8, 9), account=usage(output_tokens=3)), ["wrong tokens from 3 on, of 3"]),
        (asked((7, 7), error=Refused(grpc.StatusCode.DEADLINE_EXCEEDED)), ["wrong tokens from 1 on, of 2"]),
        (asked((7, 8, 9, 7, 7), error=Refused(grpc.StatusCode.UNAVAILABLE)), ["wrong tokens from 4 on, of 5"]),
        (asked((7, 8)), ["ended without an answer or an error"]),
        (asked((), hung=True), ["hung, 3 s after its deadline"]),
        (asked(account=usage(kv_bytes_moved=20, kv_bytes_skipped=10, kv_bytes_wire=20)), []),
        (asked(account=usage(kv_bytes_resent=5, kv_bytes_wire=35)), []),
        (asked(account=usage(kv_bytes_resent=5, kv_bytes_wire=36)), ["30 bytes moved and 5 again, but 36 crossed the link"]),
        (asked(account=usage(kv_bytes_wire=12, codec="paged=int8")), []),
        (
            asked(account=usage(kv_bytes_moved=20, kv_bytes_wire=20)),
            ["30 bytes of KV were due, 30 are said to be, 20 were moved or skipped"],
        ),
        (asked(account=usage(kv_bytes_expected=20)), ["30 bytes of KV were due, 20 are said to be, 30 were moved or skipped"]),
        (asked(account=usage(placement="local")), ["0 bytes of KV were due, 30 are said to be, 30 were moved or skipped"]),
        (asked(account=usage(kv_bytes_wire=29)), ["30 bytes moved and 0 again, but 29 crossed the link"]),
        (asked(account=usage(tokens_recomputed=3)), ["3 tokens recomputed without any failure"]),
        (asked(account=usage(tokens_recomputed=3, failures=FAILED["transfer"])), []),
        (asked(account=usage(prompt_tokens=2)), ["2 + 4 tokens in the account, 3 + 4 in fact"]),
    ],
)
def test_what_is_wrong_with_a_request(one, wrong):
    assert judge(one, REFERENCE, kv_bytes) == wrong


def test_retry_after_is_read_from_the_error():
    assert asked(error=Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, (("retry-after-ms", "150"),))).retry_after_s == 0.15
    assert asked().retry_after_s is None


def test_what_it_cost_counts_only_what_came_after_the_fault():
    one = asked(account=usage())  # first token after 0.8 s, last after 1.5 s
    assert worst_extra([one], [REFERENCE], since_s=10.5) == pytest.approx((0.3, 0.5))
    assert worst_extra([one], [REFERENCE], since_s=11.0) == (None, pytest.approx(0.5))
    assert worst_extra([one], [REFERENCE], since_s=12.0) == (None, None)


def test_leftovers_name_what_is_left():
    clean = common_pb2.EngineStatus(pages_free=9, pages_total=9)
    assert leftovers(prefill_pb2.PrefillStatus(engine=clean)) == {}
    engine = common_pb2.EngineStatus(pages_free=7, pages_total=9, state_slots_free=1, state_slots_total=2, waiting=1)
    assert leftovers(generation_pb2.GenerationStatus(engine=engine)) == {"pages": 2, "slots": 1, "requests": 1}
    assert leftovers(prefill_pb2.PrefillStatus(engine=clean, tickets=1, staged_bytes=5)) == {"tickets": 1, "staged bytes": 5}


def report(kind="kill", detection_s=0.05, broken=(), **fields) -> FaultReport:
    figures = {"recovery_s": 1.0, "affected": 2, "outcomes": {"as planned": 1, "resumed": 2}, "extra_ttft_s": 0.5, "extra_s": None}
    figures |= {"exit_s": None, "wrong_tokens": 0, "leaked_pages": 0, "hung": 0, "more_fds": 1, "more_threads": 2, "machine_load": 1.5}
    figures |= fields
    return FaultReport(Fault(kind, "alpha/0", "during"), detection_s, broken=broken, **figures)


def test_the_report_adds_up():
    killed = report(exit_s=0.03)
    reports = [killed, report("freeze", 0.9, leaked_pages=3), report("cut", None, ("tokens are wrong",), wrong_tokens=1, hung=2)]
    found = summary(reports, 40, 2)
    assert (found["faults"], found["wrong_tokens"], found["leaked_pages"], found["hung_requests"]) == (3, 1, 3, 2)
    assert (found["worst_dead_detection_s"], found["worst_frozen_detection_s"], found["worst_detection_s"]) == (0.05, 0.9, 0.9)
    assert (found["worst_exit_s"], found["worst_dead_detection_after_exit_s"]) == (0.03, 0.02)
    assert found["worst_drain_detection_s"] is None and found["broken"] == 1
    lines = table(reports).splitlines()
    assert len(lines) == 4 and lines[1].startswith("kill alpha/0 during") and "2 resumed, 1 as planned" in lines[1]
    assert lines[3].endswith("BROKEN") and not lines[2].endswith("BROKEN")
    row = reports[2].row()
    assert (row["fault"], row["breaks"], row["detection_s"], row["broken"]) == ("cut alpha/0 during", "link", None, "tokens are wrong")


def test_a_request_that_runs_has_no_times_yet():
    one = Asked(PROMPT, "probe", time.monotonic(), time.monotonic() + 1)
    assert one.ttft_s is None and one.total_s is None and one.outcome() == "running"

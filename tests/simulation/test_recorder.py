"""What a run leaves on disk: whole files, rows that add up, a trace that the viewer's format allows."""

import csv
import dataclasses
import json
import math

import pytest

from configs.studies import runs_of
from configs.studies.paper_case import get_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.view import NoDecodeServer
from prfaas_jax.simulation.recorder import RequestTable, Timeline, Usage
from prfaas_jax.simulation.records import Samples
from prfaas_jax.simulation.runs import prepare
from prfaas_jax.simulation.scenario import Outage


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """300 requests of the paper's case, with everything that can be recorded."""
    config = get_config()
    config.requests = 300
    folder = tmp_path_factory.mktemp("recorded")
    timeline = Timeline(most=50)
    jobs = []
    with RequestTable(folder / "requests.csv") as table:

        def finished(job):
            jobs.append(job)
            table.add(job, simulation)
            timeline.add(job, simulation)

        simulation, summary = prepare(runs_of(config, [0])[0], finished)
        usage = Usage(simulation, period_s=2.0)
        simulation.run(300)
        assert not (folder / "requests.csv").exists()  # it appears whole
    timeline.write(folder / "trace.json", usage)
    return folder, simulation, summary, usage, jobs


def test_every_request_has_a_row_and_its_parts_are_its_ttft(recorded):
    folder, _, _, _, jobs = recorded
    rows = list(csv.DictReader((folder / "requests.csv").open()))
    assert sorted(int(r["request"]) for r in rows) == list(range(300)) and len(jobs) == 300
    for row in rows:
        parts = sum(float(row[part]) for part in ("before_s", "queue_s", "prefill_s", "transfer_s", "admit_s"))
        assert parts == pytest.approx(float(row["ttft_s"]), abs=1e-9)
        assert float(row["e2e_s"]) >= float(row["ttft_s"]) > 0


def test_what_the_links_carried_over_time_is_what_the_requests_sent(recorded):
    _, simulation, _, usage, jobs = recorded
    rows = usage.samples.rows
    times = [0.0, *(row["time_s"] for row in rows)]
    carried = sum(row["prfaas->pd"] * 1e9 / 8 * (b - a) for row, a, b in zip(rows, times[:-1], times[1:], strict=True))
    assert carried == pytest.approx(sum(job.sent_bytes for job in jobs), rel=1e-9)
    for row in rows:
        assert all(0 <= value <= 1 for name, value in row.items() if name.startswith(("prefill ", "decode ")))
    assert max(row["decode pd"] for row in rows) > 0.2 and simulation.completed == 300


def test_the_trace_pairs_begins_with_ends_and_names_its_processes(recorded):
    folder, *_ = recorded
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    open_spans = set()
    for event in events:
        key = (event["pid"], event["name"], event.get("id"))
        if event["ph"] == "b":
            assert key not in open_spans
            open_spans.add(key)
        elif event["ph"] == "e":
            open_spans.remove(key)
    assert not open_spans
    assert {e["id"] for e in events if e["ph"] == "b"} == set(range(50))
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"prfaas", "pd", "use"}


def test_a_table_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), RequestTable(tmp_path / "requests.csv"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_samples_stay_bounded_and_cover_the_whole_run():
    samples, now = Samples(1.0, lambda: {"x": 1.0}), 0.0
    for _ in range(10 * Samples.MOST):
        now += samples.period_s
        samples.take(now)
    assert len(samples.rows) < Samples.MOST
    assert samples.rows[0]["time_s"] == 1.0 and samples.rows[-1]["time_s"] > now - 2 * samples.period_s


def test_a_period_of_nothing_is_refused(recorded):
    with pytest.raises(InvalidInput, match="period_s=0"):
        Usage(recorded[1], period_s=0)


def test_a_run_that_is_stuck_ends_although_its_use_is_sampled():
    config = get_config()
    config.requests = 20
    (run,) = runs_of(config, [0])
    dead = tuple(Outage("pd", "decode", i, 0.1, math.inf) for i in range(5))
    simulation, _ = prepare(dataclasses.replace(run, outages=dead))
    Usage(simulation)
    with pytest.raises(NoDecodeServer, match="nothing will take them"):
        simulation.run(20)

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_fixtures import PAPER, Listed, simulate

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.scheduling.policies import AlwaysLocal, Threshold
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.records import RESOLUTION, Histogram, Samples
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.summary import Summary
from prfaas_jax.simulation.workloads import Arrival, Poisson, Synthetic


@given(st.lists(st.floats(1e-5, 1e6), min_size=1, max_size=200), st.floats(0, 100))
def test_percentiles_are_those_of_the_sorted_times(times, q):
    histogram = Histogram()
    for some in np.array_split(np.array(times), 3):
        histogram.add(some)
    exact = sorted(times)[max(0, math.ceil(q / 100 * len(times) - 1e-9) - 1)]
    assert histogram.percentile(q) == pytest.approx(exact, rel=RESOLUTION)
    assert histogram.count == len(times) and histogram.mean == pytest.approx(np.mean(times))


def test_times_at_the_ends_are_counted():
    histogram = Histogram()
    assert math.isnan(histogram.mean) and math.isnan(histogram.percentile(50))
    histogram.add(np.array([0.0, 1e-9, 1e12]))
    assert histogram.count == 3 and histogram.percentile(50) == 0.0 and histogram.percentile(100) >= 1e7 * (1 - 2 * RESOLUTION)
    with pytest.raises(InvalidInput, match="percentile"):
        histogram.percentile(101)


def test_samples_stay_few():
    samples = Samples(1.0, lambda: {"x": 1.0})
    now = 0.0
    for _ in range(10_000):
        samples.take(now)
        now += samples.period_s
    assert len(samples.rows) < Samples.MOST and samples.period_s > 1.0
    times = [row["time_s"] for row in samples.rows]
    assert times[0] == 0.0 and times == sorted(times)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_the_summary_is_that_of_the_counted_requests(monkeypatch, block):
    monkeypatch.setattr(Summary, "BLOCK", block)
    workload = Synthetic(Poisson(2.5), LogNormalLengths(), 300, requests=400, output_sigma=2.0)
    options = SimOptions(warmup=0.25, slo_scale=2.0)
    summary, jobs = Summary(options, 400), []

    def finished(job):
        summary.add(job)
        jobs.append(job)

    sim = Simulation(PAPER, workload, Threshold(19_400), options, 0, finished)
    sim.run()
    counted = [j for j in jobs if j.id >= 100]
    result = summary.result(sim)
    span = max(j.arrival.time_s for j in counted) - min(j.arrival.time_s for j in counted)
    met = sum(j.ttft_s <= 2.0 * j.unloaded_s + 0.5 and j.tpot_s <= 0.05 for j in counted)
    assert 0 < met < 300 == result["requests"] == summary.requests
    until = max(j.first_s for j in counted) - min(j.arrival.time_s for j in counted)
    assert result["slo_share"] == met / 300 and result["goodput_rps"] == pytest.approx(met / until)
    last_arrival = max(j.arrival.time_s for j in counted)
    assert result["drain_s"] == max(j.first_s for j in counted) - last_arrival >= 0
    assert result["offload_share"] == sum(j.cluster >= 0 for j in counted) / 300
    assert result["egress_gbps"] == pytest.approx(sum(j.sent_bytes for j in counted) / span / GBPS)
    assert result["ttft_p90_s"] == pytest.approx(sorted(j.ttft_s for j in counted)[269], rel=RESOLUTION)
    tpots = [j.tpot_s for j in counted if j.arrival.output_tokens > 1]
    assert 0 < len(tpots) < 300 and result["tpot_mean_s"] == pytest.approx(np.mean(tpots)), "one token has no time per token"
    assert result["simulated_s"] == max(j.done_s for j in jobs) == sim.last_s
    assert result["events"] == sim.kernel.events > 0 and result["fallbacks"] == result["conversions"] == 0


def test_what_was_not_counted_is_absent():
    summary = Summary(SimOptions(), skip=1)
    _, sim = simulate(PAPER, Listed((Arrival(0.0, 100, 1), Arrival(9.0, 100, 1))), AlwaysLocal())
    assert summary.result(sim) == {"requests": 0}
    jobs, sim = simulate(PAPER, Listed((Arrival(0.0, 100, 1), Arrival(9.0, 100, 1))), AlwaysLocal())
    for job in jobs:
        summary.add(job)
    result = summary.result(sim)
    assert result["requests"] == 1 and "tpot_mean_s" not in result and result["ttft_p50_s"] == pytest.approx(jobs[1].ttft_s, rel=RESOLUTION)

"""The simulator against queueing theory and against the throughput model."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
from sim_fixtures import PAPER, check_finished

from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.planner import case_of
from prfaas_jax.scheduling.policies import AlwaysLocal, Threshold
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill, Instance
from prfaas_jax.scheduling.topology import GBPS, Region, Topology
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.workloads import Arrival, Poisson, Synthetic

MEAN = 100_000  # tokens that take one second: exponential times in steps of 10 us
LONG = 100 * MEAN
LINEAR = Instance("linear", FittedPrefill(0.0, 1e4 / MEAN, max_tokens=LONG), FittedDecode(1e-6), max_batch=1000)
# One chunk per prompt, so that an instance serves first come first served.
WHOLE = SimOptions(prefill_chunk=64 * (LONG // 64 + 1))
NOTHING = KvFootprint(0, 0)


@dataclasses.dataclass(frozen=True)
class Queue:
    """Poisson arrivals of prompts whose times are exponential or constant, mean one second."""

    rate: float
    exponential: bool
    requests: int
    block_tokens: int = 0

    def arrivals(self, seed):
        rng = np.random.default_rng(seed)
        now = 0.0
        while True:
            gaps, sizes = rng.exponential(1 / self.rate, 1024), rng.exponential(MEAN, 1024)
            for gap, size in zip(gaps.tolist(), sizes.tolist(), strict=True):
                now += gap
                yield Arrival(now, min(max(1, round(size)), LONG) if self.exponential else MEAN, 1)


def erlang_c(servers: int, load: float) -> float:
    """P(wait) in M/M/c at `load` Erlang."""
    last = load**servers / math.factorial(servers) / (1 - load / servers)
    return last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)


def exact_wait(servers: int, load: float, exponential: bool) -> float:
    """Mean wait in units of the mean service time: M/M/c (Erlang C), M/D/1 (Pollaczek-Khinchine)."""
    assert exponential or servers == 1
    return erlang_c(servers, load * servers) / (servers * (1 - load)) if exponential else load / (2 * (1 - load))


def recursion(gaps, sizes, servers):
    """Waits by Kiefer and Wolfowitz' recursion, over many independent queues at once: [customers, queues]."""
    left = np.zeros((gaps.shape[1], servers))
    waits = np.empty_like(gaps)
    for i, (gap, size) in enumerate(zip(gaps, sizes, strict=True)):
        left = np.maximum(left - gap[:, None], 0.0)
        waits[i] = left[:, 0]
        left[:, 0] += size
        left.sort(1)
    return waits


def simulated_waits(servers, load, exponential, requests, seed=1):
    """Waits in order of arrival, arrival times, service times; Little's law and conservation of work are checked on the way."""
    topology = Topology(NOTHING, (), (Region("r", LINEAR, servers, 1),), ())
    jobs = []
    sim = Simulation(topology, Queue(load * servers, exponential, requests), AlwaysLocal(), WHOLE, seed, jobs.append)
    sim.run(requests)
    check_finished(sim, jobs)
    # Number in the system, integrated over time, against arrival rate x mean time: an identity where nobody is lost.
    changes = sorted([(j.arrival.time_s, 1) for j in jobs] + [(j.done_s, -1) for j in jobs])
    area = there = 0.0
    for (now, change), (then, _) in itertools.pairwise(changes):
        there += change
        area += there * (then - now)
    assert area == pytest.approx(sum(j.e2e_s for j in jobs), rel=1e-9)
    busy = sum(i.busy_s for i in sim.local[0].instances)
    assert busy == pytest.approx(sum(j.arrival.tokens for j in jobs) / MEAN, rel=1e-9), "work is conserved"
    jobs.sort(key=lambda j: j.id)
    rows = [(j.begun_s - j.arrival.time_s, j.arrival.time_s, j.arrival.tokens / MEAN) for j in jobs]
    return np.array(rows).T


def interval(means):
    """Mean and half width of its 95 % confidence interval by Student's t, over the means of independent queues."""
    quantile = scipy.stats.t.ppf(0.975, len(means) - 1)
    return means.mean(), quantile * means.std(ddof=1) / math.sqrt(len(means))


QUEUES = [(1, 0.5, True), (1, 0.8, True), (3, 0.8, True), (4, 0.7, True), (1, 0.5, False), (1, 0.8, False)]


@pytest.mark.parametrize(("servers", "load", "exponential"), QUEUES)
def test_every_wait_is_that_of_the_recursion(servers, load, exponential):
    waits, arrivals, sizes = simulated_waits(servers, load, exponential, 4000)
    expected = recursion(np.diff(arrivals, prepend=0.0)[:, None], sizes[:, None], servers)[:, 0]
    np.testing.assert_allclose(waits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("servers", "load", "exponential"), QUEUES)
def test_the_recursion_has_the_mean_of_the_closed_form(servers, load, exponential):
    """With the test above: the simulator's mean wait is that of M/M/c and M/D/1, inside a 95 % interval less than 2 % wide in all."""
    rng = np.random.default_rng(10 + servers)
    shape = 8000, 800 if servers == 1 else 1600
    gaps = rng.exponential(1 / (load * servers), shape)
    sizes = rng.exponential(1.0, shape) if exponential else np.ones(shape)
    mean, half = interval(recursion(gaps, sizes, servers)[800:].mean(0))
    exact = exact_wait(servers, load, exponential)
    assert 2 * half < 0.02 * exact and abs(mean - exact) < half


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("servers", "load", "exponential"), [(1, 0.5, True), (4, 0.7, True), (1, 0.8, False)])
def test_the_simulator_alone_has_the_mean_of_the_closed_form(servers, load, exponential):
    """The same without the recursion between them: as many requests as a 95 % interval of less than 2 % to either side takes."""
    mean, half = interval(np.array([simulated_waits(servers, load, exponential, 60_000, seed)[0][3000:].mean() for seed in range(30)]))
    exact = exact_wait(servers, load, exponential)
    print(f"M/{'M' if exponential else 'D'}/{servers} at {load}: {mean:.4f} +- {half:.4f}, exact {exact:.4f}")
    assert half < 0.02 * exact and abs(mean - exact) < half


def saturated(topology, t, rate, requests=9000):
    """Completions per second at each end of a threshold, remote and local, after a warm-up, while `rate` arrive per second."""
    workload = Synthetic(Poisson(rate), LogNormalLengths(), 1024, requests=requests)
    done = []
    sim = Simulation(topology, workload, Threshold(t), SimOptions(), 0, lambda job: done.append((job.done_s, job.cluster >= 0)))
    end = requests / rate
    sim.run(until_s=end)
    remote = [far for at, far in done if end / 4 < at <= end]
    return sum(remote) / (end * 3 / 4), (len(remote) - sum(remote)) / (end * 3 / 4)


def paper(n_p, gbps=100.0):
    """The paper's clusters with other counts and another link, the throughput model of them, and the mix."""
    region = dataclasses.replace(PAPER.regions[0], prefill=n_p, decode=8 - n_p)
    link = dataclasses.replace(PAPER.links[0], bytes_per_s=gbps * GBPS)
    topology = dataclasses.replace(PAPER, regions=(region,), links=(link,))
    return topology, case_of(topology), Mix.log_normal(LogNormalLengths(), 1024)


def test_saturation_is_lambda_max_at_the_operating_point():
    """The paper's threshold is within a percent of the best rule of all, and the simulator within 3 % of both."""
    topology, study, mix = paper(3)
    remote, local = saturated(topology, 19_400, 1.15 * 3.19)
    model = study.operate(mix, 19_400, 3, "exact")
    assert remote + local == pytest.approx(float(model.lambda_max[0]), rel=0.03)
    assert remote + local == pytest.approx(optimum(topology, mix).lambda_max, rel=0.03)
    assert remote == pytest.approx(float(model.theta_prfaas[0]), rel=0.03)
    assert local == pytest.approx(float(model.theta_pd_p[0]), rel=0.03)


def test_saturation_of_local_prefill():
    topology, study, mix = paper(1)
    model = study.operate(mix, 19_400, 1, "exact")
    _, local = saturated(topology, 19_400, 1.3 * float(model.lambda_max[0]))
    assert local == pytest.approx(float(model.lambda_max[0] * (1 - model.p[0])), rel=0.03)


def test_saturation_of_decode():
    topology, study, mix = paper(6)
    model = study.operate(mix, 19_400, 6, "exact")
    assert float(model.lambda_max[0]) == pytest.approx(2 * 20 / 0.025 / 1024)
    # The first token comes with the prefill, which the model counts as a decode step: 0.1 %.
    assert sum(saturated(topology, 19_400, 2.0)) == pytest.approx(float(model.lambda_max[0]), rel=0.03)


@pytest.mark.parametrize("load", [0.9, 1.3])
def test_saturation_of_the_link(load):
    """Shared fairly, an overloaded link finishes short transfers first, so its bytes are what the model foretells."""
    topology, study, mix = paper(3, gbps=4.0)
    model = study.operate(mix, 19_400, 3, "exact")
    assert model.theta_prfaas_egress[0] < 0.5 * model.theta_prfaas_compute[0]
    workload = Synthetic(Poisson(load * float(model.lambda_max[0])), LogNormalLengths(), 1024, requests=9000)
    sim = Simulation(topology, workload, Threshold(19_400), SimOptions(), 0, lambda job: None)
    end = 9000 / workload.process.rate
    sim.run(until_s=end)
    pair = sim.pairs[0][0]
    pair.advance()
    assert pair.moved / (pair.capacity * end) == pytest.approx(min(load, 1.0), rel=0.03)

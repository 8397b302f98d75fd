"""What policies predict, against what the simulator then does."""

import dataclasses

import numpy as np
import pytest
from sim_fixtures import KV, PAPER, simulate

from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft
from prfaas_jax.scheduling.profiles import prefill_s
from prfaas_jax.scheduling.topology import GBPS, Topology
from prfaas_jax.scheduling.view import ClusterView, Placement, Request
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.workloads import Poisson, Synthetic

CHUNK = 8192
FAR = PAPER.prefill[0].instance.prefill


class Predicting:
    """Goes where it is told, or where least_ttft says, and keeps what was predicted for that path."""

    def __init__(self, topology: Topology, overlap: bool, always: str):
        self.policy, self.always = LeastTtft(Predictor(topology, CHUNK, overlap)), always
        self.predicted: list[float] = []

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        paths = self.policy.predictor.paths(request, view, now)
        placed = self.policy.place(request, view, now)
        if self.always:
            placed = Placement("h200" if self.always == "remote" else None, "pd", "")
        self.predicted.append(float(paths.remote_ttft_s[0, 0] if placed.prefill else paths.local_ttft_s[0]))
        return placed


def compared(rate: float, requests: int, always: str = "", overlap: bool = True, gbps: float = 100.0):
    """Predicted and simulated TTFT, and prompt length, of every request."""
    link = dataclasses.replace(PAPER.links[0], bytes_per_s=gbps * GBPS, rtt_s=0.1)
    topology = dataclasses.replace(PAPER, links=(link,))
    policy = Predicting(topology, overlap, always)
    workload = Synthetic(Poisson(rate), LogNormalLengths(), 20, requests=requests)
    jobs, _ = simulate(topology, workload, policy, SimOptions(prefill_chunk=CHUNK, overlap=overlap))
    jobs.sort(key=lambda job: job.id)
    return np.array(policy.predicted), np.array([j.ttft_s for j in jobs]), np.array([j.tokens for j in jobs])


@pytest.mark.parametrize(("always", "overlap"), [("local", True), ("local", False), ("remote", False)])
def test_with_nobody_else_there_predictions_are_exact(always, overlap):
    predicted, simulated, _ = compared(1e-3, 60, always, overlap)
    assert predicted == pytest.approx(simulated, abs=1e-6)


def test_with_overlap_they_miss_at_most_a_chunk_that_is_still_crossing():
    """Where the prompt ends shortly after a whole chunk."""
    predicted, simulated, tokens = compared(1e-3, 300, "remote")
    short = (tokens > CHUNK) & (((tokens - 1) % CHUNK + 1) < 0.1 * CHUNK)
    assert 5 < short.sum() < 60
    assert predicted[~short] == pytest.approx(simulated[~short], abs=1e-6)
    missed = simulated - predicted
    assert missed.min() > -1e-6 and 1e-4 < missed.max() <= CHUNK * KV.bytes_per_token / (100 * GBPS)


def test_on_a_link_slower_than_prefill_they_miss_at_most_the_first_chunk():
    predicted, simulated, _ = compared(1e-4, 60, "remote", gbps=0.5)
    missed = simulated - predicted
    assert missed.min() > -1e-6 and 0.1 < missed.max() <= prefill_s(FAR, CHUNK) + 1e-6


@pytest.mark.parametrize(("rate", "within"), [(0.5, 0.03), (1.0, 0.05)])
def test_under_light_load_they_are_right_on_average(rate, within):
    predicted, simulated, _ = compared(rate, 1500)
    assert abs(predicted.mean() / simulated.mean() - 1) < within
    assert np.corrcoef(predicted, simulated)[0, 1] > 0.9

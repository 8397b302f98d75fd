"""TTFT with queues, which the paper's Table 6 leaves out: its three systems simulated at shares of their own Lambda_max."""

import dataclasses
import statistics
from collections.abc import Iterable, Iterator

from prfaas_jax.scheduling.planner import grid, homogeneous, naive, topology_of
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote, Threshold
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import Policy
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.summary import Summary
from prfaas_jax.simulation.workloads import Poisson, Synthetic
from prfaas_jax.testing.paper import Check, Paper

LOADS = (0.5, 0.7, 0.9)

# P90 of TTFT in seconds at (0.7, 0.9), from queues of the kind M/G/c, computed apart from this simulator.
MGC_P90_S = {"PrfaaS-PD": (4.95, 11.2), "homogeneous": (10.4, 21.0), "naive": (4.6, 10.9)}

# Whole prompts, first come first served, sent after the prefill: what a queue of the kind M/G/c and Table 6 assume.
OPTIONS = SimOptions(prefill_chunk=131_072, overlap=False)


@dataclasses.dataclass(frozen=True)
class Queue:
    """One simulated run; seconds and requests/s."""

    system: str
    load: float
    seed: int
    rate: float
    ttft_mean_s: float
    ttft_p90_s: float


def runs(paper: Paper, seeds: int) -> list[tuple[str, float, int]]:
    """(system, load, seed) of all runs."""
    return [(system, load, seed) for system in MGC_P90_S for load in LOADS for seed in range(seeds)]


def simulate(paper: Paper, todo: Iterable[tuple[str, float, int]], requests: int) -> Iterator[Queue]:
    """Each run as it ends; `requests` arrivals, of which the first 5 % do not count."""
    systems = _systems(paper)
    for system, load, seed in todo:
        topology, policy, lambda_max = systems[system]
        workload = Synthetic(Poisson(load * lambda_max), paper.lengths, paper.output_tokens, requests)
        summary = Summary(OPTIONS, requests)
        simulation = Simulation(topology, workload, policy, OPTIONS, seed, summary.add)
        simulation.run()
        result = summary.result(simulation)
        yield Queue(system, load, seed, load * lambda_max, result["ttft_mean_s"], result["ttft_p90_s"])


def _systems(paper: Paper) -> dict[str, tuple[Topology, Policy, float]]:
    case, mix = paper.case, paper.mix()
    plan, other = grid(case, mix), homogeneous(case, mix, paper.instances)
    alone = dataclasses.replace(case, n_prfaas=0, n_pd=paper.instances)
    return {
        "PrfaaS-PD": (topology_of(case, plan.n_p), Threshold(int(plan.t)), plan.lambda_max),
        "homogeneous": (topology_of(alone, other.n_p), AlwaysLocal(), other.lambda_max),
        "naive": (topology_of(case, 0), AlwaysRemote(), naive(case, mix).lambda_max),
    }


def p90_s(queues: Iterable[Queue], system: str, load: float) -> float:
    """Mean over the seeds."""
    return statistics.mean(q.ttft_p90_s for q in queues if (q.system, q.load) == (system, load))


def checks(queues: list[Queue]) -> Iterator[Check]:
    """P90 at 0.7 and 0.9 beside M/G/c."""
    for system, expected in MGC_P90_S.items():
        for load, printed, tolerance in ((0.7, expected[0], 0.05), (0.9, expected[1], 0.15)):
            because = "the P90 of a finite run, more so near saturation"
            what, ours = f"{system} TTFT P90 at {load} load, s", p90_s(queues, system, load)
            yield Check("queues", "extension", what, printed, ours, tolerance, because=because)

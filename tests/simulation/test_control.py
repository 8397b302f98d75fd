"""Controllers that run in the simulator: roles and t together, on requests that are not those that the split was planned for."""

import dataclasses

import pytest
from sim_fixtures import PAPER, check_finished

from prfaas_jax.scheduling.controllers import Both, PriceController, RoleController, ThresholdController
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.planner import case_of
from prfaas_jax.scheduling.policies import Threshold
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import ShadowPrice
from prfaas_jax.scheduling.prices import placement_prices
from prfaas_jax.scheduling.topology import GBPS, Topology
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.scenario import SimOptions, SquareWave, Steps
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.workloads import Poisson, Synthetic

LENGTHS = LogNormalLengths()
CASE = case_of(PAPER)


def run(topology: Topology, controller, rate: float, output: int, requests: int, **disturbances) -> tuple[float, Simulation]:
    """Requests/s from the first arrival to the last end, and the simulation."""
    jobs: list[Job] = []
    workload = Synthetic(Poisson(rate), LENGTHS, output, requests=requests)
    sim = Simulation(topology, workload, Threshold(19_400), SimOptions(), 0, jobs.append, controller=controller, **disturbances)
    sim.run()
    check_finished(sim, jobs)
    assert len(jobs) == requests
    return requests / sim.last_s, sim


def both() -> Both:
    return Both(ThresholdController(CASE, 3, 19_400), RoleController(PAPER, cooldown_s=60.0))


def roles(sim: Simulation) -> tuple[int, int]:
    return len(sim.local[0].instances), len(sim.decode[0].instances)


@pytest.mark.parametrize(("output", "to_prefill"), [(200, True), (2048, False)])
def test_moving_t_and_roles_together_finishes_more_of_a_mix_that_was_not_planned_for(output, to_prefill):
    rate = optimum(PAPER, Mix.log_normal(LENGTHS, output, 1 << 12)).lambda_max * 1.15
    requests = 2400
    planned, fixed = run(PAPER, None, rate, output, requests)
    controlled, sim = run(PAPER, both(), rate, output, requests)
    assert fixed.conversions == 0 and roles(fixed) == (3, 5)
    n_p, n_d = roles(sim)
    assert sim.conversions == abs(n_p - 3) >= 1 and (n_p > 3) == to_prefill and n_p + n_d == 8
    assert sim.view.decode.load.instances[0] == n_p and sim.view.decode.load.slots[0] == 20 * n_d
    assert sim.policy != Threshold(19_400)
    assert controlled > 1.04 * planned


def test_a_link_that_shrinks_for_good_is_answered_by_both():
    steps = {("h200", "pd"): Steps(((60.0, 5 * GBPS),))}
    narrow = dataclasses.replace(PAPER, links=(dataclasses.replace(PAPER.links[0], bytes_per_s=5 * GBPS),))
    rate = optimum(narrow, Mix.log_normal(LENGTHS, 1024, 1 << 12)).lambda_max * 1.2
    planned, _ = run(PAPER, None, rate, 1024, 2500, links=steps)
    controlled, sim = run(PAPER, both(), rate, 1024, 2500, links=steps)
    assert roles(sim)[0] >= 4 and sim.policy.tokens > 30_000
    assert controlled > 1.25 * planned


@pytest.mark.parametrize("ours", [False, True])
def test_a_square_wave_converts_nothing(ours):
    waves = {("h200", "pd"): SquareWave(5 * GBPS, 60.0)}
    mix = Mix.log_normal(LENGTHS, 1024, 1 << 12)
    short = PriceController(PAPER, ShadowPrice(Predictor(PAPER, 8192), placement_prices(PAPER, mix))) if ours else both()
    controller = Both(short, RoleController(PAPER)) if ours else short
    _, sim = run(PAPER, controller, 2.2, 1024, 2600, links=waves)
    assert sim.conversions == 0 and sim.last_s > 1000
    assert isinstance(sim.policy, ShadowPrice) == ours

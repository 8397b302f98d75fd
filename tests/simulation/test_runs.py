import dataclasses
import math
import pickle

import pytest
from sim_fixtures import PAPER, Listed

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import Both, PriceController, ThresholdController
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.policies import LengthBlind, PaperPrefix, Reverse, Threshold
from prfaas_jax.scheduling.predictive import ShadowPrice
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology
from prfaas_jax.simulation.contenders import CONTENDERS, Ground, build
from prfaas_jax.simulation.runs import Estimate, Run, prepare, simulate, sweep
from prfaas_jax.simulation.scenario import Outage, SimOptions, SquareWave
from prfaas_jax.simulation.unloaded import Unloaded
from prfaas_jax.simulation.workloads import Arrival, Poisson, Sessions, Synthetic

LENGTHS = LogNormalLengths()
MIX = Mix.log_normal(LENGTHS, 200, 1 << 10)
GROUND = Ground(PAPER, MIX, SimOptions(prefill_cache_bytes=1e12, decode_cache_bytes=1e12))
# Two clusters on two lines to two regions.
TWO = Topology(
    PAPER.kv,
    (PAPER.prefill[0], PrefillCluster("b", PAPER.prefill[0].instance, 1)),
    (PAPER.regions[0], Region("e", PAPER.regions[0].instance, 1, 2)),
    (PAPER.links[0], Link("b", "e", 10 * GBPS, 0.05)),
)
LOAD = Synthetic(Poisson(2.0), LENGTHS, 200)
SESSIONS = Sessions(Poisson(2.0), LENGTHS, LogNormalLengths(6.0, 1.0, 16, 8192), 120, 4.0, 2.0)
TIMED = ("wall_s", "requests_per_s")


def figures(result: dict) -> dict:
    """Without what depends on the machine."""
    return {key: value for key, value in result.items() if key not in TIMED}


def run(policy: str = "threshold", parameter: float = 19_400.0, **fields) -> Run:
    return Run(**({"ground": GROUND, "workload": LOAD, "policy": policy, "parameter": parameter, "requests": 60} | fields))


RUNS = [
    run(),
    run("shadow_price", 0.0, seed=3),
    run("length_blind", 0.5, workload=SESSIONS),
    run("always_remote", links={("h200", "pd"): SquareWave(5 * GBPS, 20.0)}, outages=(Outage("pd", "prefill", 0, 5.0, 10.0),)),
]


def test_a_run_survives_pickling_with_all_that_it_needs():
    for one in RUNS:
        copy = pickle.loads(pickle.dumps(one))
        assert figures(simulate(copy)) == figures(simulate(one))


def test_a_sweep_gives_the_same_in_order_whatever_the_processes():
    alone, both = ([figures(r) for r in sweep(RUNS, processes)] for processes in (1, 2))
    assert alone == both == [figures(simulate(one)) for one in RUNS]
    assert len({str(r) for r in alone}) == len(RUNS)
    assert not list(sweep([]))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_fails_ends_the_sweep_with_its_error(processes):
    results = sweep([run(), run("moon"), run()], processes)
    next(results)
    with pytest.raises(InvalidInput) as error:
        next(results)
    assert (error.value.field, error.value.value) == ("policy", "moon") and "shadow_price" in error.value.expected


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_has_a_deadline(processes):
    with pytest.raises(TimeoutError):
        list(sweep([run(), run()], processes, deadline_s=0.0))


def test_no_process_is_refused():
    with pytest.raises(InvalidInput, match="processes=0"):
        list(sweep(RUNS, 0))


def test_the_warm_up_does_not_count_and_watchers_see_every_request():
    seen = []
    simulation, summary = prepare(run(requests=40), seen.append)
    simulation.run(40)
    assert len(seen) == 40 and summary.requests == 38
    listed = Listed(tuple(Arrival(float(i), 1000, 4) for i in range(20)))
    assert simulate(run(workload=listed, requests=None))["requests"] == 19


def test_the_slo_may_be_that_of_another_topology():
    alone = dataclasses.replace(PAPER, prefill=(), links=())
    ground = dataclasses.replace(GROUND, topology=alone)
    mine, theirs = [], []
    for slo_topology, jobs in ((None, mine), (PAPER, theirs)):
        simulation, _ = prepare(run("always_local", 0.0, ground=ground, slo_topology=slo_topology), jobs.append)
        simulation.run(60)
    own, far = Unloaded(alone, 8192, True), Unloaded(PAPER, 8192, True)
    assert all(job.unloaded_s == own.ttft(job.arrival.tokens) for job in mine)
    assert all(job.unloaded_s == far.ttft(job.arrival.tokens) for job in theirs)
    assert [job.first_s for job in mine] == [job.first_s for job in theirs], "nothing else changes"
    assert sum(job.unloaded_s for job in theirs) < 0.9 * sum(job.unloaded_s for job in mine)


# --- estimates ---------------------------------------------------------------------------------------------------------------------


def test_intervals_are_student_t():
    got = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert got.mean == 3.0 and got.half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert Estimate.of([1.0, 3.0]).half_width == pytest.approx(12.706205, rel=1e-6)
    assert Estimate.of([7.0, 7.0, 7.0]) == Estimate(7.0, 0.0)
    assert Estimate.of([4.5]) == Estimate(4.5, math.inf)
    with pytest.raises(InvalidInput, match="values"):
        Estimate.of([])


# --- contenders --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("topology", [PAPER, TWO], ids=["one", "two"])
def test_every_contender_serves_all_requests(name, topology):
    ground = dataclasses.replace(GROUND, topology=topology)
    parameter = {"share": 0.5, "tokens": 19_400.0, "": 0.0}[CONTENDERS[name][0]]
    one = run(name, parameter, ground=ground, workload=SESSIONS, requests=50)
    if name == "paper_controlled" and topology is TWO:
        with pytest.raises(InvalidInput, match="a topology of one prefill cluster and one region"):
            simulate(one)
        return
    simulation, summary = prepare(one)
    simulation.run(50)
    assert simulation.completed == 50 and summary.requests == 48
    result = summary.result(simulation)
    assert result["goodput_rps"] > 0 and 0 <= result["offload_share"] <= 1
    assert all(math.isfinite(value) for value in result.values())


def test_contenders_are_what_they_are_called():
    assert build("threshold", GROUND, 5000.0) == (Threshold(5000), None) and build("reverse", GROUND, 7.0)[0] == Reverse(7)
    assert build("paper_prefix", GROUND, 9.0)[0] == PaperPrefix(9) and build("length_blind", GROUND, 0.25)[0] == LengthBlind(0.25)
    policy, controller = build("paper_controlled", GROUND, 19_400.0)
    assert policy == Threshold(19_400) and isinstance(controller, ThresholdController) and controller.t == 19_400
    policy, controller = build("shadow_price", GROUND)
    assert isinstance(policy, ShadowPrice) and isinstance(controller, PriceController)
    assert policy.prices.prefill.keys() == {"h200", "pd"} and (policy.slo_scale, policy.slo_base_s) == (3.0, 0.5)
    policy, controller = build("shadow_price_roles", GROUND)
    assert isinstance(policy, ShadowPrice) and isinstance(controller, Both)


@pytest.mark.parametrize(
    ("name", "parameter", "field"),
    [("moon", 0.0, "policy"), ("length_blind", 1.5, "length_blind.share"), ("threshold", -1.0, "threshold.tokens")],
)
def test_unknown_contenders_and_parameters_are_refused(name, parameter, field):
    with pytest.raises(InvalidInput) as error:
        build(name, GROUND, parameter)
    assert error.value.field == field

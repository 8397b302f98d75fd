import dataclasses
import math

import numpy as np
import pytest

from configs.studies import contest as study
from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.contenders import CONTENDERS
from prfaas_jax.simulation.contest import OURS, Contest, Verdict, equal_cost, parameters, plan_cell
from prfaas_jax.simulation.runs import Estimate
from prfaas_jax.simulation.scenario import SimOptions, SquareWave, Steps

CONFIG = study.get_config()
SMOKE = {cell.name: cell for cell in study.cells(CONFIG, "smoke")}
PAPER = {cell.name: cell for cell in study.cells(CONFIG, "paper")}


# --- cells -------------------------------------------------------------------------------------------------------------------------


def test_suites_have_the_cells_that_they_list():
    assert list(SMOKE) == ["100/paper", "100/sessions", "8/paper", "8/sessions"]
    assert list(PAPER) == [f"{link}/paper" for link in ("100", "25", "12", "8", "5", "wave", "outage")]
    assert {name for name, cell in (SMOKE | PAPER).items() if cell.hard} == {"100/sessions", "8/paper", "8/sessions", "12/paper", "5/paper"}
    with pytest.raises(InvalidInput, match=r"suite='moon': expected one of smoke, paper, full"):
        list(study.cells(CONFIG, "moon"))


def test_a_third_of_the_full_suite_is_held_out():
    links, loads = study.SUITES["full"]
    every = {f"{link}/{load}" for link in links for load in loads}
    assert every >= study.HELD_OUT and 0.3 < len(study.HELD_OUT) / len(every) < 0.4
    assert {load for _, load in (name.split("/") for name in study.HELD_OUT)} == set(loads)
    assert all(cell.held_out == (name in study.HELD_OUT) for name, cell in (SMOKE | PAPER).items())


def test_links_change_as_their_names_say():
    for gbps in (100, 25, 12, 8, 5):
        cell = PAPER[f"{gbps}/paper"]
        assert not cell.links and cell.states == ((gbps * GBPS, 1.0),) and cell.topology.links[0].bytes_per_s == gbps * GBPS
    wave, outage = PAPER["wave/paper"], PAPER["outage/paper"]
    (plan,) = wave.links.values()
    assert isinstance(plan, SquareWave) and plan.low == 5 * GBPS and sum(share for _, share in wave.states) == 1
    (plan,) = outage.links.values()
    assert isinstance(plan, Steps) and plan.steps[:3] == ((300.0, 0.0), (360.0, 100 * GBPS), (1200.0, 0.0))
    topology = wave.topology
    assert set(wave.links) == set(outage.links) == {(topology.prefill[0].name, topology.regions[0].name)}


# --- how a cell is set up ----------------------------------------------------------------------------------------------------------


def test_the_roles_of_a_cell_are_the_planner_s_best():
    for name, n_p in (("100/paper", 3), ("5/paper", 5)):
        topology, rate = plan_cell(PAPER[name])
        assert topology.regions[0].prefill == n_p and topology.regions[0].instances == 8
        assert rate == pytest.approx(optimum(topology, PAPER[name].mix).lambda_max)


def test_a_cell_whose_link_changes_is_planned_on_average():
    topology, rate = plan_cell(PAPER["wave/paper"])
    region = topology.regions[0]
    states = [dataclasses.replace(PAPER[f"{g}/paper"].topology, regions=(region,)) for g in (100, 5)]
    assert rate == pytest.approx(np.mean([optimum(x, PAPER["wave/paper"].mix).lambda_max for x in states]))
    down = dataclasses.replace(PAPER["5/paper"], states=((0.0, 1.0),))
    topology, rate = plan_cell(down)
    alone = dataclasses.replace(topology, prefill=(), links=())
    assert topology.regions[0].prefill > 5 and rate == pytest.approx(optimum(alone, down.mix).lambda_max)


def test_the_same_money_buys_a_homogeneous_region():
    topology = plan_cell(PAPER["100/paper"])[0]
    mix = PAPER["100/paper"].mix
    same = equal_cost(topology, mix)
    (region,) = same.regions
    assert not same.prefill and not same.links and topology.cost_per_hour - region.instance.cost_per_hour < same.cost_per_hour
    assert same.cost_per_hour <= topology.cost_per_hour * (1 + 1e-9) and region.instances == 16
    for n_p in range(1, 16):
        other = dataclasses.replace(same, regions=(dataclasses.replace(region, prefill=n_p, decode=16 - n_p),))
        assert optimum(other, mix).lambda_max <= optimum(same, mix).lambda_max * (1 + 1e-9)


@pytest.mark.parametrize("points", [1, 4])
def test_grids_are_around_the_planner_s_answer_and_over_all_lengths(points):
    cell = PAPER["8/paper"]
    planned = optimum(plan_cell(cell)[0], cell.mix)
    for name, (kind, _) in CONTENDERS.items():
        grid = parameters(name, planned, cell.mix, points)
        assert grid and len(set(grid)) == len(grid) and all(math.isfinite(x) for x in grid)
        if not kind:
            assert grid == [0.0]
        elif kind == "share":
            assert points < len(grid) <= points + 5 and min(grid) > 0 and max(grid) <= 1
        elif name == "paper_controlled":
            assert len(grid) == 1
        else:
            assert points < len(grid) <= points + 7 and min(grid) < 20_000 < max(grid) and all(x == int(x) for x in grid)
    local = Mix.of(np.full(4, 300.0), 1024)
    assert all(x >= 0 for x in parameters("threshold", optimum(plan_cell(cell)[0], local), local, points))


# --- a contest ---------------------------------------------------------------------------------------------------------------------

OPTIONS = SimOptions(**CONFIG.sim.to_dict())
TINY = Contest(OPTIONS, requests=200, seeds=2, points=2)


@pytest.fixture(scope="module")
def verdict() -> Verdict:
    (found,) = TINY.judge([SMOKE["8/sessions"]])
    return found


def test_a_verdict_is_finite_and_about_everybody(verdict):
    assert verdict.cell == "8/sessions" and verdict.hard and not verdict.held_out and 0 <= verdict.n_p < 8
    assert set(verdict.policies) == set(CONTENDERS) and verdict.best_static in set(CONTENDERS) - {OURS}
    for estimate in (verdict.vs_best, verdict.vs_paper, verdict.p90_vs_paper):
        assert math.isfinite(estimate.mean) and math.isfinite(estimate.half_width) and estimate.mean > 0
    for figures in (*verdict.policies.values(), verdict.equal_cost):
        assert all(math.isfinite(x) for x in figures.values()) and figures["goodput_rps"] > 0
    assert verdict.load_rps == pytest.approx(0.9 * plan_cell(SMOKE["8/sessions"])[1])


def test_the_same_contest_has_the_same_verdict(verdict):
    assert list(TINY.judge([SMOKE["8/sessions"]])) == [verdict]


def test_without_prefixes_the_paper_s_rules_are_one():
    (found,) = dataclasses.replace(TINY, requests=100, points=1, seeds=1).judge([PAPER["100/paper"]])
    assert set(CONTENDERS) - set(found.policies) == {"paper_prefix"} and found.vs_best.half_width == math.inf


def test_ahead_is_by_goodput_or_by_latency(verdict):
    def with_(goodput: float, p90: float) -> bool:
        return dataclasses.replace(verdict, vs_paper=Estimate(goodput, 0.1), p90_vs_paper=Estimate(p90, 0.1)).ahead

    assert with_(1.1, 1.0) and with_(0.9, 0.75) and not with_(1.09, 0.76)


@pytest.mark.parametrize("field", ["requests", "seeds", "tuning_seeds", "points", "processes", "load"])
def test_a_contest_of_nothing_is_refused(field):
    with pytest.raises(InvalidInput) as error:
        Contest(OPTIONS, **({"requests": 10} | {field: 0}))
    assert error.value.field == f"contest.{field}"

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from configs.studies import contest as study
from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation import contest as contest_module
from prfaas_jax.simulation.contenders import CONTENDERS, Ground
from prfaas_jax.simulation.contest import OURS, ROLES, Contest, Tuned, Verdict, equal_cost, parameters, plan_cell, sustained
from prfaas_jax.simulation.runs import Estimate, Run, prepare
from prfaas_jax.simulation.scenario import SimOptions, SquareWave, Steps
from prfaas_jax.simulation.workload_mix import workload_mix

MOONCAKE = Path(__file__).resolve().parents[2].parent / "shared" / "traces" / "mooncake_conversation_trace.jsonl.gz"
CONFIG = study.get_config()
CONFIG.sessions.lead_s = 150.0  # shorter than the study's, for speed
OPTIONS = SimOptions(**CONFIG.sim.to_dict())
TINY = Contest(OPTIONS, requests=200, seeds=2, tuning_seeds=1, points=2)
SMOKE = {cell.name: cell for cell in study.cells(CONFIG, "smoke", TINY)}
PAPER = {cell.name: cell for cell in study.cells(CONFIG, "paper", TINY)}


# --- cells -------------------------------------------------------------------------------------------------------------------------


def test_suites_have_the_cells_that_they_list():
    assert list(SMOKE) == ["100/paper", "100/sessions", "8/paper", "8/sessions"]
    assert list(PAPER) == [f"{link}/paper" for link in ("100", "25", "12", "8", "5", "wave", "outage")]
    assert {name for name, cell in (SMOKE | PAPER).items() if cell.hard} == {"100/sessions", "8/paper", "8/sessions", "12/paper", "5/paper"}
    with pytest.raises(InvalidInput, match=r"suite='moon': expected one of smoke, paper, full"):
        list(study.cells(CONFIG, "moon", TINY))


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
    quarter_s = 0.25 * TINY.requests / (TINY.load * plan_cell(outage)[1])
    assert isinstance(plan, Steps) and plan.steps == ((quarter_s, 0.0), (quarter_s + 60, 100 * GBPS))
    topology = wave.topology
    assert set(wave.links) == set(outage.links) == {(topology.prefill[0].name, topology.regions[0].name)}


def test_sessions_begin_several_durations_before_the_run():
    cell = next(cell for cell in study.cells(study.get_config(), "smoke", TINY) if cell.name == "8/sessions")
    workload = cell.workload
    duration_s = (workload.requests_per_session - 1) * (workload.think_s + workload.output_tokens * workload.output_token_s)
    assert workload.lead_s > 5 * duration_s > 500 and cell.tuning == workload


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
    same, most = equal_cost(topology, mix)
    (region,) = same.regions
    assert not same.prefill and not same.links and topology.cost_per_hour - region.instance.cost_per_hour < same.cost_per_hour
    assert same.cost_per_hour <= topology.cost_per_hour * (1 + 1e-9) and region.instances == 16
    assert most == optimum(same, mix).lambda_max
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


@pytest.fixture(scope="module")
def verdict() -> Verdict:
    (found,) = TINY.judge([SMOKE["8/sessions"]])
    return found


def test_a_verdict_is_finite_and_about_everybody(verdict):
    assert verdict.cell == "8/sessions" and verdict.hard and not verdict.held_out and 0 <= verdict.n_p < 8
    baselines = set(CONTENDERS) - {OURS, ROLES}
    assert set(verdict.policies) == set(CONTENDERS) and {verdict.best_static, verdict.best_share} <= baselines
    assert verdict.paper in contest_module.PAPER
    for estimate in (verdict.vs_best, verdict.vs_paper, verdict.p90_vs_paper, verdict.share_vs_best, verdict.roles_vs_ours):
        assert math.isfinite(estimate.mean) and math.isfinite(estimate.half_width) and estimate.mean > 0
    for figures in (*verdict.policies.values(), verdict.share, verdict.equal_cost, verdict.equal_cost_own):
        assert all(math.isfinite(x) for x in figures.values()) and figures["goodput_rps"] >= 0 and figures["drain_s"] >= 0
    assert verdict.policies[OURS]["goodput_rps"] > 0 and verdict.equal_cost_own["goodput_rps"] > 0


def test_loads_are_shares_of_what_each_planner_sustains(verdict):
    topology, most = plan_cell(SMOKE["8/sessions"])
    assert verdict.load_rps == verdict.equal_cost["load_rps"] == pytest.approx(0.9 * most)
    assert verdict.equal_cost_own["load_rps"] == pytest.approx(0.9 * equal_cost(topology, SMOKE["8/sessions"].mix)[1])


def test_runs_have_the_seeds_workloads_and_slo_of_their_purpose(monkeypatch):
    seen: list[Run] = []

    def sweep(runs, processes, label):
        seen.extend(runs)
        return [dict.fromkeys(contest_module.FIGURES, 1.0) for _ in runs]

    monkeypatch.setattr(contest_module, "sweep", sweep)
    cell = PAPER["wave/paper"]
    half = Mix.of(cell.mix.tokens / 2, cell.mix.output, cell.mix.weight)
    cell = dataclasses.replace(cell, tuning=dataclasses.replace(cell.workload, output_sigma=0.1), tuning_mix=half)
    list(dataclasses.replace(TINY, seeds=3, tuning_seeds=2).judge([cell]))
    topology, most = plan_cell(cell)
    tuning = [one for one in seen if one.seed < 2000]
    evaluation = [one for one in seen if one.slo_topology is None and one.seed >= 2000]
    alone = [one for one in seen if one.slo_topology is not None]
    assert {one.seed for one in tuning} == {1000, 1001} and {one.seed for one in (*evaluation, *alone)} == {2000, 2001, 2002}
    at = sustained(cell, topology, half)
    assert {one.workload for one in tuning} == {cell.tuning.scaled(0.9 * at)} and at > 1.2 * most, "the same load, of what tuning has"
    assert {one.workload for one in evaluation} == {cell.workload.scaled(0.9 * most)}
    assert not {OURS, ROLES} & {one.policy for one in tuning} and {OURS, ROLES} < {one.policy for one in evaluation}
    assert all(one.links == cell.links and one.ground.topology == topology for one in (*tuning, *evaluation))
    assert {one.slo_topology for one in alone} == {topology} and not any(one.ground.topology.links or one.links for one in alone)
    assert len(alone) == 6 and cell.workload.scaled(0.9 * most) in {one.workload for one in alone}


def test_tuning_chooses_by_goodput_and_names_the_highest_share_at_any_parameter():
    figures = {
        ("always_local", 0.0): [(1.0, 0.5)],
        ("threshold", 1.0): [(2.0, 0.6), (4.0, 0.6)],
        ("threshold", 2.0): [(1.0, 0.9), (1.0, 0.9)],
        ("paper_controlled", 7.0): [(3.5, 0.7)],
        ("length_blind", 0.5): [(5.0, 0.8)],
        ("reverse", 3.0): [(0.5, 0.9)],
    }
    tuned = Tuned.of({one: [{"goodput_rps": g, "slo_share": s} for g, s in found] for one, found in figures.items()})
    expected = {"always_local": 0.0, "threshold": 1.0, "paper_controlled": 7.0, "length_blind": 0.5, "reverse": 3.0}
    assert tuned.parameters == expected and tuned.static == ("length_blind", 0.5)
    assert tuned.paper == ("paper_controlled", 7.0) and tuned.share == ("threshold", 2.0), "of equal shares the one with more goodput"


def test_the_same_contest_has_the_same_verdict(verdict):
    assert list(TINY.judge([SMOKE["8/sessions"]])) == [verdict]


def test_without_prefixes_the_paper_s_rules_are_one():
    (found,) = dataclasses.replace(TINY, points=1, seeds=1).judge([dataclasses.replace(PAPER["100/paper"], requests=100)])
    assert found.requests == 100
    assert set(CONTENDERS) - set(found.policies) == {"paper_prefix"} and found.vs_best.half_width == math.inf


def test_ahead_is_by_goodput_or_by_latency_and_beyond_chance(verdict):
    def with_(goodput: float, p90: float, goodput_half: float = 0.05, p90_half: float = 0.05) -> bool:
        return dataclasses.replace(verdict, vs_paper=Estimate(goodput, goodput_half), p90_vs_paper=Estimate(p90, p90_half)).ahead

    assert with_(1.1, 1.0) and with_(0.9, 0.75) and not with_(1.09, 0.76)
    assert not with_(1.1, 1.0, goodput_half=0.11) and not with_(0.9, 0.75, p90_half=0.26)
    assert not with_(3.0, 0.1, math.inf, math.inf) and with_(1.1, 0.7, goodput_half=0.2)


def test_behind_is_more_than_a_hundredth_less_than_the_best(verdict):
    less, equal = (dataclasses.replace(verdict, vs_best=Estimate(mean, 0.1)) for mean in (0.98, 0.99))
    assert less.behind and not equal.behind


@pytest.mark.parametrize("field", ["requests", "seeds", "tuning_seeds", "points", "processes", "load"])
def test_a_contest_of_nothing_is_refused(field):
    with pytest.raises(InvalidInput) as error:
        Contest(OPTIONS, **({"requests": 10} | {field: 0}))
    assert error.value.field == f"contest.{field}"


def test_tuning_seeds_end_before_those_of_the_evaluation():
    assert Contest(OPTIONS, requests=10, tuning_seeds=1000).seeds == 5
    with pytest.raises(InvalidInput, match=r"contest.tuning_seeds=1001: expected at most 1000"):
        Contest(OPTIONS, requests=10, tuning_seeds=1001)


# --- a trace -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path):
    """Three times as slow in its first third."""
    path, now = tmp_path / "trace.jsonl", 0
    with path.open("w") as file:
        for i in range(300):
            now += 3000 if i <= 100 else 1000
            row = {"timestamp": now, "input_length": 3000, "output_length": i + 1, "hash_ids": [*range(6 * i, 6 * i + 6)]}
            file.write(json.dumps(row) + "\n")
    config = study.get_config()
    config.trace = str(path)
    return config


def test_a_trace_is_tuned_on_in_its_first_third_and_played_in_the_rest(trace):
    contest = dataclasses.replace(TINY, requests=50, seeds=4, tuning_seeds=2)
    cell = next(cell for cell in study.cells(trace, "full", contest) if cell.name == "8/trace")

    def first_lines(workload, seeds):
        return [next(workload.arrivals(seed)).output_tokens - 1 for seed in seeds]

    assert first_lines(cell.tuning, (1000, 1001)) == [0, 50] and first_lines(cell.workload, range(2000, 2004)) == [100, 150, 200, 250]
    assert all(len(list(cell.workload.arrivals(seed))) == 50 for seed in (2000, 2003))
    assert cell.rate == pytest.approx(1.0, rel=0.02) and cell.mix.mean(cell.mix.output) == pytest.approx(200.5)
    whole = dataclasses.replace(cell.tuning, requests=None, windows=1)
    mix, rate = workload_mix(whole)
    assert rate == pytest.approx(cell.rate, rel=0.03) and cell.tuning_mix.mean(cell.tuning_mix.output) == mix.mean(mix.output) == 50.5


@pytest.mark.skipif(not MOONCAKE.is_file(), reason=f"{MOONCAKE} is not there")
def test_an_outage_begins_and_ends_within_the_runs_of_its_cell():
    """Of a trace they were over before it came: the cell was that without an outage."""
    config = study.get_config()
    config.trace = str(MOONCAKE)
    contest = dataclasses.replace(TINY, requests=3000, seeds=5, tuning_seeds=3)
    for cell in study.cells(config, "full", contest):
        if cell.name in ("outage/sessions", "outage/trace"):
            (plan,) = cell.links.values()
            seconds = cell.requests / (0.9 * plan_cell(cell)[1])
            assert plan.steps[0][0] == pytest.approx(seconds / 4) and plan.steps[1][0] < 0.7 * seconds < 400, cell.name


def test_windows_of_a_trace_never_overlap(trace):
    """They did for longer runs, and 95 % intervals were of fewer arrivals than they claimed."""
    contest = dataclasses.replace(TINY, requests=2000, seeds=3, tuning_seeds=2)
    cell = next(cell for cell in study.cells(trace, "full", contest) if cell.name == "8/trace")
    assert cell.requests == 50
    for workload, seeds in ((cell.workload, range(2000, 2003)), (cell.tuning, (1000, 1001))):
        played = [[row.output_tokens for row in workload.arrivals(seed)] for seed in seeds]
        assert all(len(rows) == 50 for rows in played) and len({x for rows in played for x in rows}) == 50 * len(played)
    paper = next(cell for cell in study.cells(trace, "full", contest) if cell.name == "8/paper")
    assert paper.requests == 2000


def test_a_trace_without_room_for_its_windows_is_refused(trace):
    with pytest.raises(InvalidInput, match=r"config.trace='.*: 300 arrivals': expected at least 50 per seed: 3 in its first third"):
        list(study.cells(trace, "full", dataclasses.replace(TINY, tuning_seeds=3)))


# --- roles -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_p", "more"), [(1, True), (6, False)])
@pytest.mark.parametrize("name", ["wave/paper", "outage/paper"])
def test_ours_with_roles_converts_either_way_while_links_change(name, n_p, more):
    cell = PAPER[name]
    planned, most = plan_cell(cell)
    region = dataclasses.replace(planned.regions[0], prefill=n_p, decode=8 - n_p)
    ground = Ground(dataclasses.replace(planned, regions=(region,)), cell.mix, OPTIONS)
    run = Run(ground, cell.workload.scaled(0.9 * most), ROLES, 0.0, 0, 1200, cell.links)
    simulation, summary = prepare(run)
    simulation.run(1200)
    now = len(simulation.local[0].instances)
    assert simulation.conversions >= 1 and (now > n_p) == more and now + len(simulation.decode[0].instances) == 8
    assert simulation.completed == 1200 and summary.requests == 1140

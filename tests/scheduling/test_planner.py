import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import PAPER, PAPER_MIX, cases, mixes

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling import planner
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.planner import (
    advise,
    best_roles,
    bottleneck,
    case_of,
    equal_cost_instances,
    grid,
    homogeneous,
    length_blind,
    length_blind_ttft,
    naive,
    plan_at,
    roll_out,
    topology_of,
)
from prfaas_jax.scheduling.topology import GBPS, Link, Region


def linked(gbps):
    return dataclasses.replace(PAPER, b_out=gbps * GBPS)


def mix_of(mu=9.9, output=1024):
    return Mix.log_normal(LogNormalLengths(mu=mu), output)


def test_the_papers_grid():
    plan = grid(PAPER, PAPER_MIX)
    assert plan.t == pytest.approx(19_400, abs=100) and (plan.n_p, plan.n_d) == (3, 5)
    assert plan.lambda_max == pytest.approx(3.24, rel=0.01)
    assert (plan.theta_prfaas, plan.theta_pd_p, plan.theta_pd_d) == pytest.approx((1.61, 1.64, 3.91), rel=0.01)
    assert plan.egress_gbps == pytest.approx(13, rel=0.06)


def test_the_papers_baselines():
    other, everything = homogeneous(PAPER, PAPER_MIX, 12), naive(PAPER, PAPER_MIX)
    assert (other.n_p, other.n_d) == (9, 3) and other.lambda_max == pytest.approx(2.11, rel=0.01)
    assert (everything.n_p, everything.n_d, everything.p) == (0, 8, 1.0) and everything.lambda_max == pytest.approx(2.45, rel=0.01)
    assert equal_cost_instances(PAPER) == 16
    assert grid(PAPER, PAPER_MIX).lambda_max / homogeneous(PAPER, PAPER_MIX, 16).lambda_max == pytest.approx(1.15, rel=0.01)
    rate, n_p = length_blind(PAPER, PAPER_MIX)
    assert rate == pytest.approx(3.16, rel=0.01)
    assert length_blind_ttft(PAPER, PAPER_MIX, n_p)[1] == pytest.approx(4.87, rel=0.01)
    exact = [grid(PAPER, PAPER_MIX, "exact").lambda_max, length_blind(PAPER, PAPER_MIX, "exact")[0]]
    assert exact == pytest.approx([3.19, 3.125], rel=0.01)


@pytest.mark.parametrize(("gbps", "expected"), [(12, 3.13), (10, 2.99), (8, 2.63), (5, 2.25), (1, 1.56)])
def test_link_sweep(gbps, expected):
    coarse, fine = grid(linked(gbps), PAPER_MIX, t_step=1000), grid(linked(gbps), PAPER_MIX)
    assert coarse.lambda_max == pytest.approx(expected, rel=0.01)
    assert coarse.lambda_max <= fine.lambda_max <= 1.02 * coarse.lambda_max
    assert fine.egress_gbps <= gbps * (1 + 1e-9)
    # A controller that moves t alone, with the roles of 100 Gbit/s, loses; below 10 Gbit/s a lot.
    stuck = grid(linked(gbps), PAPER_MIX, n_p=3).lambda_max
    assert stuck <= fine.lambda_max and (gbps > 10 or stuck < 0.97 * fine.lambda_max)


@pytest.mark.parametrize(("output", "gain", "t", "n_p"), [(256, 1.53, 29_000, 6), (2048, 1.67, 10_500, 1)])
def test_output_sweep(output, gain, t, n_p):
    mix = mix_of(output=output)
    plan = grid(PAPER, mix, t_step=500)
    assert (plan.t, plan.n_p) == (pytest.approx(t, rel=0.01), n_p)
    assert plan.lambda_max / homogeneous(PAPER, mix, 12).lambda_max == pytest.approx(gain, rel=0.01)


def test_long_answers_degenerate_to_naive_and_short_prompts_equal_it():
    long = mix_of(output=4096)
    plan = grid(PAPER, long)
    assert (plan.t, plan.n_p, plan.lambda_max) == (0.0, 0, naive(PAPER, long).lambda_max)
    short = mix_of(mu=8.5)
    assert short.mean(short.tokens) == pytest.approx(8000, rel=0.01)
    assert grid(PAPER, short).lambda_max == pytest.approx(naive(PAPER, short).lambda_max, rel=0.01)


def test_nothing_is_offloaded_where_the_link_carries_nothing():
    plan = grid(linked(1e-6), PAPER_MIX)
    assert (plan.t, plan.p, plan.egress) == (math.inf, 0.0, 0.0)
    assert plan.lambda_max == pytest.approx(homogeneous(PAPER, PAPER_MIX, 8).lambda_max)


@settings(max_examples=30)
@given(cases(), mixes(), st.sampled_from(["mean", "exact"]))
def test_the_grid_is_the_best_of_all_its_points(case, mix, reading):
    plan = grid(case, mix, reading, t_step=20_000)
    thresholds = np.append(np.arange(0.0, mix.uncached.max() + 20_000, 20_000), math.inf)
    points = [plan_at(case, mix, t, n_p, reading) for t, n_p in itertools.product(thresholds, range(case.n_pd))]
    assert plan.lambda_max == pytest.approx(max(p.lambda_max for p in points))
    best = [p for p in points if p.lambda_max >= plan.lambda_max * (1 - 1e-9)]
    assert plan.p == pytest.approx(min(p.p for p in best), abs=1e-9)  # at a tie the least is sent


def test_a_grid_in_parts_is_the_same_grid(monkeypatch):
    whole = grid(PAPER, PAPER_MIX)
    monkeypatch.setattr(planner, "GRID_ROWS", 3000)
    assert grid(PAPER, PAPER_MIX) == whole


@pytest.mark.parametrize("t_step", [0, -1, math.inf, math.nan, 1e-9])
def test_impossible_steps_are_refused(t_step):
    with pytest.raises(InvalidInput, match="t_step"):
        grid(PAPER, PAPER_MIX, t_step=t_step)


@pytest.mark.parametrize("n_p", [-1, 8])
def test_an_instance_must_be_left_to_decode(n_p):
    for call in (lambda: plan_at(PAPER, PAPER_MIX, 1000, n_p), lambda: grid(PAPER, PAPER_MIX, n_p=n_p)):
        with pytest.raises(InvalidInput, match=f"n_p={n_p}"):
            call()


def test_advice_on_the_paper_case():
    began = time.process_time()
    advice = advise(PAPER, PAPER_MIX)
    assert time.process_time() - began < 2
    assert advice.worth_it and advice.reasons[0].startswith("yes: 1.16x")
    assert advice.plan == grid(PAPER, PAPER_MIX) and advice.best_n_p == 3
    assert advice.best.lambda_max >= grid(PAPER, PAPER_MIX, "exact").lambda_max
    assert advice.needed_gbps == advice.plan.egress_gbps and advice.cost_per_hour == 16
    gains = {gain.what: gain for gain in advice.gains}
    assert gains["Gbps of egress"].requests_per_s == pytest.approx(0, abs=1e-6)
    assert gains["PrfaaS instance"].price == pytest.approx(gains["PrfaaS instance"].requests_per_s, rel=0.02)


@pytest.mark.parametrize(
    ("case", "mix", "binds", "remark"),
    [
        (linked(8), PAPER_MIX, "egress", "the link of 8 Gbit/s costs throughput"),
        (linked(1), PAPER_MIX, "decode", "the link of 1 Gbit/s costs throughput"),
        (PAPER, mix_of(output=4096), "decode", "it degenerates to naive"),
        (PAPER, mix_of(mu=8.5), "decode", "it equals naive"),
        (linked(1e-6), PAPER_MIX, "decode", "the best threshold offloads nothing"),
    ],
)
def test_it_says_no_where_prfaas_does_not_pay(case, mix, binds, remark):
    advice = advise(case, mix)
    assert not advice.worth_it and advice.reasons[0].startswith("no: ")
    assert any(remark in reason for reason in advice.reasons)
    if advice.plan.p:
        assert bottleneck(case, advice.plan, mix) == binds
    else:
        assert advice.phases == ()


def test_the_rate_to_be_served_decides_too():
    for rate, worth, reason in ((2.5, True, "yes: 2.50"), (1.0, False, "no: 1.00"), (3.5, False, "no: 3.50")):
        advice = advise(PAPER, PAPER_MIX, requests_per_s=rate)
        assert advice.worth_it == worth and any(r.startswith(reason) for r in advice.reasons)


def test_fixed_roles():
    advice = advise(PAPER, PAPER_MIX, n_p=6)
    assert (advice.plan.n_p, advice.best_n_p) == (6, 6) and {phase.n_p for phase in advice.phases} == {6}
    assert advice.plan == grid(PAPER, PAPER_MIX, n_p=6) and not advice.worth_it
    assert any("not the best roles" in reason for reason in advice.reasons)


def test_bottlenecks():
    plan = grid(PAPER, PAPER_MIX)
    for t, n_p, binds in ((15_000, 3, "prfaas_compute"), (30_000, 3, "local_prefill"), (40_000, 6, "decode")):
        assert bottleneck(PAPER, plan_at(PAPER, PAPER_MIX, t, n_p), PAPER_MIX) == binds
    tight = dataclasses.replace(PAPER, pd=dataclasses.replace(PAPER.pd, kv_memory_bytes=5e9))
    assert bottleneck(tight, plan_at(tight, PAPER_MIX, plan.t, 3), PAPER_MIX) == "decode_memory"
    assert grid(tight, PAPER_MIX).n_d > plan.n_d  # more instances decode, fewer contexts each


def test_roll_out_ends_at_the_plan_and_every_phase_adds():
    plan = grid(PAPER, PAPER_MIX)
    phases = list(roll_out(PAPER, PAPER_MIX, plan))
    last = phases[-1]
    assert (last.threshold, last.share, last.n_p, last.n_prfaas) == (plan.t, 1.0, plan.n_p, 4)
    assert last.lambda_max == pytest.approx(plan.lambda_max)
    assert last.egress_gbps == pytest.approx(0.7 * plan.egress_gbps)
    assert phases[0].offloaded < 0.01 and phases[0].n_prfaas == 1
    for before, after in itertools.pairwise(phases):
        assert after.offloaded > before.offloaded and after.lambda_max >= before.lambda_max
        assert after.egress_gbps > before.egress_gbps and after.n_prfaas >= before.n_prfaas
        assert after.threshold <= before.threshold


def test_best_roles_of_two_regions():
    """At least twice what each would sustain alone; roles that differ, each region with its kind of request, may do better."""
    half = dataclasses.replace(PAPER, n_prfaas=2, n_pd=4, b_out=50 * GBPS)
    mix = PAPER_MIX.binned(24)
    one, alone = best_roles(topology_of(half, 0), mix)
    far = topology_of(half, 0).prefill[0]
    clusters = tuple(dataclasses.replace(far, name=f"c{i}") for i in range(2))
    regions = tuple(Region(f"r{i}", PAPER.pd, 0, 4) for i in range(2))
    links = tuple(Link(f"c{i}", f"r{i}", half.b_out) for i in range(2))
    both, found = best_roles(dataclasses.replace(one, prefill=clusters, regions=regions, links=links), mix)
    assert found.lambda_max >= 2 * alone.lambda_max * (1 - 1e-9)
    for roles in itertools.product(range(4), repeat=2):
        split = tuple(dataclasses.replace(r, prefill=n, decode=4 - n) for r, n in zip(regions, roles, strict=True))
        assert optimum(dataclasses.replace(both, regions=split), mix).lambda_max <= found.lambda_max * (1 + 1e-6)
    many = tuple(Region(f"r{i}", PAPER.pd, 1, 29) for i in range(2))
    with pytest.raises(InvalidInput, match=r"1\.\.512 combinations"):
        best_roles(dataclasses.replace(one, prefill=(), regions=many, links=()), mix)


def test_a_case_of_a_topology_makes_that_topology():
    far = dataclasses.replace(PAPER, rtt_s=0.06, window_bytes=2.0**26)
    for case in (PAPER, far):
        for n_p in (0, 3):
            topology = topology_of(case, n_p)
            assert case_of(topology) == case and topology_of(case_of(topology), n_p) == topology
    alone = topology_of(dataclasses.replace(PAPER, n_prfaas=0), 3)
    twice = dataclasses.replace(topology, prefill=(*topology.prefill, dataclasses.replace(topology.prefill[0], name="more")))
    for other in (alone, twice):
        with pytest.raises(InvalidInput, match="a topology of one prefill cluster and one region"):
            case_of(other)


def test_there_must_be_something_to_plan():
    with pytest.raises(InvalidInput, match="n_prfaas=0"):
        advise(dataclasses.replace(PAPER, n_prfaas=0), PAPER_MIX)
    with pytest.raises(InvalidInput, match="ends"):
        advise(PAPER, Mix.of(np.array([150_000.0]), 10))

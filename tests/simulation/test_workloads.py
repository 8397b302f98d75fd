import dataclasses
import itertools
import math
import statistics
import tracemalloc
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.simulation.workloads import Arrival, Bursty, GammaArrivals, Poisson, Sessions, Synthetic

PAPER = LogNormalLengths()
SHORT = LogNormalLengths(7.0, 0.7, 16, 8192)
SESSIONS = Sessions(Poisson(20.0), SHORT, LogNormalLengths(5.5, 0.8, 8, 4096), output_tokens=200, mean_turns=5.0, think_s=10.0)


def first(iterator, n):
    return list(itertools.islice(iterator, n))


def gaps(process, n=200_000, seed=0):
    return np.diff(first(process.times(np.random.default_rng(seed)), n), prepend=0.0)


@pytest.mark.parametrize(
    ("process", "cv"),
    [(Poisson(4.0), 1.0), (GammaArrivals(4.0, 0.25), 0.25), (GammaArrivals(4.0, 1.0), 1.0), (GammaArrivals(4.0, 3.0), 3.0)],
)
def test_gaps_have_their_mean_and_variation(process, cv):
    seen = gaps(process)
    assert seen.min() >= 0
    assert seen.mean() == pytest.approx(0.25, rel=5 * cv / math.sqrt(len(seen)))
    assert seen.std() / seen.mean() == pytest.approx(cv, rel=0.03)


@given(
    rate=st.floats(1e-3, 1e3),
    factor=st.floats(1, 100),
    burst_s=st.floats(1e-2, 1e3),
    quiet_s=st.floats(1e-2, 1e3),
)
def test_the_two_rates_of_bursts_average_to_the_rate(rate, factor, burst_s, quiet_s):
    bursty = Bursty(rate, factor, burst_s, quiet_s)
    assert bursty.burst_rate == pytest.approx(factor * bursty.quiet_rate)
    mean = (bursty.burst_rate * burst_s + bursty.quiet_rate * quiet_s) / (burst_s + quiet_s)
    assert mean == pytest.approx(rate)


def test_bursts_keep_the_mean_and_vary_more_than_poisson():
    bursty = Bursty(10.0, burst_factor=8.0, burst_s=2.0, quiet_s=6.0)
    times = np.array(first(bursty.times(np.random.default_rng(1)), 200_000))
    assert np.all(np.diff(times) >= 0)
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.03)
    per_second = np.bincount(times.astype(int))
    assert per_second.var() / per_second.mean() > 4
    # A second inside a burst, a second outside.
    assert np.quantile(per_second, 0.95) > 0.8 * bursty.burst_rate and np.quantile(per_second, 0.25) < 1.5 * bursty.quiet_rate


def test_bursts_begin_in_their_long_run_state():
    bursty = Bursty(10.0, burst_factor=20.0, burst_s=1.0, quiet_s=4.0)
    rng = np.random.default_rng(2)
    counts = [sum(1 for _ in itertools.takewhile(lambda t: t < 0.5, bursty.times(rng))) for _ in range(4000)]
    assert statistics.fmean(counts) == pytest.approx(5.0, rel=0.1)


def test_a_burst_factor_of_one_is_poisson():
    seen = gaps(Bursty(4.0, 1.0, burst_s=3.0, quiet_s=5.0), 50_000)
    assert seen.mean() == pytest.approx(0.25, rel=0.03) and seen.std() / seen.mean() == pytest.approx(1, rel=0.03)


def test_a_long_dwell_is_drawn_in_pieces():
    tracemalloc.start()
    first(Bursty(1e6, 2.0, burst_s=1e4, quiet_s=1e4).times(np.random.default_rng(0)), 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_synthetic_requests_have_the_lengths_of_the_distribution():
    rows = list(Synthetic(Poisson(3.0), PAPER, 1024, requests=50_000).arrivals(0))
    tokens = np.array([row.tokens for row in rows])
    assert len(rows) == 50_000 and all(isinstance(row, Arrival) and type(row.tokens) is int for row in rows[:10])
    assert tokens.min() >= PAPER.low and tokens.max() <= PAPER.high
    wanted = PAPER.quantiles(np.array([0.1, 0.5, 0.9, 0.99]))
    assert np.quantile(tokens, [0.1, 0.5, 0.9, 0.99]) == pytest.approx(wanted, rel=0.04)
    assert {row.output_tokens for row in rows} == {1024}
    assert {row.blocks for row in rows} == {()} and {row.session for row in rows} == {-1}
    assert len(rows) / rows[-1].time_s == pytest.approx(3.0, rel=0.03)
    times = [row.time_s for row in rows]
    assert times == sorted(times)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_output_lengths_vary_around_their_mean(sigma):
    rows = Synthetic(Poisson(1.0), PAPER, 1000, requests=50_000, output_sigma=sigma).arrivals(0)
    outputs = np.array([row.output_tokens for row in rows])
    assert outputs.mean() == pytest.approx(1000, rel=0.03)
    assert np.log(outputs).std() == pytest.approx(sigma, rel=0.03)


def test_output_lengths_are_at_least_one_token():
    assert min(row.output_tokens for row in Synthetic(Poisson(1.0), PAPER, 1, requests=5000, output_sigma=2.0).arrivals(0)) == 1


@pytest.mark.parametrize(
    "workload",
    [
        Synthetic(Poisson(3.0), PAPER, 512, output_sigma=0.5),
        Synthetic(GammaArrivals(3.0, 2.0), PAPER, 512),
        Synthetic(Bursty(3.0, 5.0, 1.0, 3.0), PAPER, 512),
        dataclasses.replace(SESSIONS, system_share=0.5, output_sigma=0.4, think_sigma=1.0),
        dataclasses.replace(SESSIONS, lead_s=50.0),
    ],
)
def test_one_seed_gives_one_workload(workload):
    a = first(workload.arrivals(7), 3000)
    assert a == first(workload.arrivals(7), 3000)
    assert a != first(workload.arrivals(8), 3000)
    assert a[:100] == list(dataclasses.replace(workload, requests=100).arrivals(7))
    assert all(x.time_s <= y.time_s for x, y in itertools.pairwise(a))


@pytest.mark.parametrize("process", [Poisson(3.0), GammaArrivals(3.0, 2.0)])
def test_scaling_a_synthetic_workload_only_moves_its_times(process):
    workload = Synthetic(process, PAPER, 512, requests=1000)
    for slow, fast in zip(workload.arrivals(1), workload.scaled(4.0).arrivals(1), strict=True):
        assert slow[1:] == fast[1:] and fast.time_s == pytest.approx(slow.time_s / 4)


def test_scaling_bursts_keeps_their_dwell_times():
    assert Synthetic(Bursty(3.0, 5.0, 1.0, 2.0), PAPER, 512).scaled(2.0).process == Bursty(6.0, 5.0, 1.0, 2.0)


@pytest.mark.parametrize(("max_tokens", "factor"), [(131_072, 1.0), (8192, 3.0)])
def test_the_rate_of_sessions_is_one_of_requests(max_tokens, factor):
    lengths = dataclasses.replace(SHORT, high=7000)
    workload = dataclasses.replace(SESSIONS, first=lengths, max_tokens=max_tokens, system_share=0.3, system_tokens=1000, output_sigma=0.7)
    times = np.array([row.time_s for row in first(workload.scaled(factor).arrivals(0), 60_000)])
    settled = times[times > 300]
    assert (len(settled) - 1) / (settled[-1] - settled[0]) == pytest.approx(20.0 * factor, rel=0.035)


def by_session(rows):
    sessions = defaultdict(list)
    for row in rows:
        sessions[row.session].append(row)
    return sessions


def test_turns_are_geometric_unless_the_prompt_gets_too_long():
    assert dataclasses.replace(SESSIONS, max_tokens=10**9).requests_per_session == pytest.approx(5.0, rel=1e-5)
    assert dataclasses.replace(SESSIONS, mean_turns=1.0).requests_per_session == 1
    assert 1 < dataclasses.replace(SESSIONS, max_tokens=8192).requests_per_session < 4.9
    rows = first(dataclasses.replace(SESSIONS, max_tokens=10**9).arrivals(0), 60_000)
    # Sessions that began long before the end have ended.
    counts = [len(turns) for turns in by_session(rows).values() if turns[0].time_s < rows[-1].time_s - 600]
    assert statistics.fmean(counts) == pytest.approx(5.0, rel=0.05)
    assert statistics.stdev(counts) == pytest.approx(math.sqrt(20), rel=0.08)


def test_with_a_lead_a_run_begins_at_its_long_run_rate():
    def minutes(workload, minutes=2, seeds=12):
        """Requests/s in the first minutes, per seed."""
        until = 60.0 * minutes
        return [sum(1 for _ in itertools.takewhile(lambda row: row.time_s < until, workload.arrivals(s))) / until for s in range(seeds)]

    settled, empty = (minutes(dataclasses.replace(SESSIONS, lead_s=lead_s)) for lead_s in (600.0, 0.0))
    error = statistics.stdev(settled) / math.sqrt(len(settled))
    assert abs(statistics.fmean(settled) - 20.0) < 3 * error and error < 0.6
    assert statistics.fmean(empty) < 13.0


def test_a_lead_drops_what_comes_before_the_run_and_goes_on_with_what_is_open():
    led = dataclasses.replace(SESSIONS, lead_s=100.0, requests=2000)
    rows, whole = list(led.arrivals(5)), first(SESSIONS.arrivals(5), 8000)
    before = sum(row.time_s < 100 for row in whole)
    assert before > 1000 and len(rows) == 2000, "`requests` counts after the lead"
    for a, b in zip(rows, whole[before:], strict=False):
        assert a[1:] == b[1:] and a.time_s == pytest.approx(b.time_s - 100) and a.time_s >= 0
    open_then = {row.session for row in whole[:before]} & {row.session for row in rows}
    assert len(open_then) > 50
    assert led.scaled(2.0).lead_s == 100.0 and led.requests_per_session == SESSIONS.requests_per_session


def test_what_is_held_is_the_last_prompt_of_every_session_before_the_run():
    led = dataclasses.replace(SESSIONS, lead_s=100.0)
    before = [row for row in first(SESSIONS.arrivals(5), 8000) if row.time_s < 100]
    held = list(led.held(5))
    assert {row.session: row for row in held} == {row.session: row for row in before} and len(held) == len(by_session(before))
    assert all(a.time_s <= b.time_s for a, b in itertools.pairwise(held))
    assert not list(SESSIONS.held(5))


def test_sessions_without_a_second_turn_are_independent_requests():
    rows = first(dataclasses.replace(SESSIONS, mean_turns=1.0).arrivals(0), 2000)
    assert [row.session for row in rows] == list(range(2000))
    assert len({block for row in rows for block in row.blocks}) == sum(len(row.blocks) for row in rows)


@pytest.mark.parametrize(("sigma", "cv"), [(None, 1.0), (0.5, math.sqrt(math.exp(0.25) - 1))])
def test_a_turn_comes_after_the_answer_and_a_think_time(sigma, cv):
    workload = dataclasses.replace(SESSIONS, think_sigma=sigma, output_sigma=0.6, max_tokens=10**6, mean_turns=3.0)
    rows = first(workload.arrivals(0), 40_000)
    thinks = [
        after.time_s - before.time_s - before.output_tokens * workload.output_token_s
        for turns in by_session(rows).values()
        if turns[0].time_s < rows[-1].time_s - 600
        for before, after in itertools.pairwise(turns)
    ]
    assert min(thinks) > -1e-9
    assert statistics.fmean(thinks) == pytest.approx(10, rel=0.04)
    assert statistics.stdev(thinks) / 10 == pytest.approx(cv, rel=0.06)


@st.composite
def sessions(draw):
    lengths = LogNormalLengths(draw(st.floats(4, 9)), draw(st.floats(0.3, 1.5)), 1, 20_000)
    system_tokens = draw(st.integers(1, 3000))
    return Sessions(
        process=draw(st.sampled_from([Poisson(5.0), GammaArrivals(5.0, 2.0), Bursty(5.0, 4.0, 1.0, 2.0)])),
        first=lengths,
        added=LogNormalLengths(draw(st.floats(1, 7)), 0.8, 1, 5000),
        output_tokens=draw(st.integers(1, 600)),
        mean_turns=draw(st.floats(1, 12)),
        think_s=draw(st.floats(0, 20)),
        output_sigma=draw(st.sampled_from([0.0, 0.8])),
        max_tokens=20_000 + system_tokens + draw(st.integers(0, 5000)),
        system_share=draw(st.sampled_from([0.0, 0.4, 1.0])),
        system_prompts=draw(st.integers(1, 3)),
        system_tokens=system_tokens,
        block_tokens=draw(st.sampled_from([1024, 512, 100, 16])),
        requests=200,
    )


def shared_blocks(a, b):
    """Leading blocks that two arrivals have in common; nothing after them may be."""
    n = next((i for i, (x, y) in enumerate(zip(a.blocks, b.blocks, strict=False)) if x != y), min(len(a.blocks), len(b.blocks)))
    assert not set(a.blocks[n:]) & set(b.blocks[n:])
    return n


@settings(max_examples=30)
@given(sessions(), st.integers(0, 2**32))
def test_sessions_grow_and_share_exactly_their_full_blocks(workload, seed):
    rows = list(workload.arrivals(seed))
    assert len(rows) == 200
    assert all(before.time_s <= after.time_s for before, after in itertools.pairwise(rows))
    size = workload.block_tokens
    for row in rows:
        assert 1 <= row.tokens <= workload.max_tokens and row.output_tokens >= 1
        assert len(row.blocks) == len(set(row.blocks)) == -(-row.tokens // size)
    opened = by_session(rows)
    assert list(opened) == list(range(len(opened))), "sessions are numbered in the order in which they begin"
    for turns in opened.values():
        for before, after in itertools.pairwise(turns):
            added = after.tokens - before.tokens - before.output_tokens
            assert workload.added.low <= added <= workload.added.high
        for before, after in itertools.combinations(turns[:5], 2):
            assert shared_blocks(before, after) == before.tokens // size
    system_blocks = workload.system_tokens // size
    starts = [turns[0] for turns in opened.values()][:15]
    for a, b in itertools.combinations(starts, 2):
        assert shared_blocks(a, b) in ((0,) if workload.system_share == 0 else (0, system_blocks))
    # An id stands for one prefix: always at the same place, after the same id.
    before_id = {}
    for row in rows:
        for place, (previous, block) in enumerate(itertools.pairwise((None, *row.blocks))):
            assert before_id.setdefault(block, (place, previous)) == (place, previous)


def test_a_share_of_sessions_begins_with_a_common_prompt():
    workload = dataclasses.replace(SESSIONS, mean_turns=1.0, system_share=0.6, system_prompts=4, system_tokens=1300)
    plain = dataclasses.replace(workload, system_share=0.0)
    rows = first(workload.arrivals(3), 20_000)
    seen = defaultdict(int)
    for row, bare in zip(rows, first(plain.arrivals(3), 20_000), strict=True):
        if row.tokens != bare.tokens:
            assert row.tokens == bare.tokens + 1300
            seen[row.blocks[:2]] += 1
    assert len(seen) == 4
    assert sum(seen.values()) / len(rows) == pytest.approx(0.6, rel=0.03)
    assert max(seen.values()) / min(seen.values()) < 1.15


@pytest.mark.parametrize("lead_s", [0.0, 300.0])
def test_memory_is_what_is_live(lead_s):
    workload = dataclasses.replace(SESSIONS, system_share=0.5, max_tokens=16_384, lead_s=lead_s)
    assert workload.requests_per_session > 1, "computed before memory is measured"
    stream = workload.arrivals(0)
    tracemalloc.start()

    def most(n):
        tracemalloc.reset_peak()
        for _ in itertools.islice(stream, n):
            pass
        return tracemalloc.get_traced_memory()[1]

    early, late = most(8000), most(12_000)
    tracemalloc.stop()
    assert late < 1.3 * early


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Poisson(0.0), "arrivals.rate"),
        (lambda: Poisson(-1.0), "arrivals.rate"),
        (lambda: Poisson(math.nan), "arrivals.rate"),
        (lambda: GammaArrivals(1.0, 0.0), "arrivals.cv"),
        (lambda: GammaArrivals(math.inf, 1.0), "arrivals.rate"),
        (lambda: Bursty(1.0, 0.5, 1.0, 1.0), "arrivals.burst_factor"),
        (lambda: Bursty(1.0, 2.0, 0.0, 1.0), "arrivals.burst_s"),
        (lambda: Bursty(1.0, 2.0, 1.0, -1.0), "arrivals.quiet_s"),
        (lambda: Synthetic(Poisson(1.0), PAPER, 0), "output_tokens"),
        (lambda: Synthetic(Poisson(1.0), PAPER, 1.5), "output_tokens"),
        (lambda: Synthetic(Poisson(1.0), PAPER, 1, requests=0), "requests"),
        (lambda: Synthetic(Poisson(1.0), PAPER, 1, output_sigma=-0.1), "output_sigma"),
        (lambda: Synthetic(Poisson(1.0), PAPER, 1).scaled(0.0), "scaled.factor"),
        (lambda: Synthetic(Poisson(1.0), PAPER, 1).arrivals(-1), "seed"),
        (lambda: SESSIONS.arrivals(-1), "seed"),
        (lambda: SESSIONS.scaled(math.inf), "scaled.factor"),
        (lambda: dataclasses.replace(SESSIONS, mean_turns=0.9), "sessions.mean_turns"),
        (lambda: dataclasses.replace(SESSIONS, mean_turns=math.inf), "sessions.mean_turns"),
        (lambda: dataclasses.replace(SESSIONS, think_s=-1.0), "sessions.think_s"),
        (lambda: dataclasses.replace(SESSIONS, think_sigma=0.0), "sessions.think_sigma"),
        (lambda: dataclasses.replace(SESSIONS, output_token_s=math.nan), "sessions.output_token_s"),
        (lambda: dataclasses.replace(SESSIONS, lead_s=-1.0), "sessions.lead_s"),
        (lambda: dataclasses.replace(SESSIONS, lead_s=math.inf), "sessions.lead_s"),
        (lambda: dataclasses.replace(SESSIONS, system_share=1.1), "sessions.system_share"),
        (lambda: dataclasses.replace(SESSIONS, system_prompts=0), "sessions.system_prompts"),
        (lambda: dataclasses.replace(SESSIONS, block_tokens=0), "sessions.block_tokens"),
        (lambda: dataclasses.replace(SESSIONS, max_tokens=8191), "sessions.max_tokens"),
        (lambda: dataclasses.replace(SESSIONS, max_tokens=8192, system_share=0.1), "sessions.max_tokens"),
        (lambda: dataclasses.replace(SESSIONS, requests=-3), "requests"),
        (lambda: dataclasses.replace(SESSIONS, output_tokens=0), "output_tokens"),
    ],
)
def test_bad_parameters_are_refused_before_any_work(make, field):
    with pytest.raises(InvalidInput) as caught:
        make()
    assert caught.value.field == field

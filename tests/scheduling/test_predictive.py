import dataclasses
import itertools
import math

import numpy as np
import pytest
from systems import CHUNK, FAST, FOUR, KV, ONE, SLOW, TABLE, idle_view

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.path_kernels import copy_of
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft, Prices, ShadowPrice
from prfaas_jax.scheduling.prices import after_copies
from prfaas_jax.scheduling.profiles import prefill_s
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Request

# --- least_ttft --------------------------------------------------------------------------------------------------------------------


def random_view(rng: np.random.Generator, topology: Topology = FOUR) -> ClusterView:
    view = idle_view(topology)
    for servers in (view.prefill, view.decode):
        n = len(servers.names)
        servers.healthy[:] = rng.random(n) < 0.8
        servers.load.jobs[:], servers.load.fresh[:] = rng.integers(0, 4, n), rng.integers(0, 2, n)
        servers.load.free_at_s[:] = rng.random(n) * 20
        servers.load.drained_at_s[:] = servers.load.free_at_s + rng.random(n)
    view.links.bytes_per_s[:] *= rng.random(view.links.bytes_per_s.shape) < 0.8
    view.links.pending[:] = rng.integers(0, 3, view.links.pending.shape)
    view.links.pending_bytes[:] = view.links.pending * 1e9
    return view


def test_least_ttft_takes_the_fastest_path_and_says_so():
    rng, policy = np.random.default_rng(1), LeastTtft(Predictor(FOUR, CHUNK))
    seen = set()
    for _ in range(300):
        view, request = random_view(rng), Request(int(10 ** rng.uniform(2, 5)), 9)
        paths = policy.predictor.paths(request, view, 5.0)
        least = paths.ttft_s.min()
        if least == math.inf:
            with pytest.raises(NoDecodeServer, match="no open path to any of 2 decode servers"):
                policy.place(request, view, 5.0)
            continue
        got = policy.place(request, view, 5.0)
        row = 0 if got.prefill is None else 1 + view.prefill.names.index(got.prefill)
        assert paths.ttft_s[row, view.decode.names.index(got.decode)] == least
        assert got.reason.startswith(f"least_ttft: predicted {least:.2f} s {'locally' if row == 0 else f'on {got.prefill}'}")
        seen.add((got.prefill, got.decode))
    assert seen == {(p, d) for p, d in itertools.product((None, "p", "q"), "de") if (p, d) != ("q", "d")}


def twins() -> Topology:
    """Local and remote take the same to the bit."""
    instance = dataclasses.replace(SLOW, name="twin")
    return Topology(KV, (PrefillCluster("p", instance, 1),), (Region("d", instance, 1, 1, 10 * GBPS),), (Link("p", "d", 10 * GBPS),))


@pytest.mark.parametrize(
    "make", [LeastTtft, lambda p: ShadowPrice(p, Prices({}, {})), lambda p: ShadowPrice(p, Prices({"p": 1.0, "d": 1.0}, {}))]
)
def test_ties_stay_local(make):
    policy = make(Predictor(twins(), CHUNK))
    view = idle_view(twins())
    assert policy.place(Request(20_000, 9), view, 0.0).prefill is None
    for servers in (view.prefill, view.decode):
        servers.load.drained_at_s[:] = 9.0
    assert policy.place(Request(20_000, 9), view, 0.0).prefill is None


@pytest.mark.parametrize("make", [LeastTtft, lambda p: ShadowPrice(p, Prices({}, {}))])
def test_without_any_decode_server_or_any_prefill_cluster(make):
    alone = Topology(KV, (), (Region("d", SLOW, 1, 1),), ())
    got = make(Predictor(alone, CHUNK)).place(Request(1000, 9), idle_view(alone), 0.0)
    assert (got.prefill, got.decode) == (None, "d") and "s locally" in got.reason
    view = idle_view(ONE)
    none = ClusterView(view.prefill, type(view.decode).of([]))
    empty = dataclasses.replace(none, decode=dataclasses.replace(none.decode, load=type(view.decode.load).idle(0)))
    links = type(view.links)(*(np.zeros((1, 0)) for _ in range(5)))
    with pytest.raises(NoDecodeServer, match="0 decode servers"):
        make(Predictor(ONE, CHUNK)).place(Request(1000, 9), dataclasses.replace(empty, links=links), 0.0)


# --- shadow_price ------------------------------------------------------------------------------------------------------------------

# A second of the far cluster is worth little, and four of the near one's.
CHEAP_FAR = Prices({"p": 0.1, "d": 0.4}, {})
CHEAP_NEAR = Prices({"p": 4.0, "d": 0.1}, {})


def shadow(prices: Prices, **options) -> ShadowPrice:
    return ShadowPrice(Predictor(ONE, CHUNK), prices, **options)


def busy_view(near_s: float = 0.0, far_s: float = 0.0, jobs: int = 0) -> ClusterView:
    view = idle_view(ONE)
    for servers, seconds in ((view.decode, near_s), (view.prefill, far_s)):
        servers.load.drained_at_s[:] = servers.load.free_at_s[:] = seconds
        servers.load.jobs[:] = jobs * (seconds > 0)
    return view


def test_idle_it_takes_the_fastest_and_busy_the_cheapest_that_keeps_the_slo():
    for prices, cheap in ((CHEAP_FAR, "p"), (CHEAP_NEAR, None)):
        for tokens, fast in ((300, None), (5000, "p")):
            policy, request = shadow(prices, queue_price=0.0), Request(tokens, 9)
            assert LeastTtft(policy.predictor).place(request, busy_view(), 0.0).prefill == fast
            assert policy.place(request, busy_view(), 0.0).prefill == fast, "nobody waits"
            assert policy.place(request, busy_view(2.0, 2.0), 0.0).prefill == cheap, "somebody does, though not before this one"


def test_half_busy_is_in_between():
    policy, request = shadow(CHEAP_NEAR, queue_price=0.0), Request(5000, 9)
    taken = [policy.place(request, busy_view(x, x), 0.0).prefill for x in (0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0)]
    assert taken == sorted(taken, key=lambda name: name is None) and taken[0] == "p" and taken[-1] is None


def test_a_link_that_is_full_makes_the_system_busy_and_one_that_is_down_does_not():
    policy, request = shadow(CHEAP_NEAR), Request(5000, 9)
    view = idle_view(ONE)
    view.links.pending[:], view.links.pending_bytes[:] = 1, 100 * GBPS
    assert policy.place(request, view, 0.0).prefill is None
    pair = dataclasses.replace(FOUR, links=FOUR.links[1:])
    view = idle_view(pair)
    view.links.pending_bytes[0, 0] = 1e15
    prices = Prices({"p": 9.0, "q": 9.0, "d": 0.0, "e": 0.0}, {})
    assert ShadowPrice(Predictor(pair, CHUNK), prices).place(Request(60_000, 9), view, 0.0).prefill == "p"


def test_the_cheap_path_is_not_taken_where_it_would_be_late():
    policy, request = shadow(CHEAP_NEAR), Request(60_000, 9)
    slo = 3 * prefill_s(FAST.prefill, 60_000) + 0.5
    late = busy_view(near_s=slo, far_s=2.0, jobs=50)
    paths = policy.predictor.paths(request, late, 0.0)
    assert paths.local_ttft_s[0] > 0.9 * slo > paths.remote_ttft_s[0, 0]
    assert policy.place(request, late, 0.0).prefill == "p"
    lenient = dataclasses.replace(policy, slo_scale=100.0)
    assert lenient.place(request, late, 0.0).prefill is None
    assert dataclasses.replace(lenient, margin=1e-3).place(request, late, 0.0).prefill is None, "both are late, so price decides"


def test_a_queue_has_a_price():
    """Prices say that the far cluster is cheaper; with enough work waiting there it is not, SLO or no SLO."""
    request, view = Request(5000, 9), busy_view(near_s=1.0, far_s=300.0)
    assert shadow(CHEAP_FAR, queue_price=0.0).place(request, view, 0.0).prefill == "p"
    assert shadow(CHEAP_FAR, queue_price=0.1).place(request, view, 0.0).prefill is None


def test_late_requests_gather_on_the_cluster_where_others_wait():
    """Unless the work there would cost much more; an infinite gather_s knows no difference."""
    request, view = Request(5000, 9), busy_view(near_s=90.0, far_s=90.0, jobs=80)
    for servers in (view.prefill, view.decode):
        servers.load.fresh[:] = 80
    dear = Prices({"p": 2.0, "d": 0.4}, {})
    for gather_s, taken in ((math.inf, None), (60.0, "p"), (1e-3, "p")):
        policy = shadow(dear, queue_price=0.0, gather_s=gather_s)
        assert policy.predictor.paths(request, view, 0.0).ttft_s.min() > 3 * prefill_s(FAST.prefill, 5000) + 0.5
        assert policy.place(request, view, 0.0).prefill == taken
    view.prefill.healthy[:] = False
    for busy_s in (0.3, 1e3):
        assert shadow(dear, gather_s=1e-3, busy_s=busy_s).place(request, view, 0.0).prefill is None, "but not where nothing is open"


def test_late_requests_gather_in_a_region_that_is_further_behind_than_every_cluster_and_link():
    """After an outage they followed the prices to the cluster, until everybody was late on both sides."""
    request, view = Request(5000, 9), busy_view(near_s=200.0, far_s=60.0, jobs=80)
    for servers in (view.prefill, view.decode):
        servers.load.fresh[:] = 80
    policy = shadow(CHEAP_FAR, queue_price=0.0, gather_s=1.0)
    assert policy.predictor.paths(request, view, 0.0).ttft_s.min() > 3 * prefill_s(FAST.prefill, 5000) + 0.5
    assert policy.place(request, view, 0.0).prefill is None
    view.links.pending[:], view.links.pending_bytes[:] = 9, 150.0 * view.links.bytes_per_s
    assert policy.place(request, view, 0.0).prefill == "p", "what waits for the link counts as the cluster's"


def test_late_requests_spread_over_regions_that_no_cluster_can_reach():
    """They went to the one that was furthest behind."""
    view = idle_view(FOUR)
    view.links.bytes_per_s[:] = 0.0
    for column in (view.decode.load.free_at_s, view.decode.load.drained_at_s):
        column[:] = 20.0, 200.0
    view.decode.load.jobs[:] = view.decode.load.fresh[:] = 80
    policy = ShadowPrice(Predictor(FOUR, CHUNK), Prices({"d": 0.1, "e": 1.0}, {}), gather_s=10.0, busy_s=50.0)
    assert policy.place(Request(1000, 9), view, 0.0).decode == "d"


def test_links_have_prices():
    request, view = Request(5000, 9), busy_view(2.0, 2.0)
    byte = 0.4 * prefill_s(SLOW.prefill, 5000) / KV.bytes(5000)
    for factor, taken in ((0.5, "p"), (1.2, None)):
        prices = dataclasses.replace(CHEAP_FAR, links={("p", "d"): factor * byte})
        assert shadow(prices, queue_price=0.0).place(request, view, 0.0).prefill == taken
    cached = dataclasses.replace(request, cached_decode=4500)
    assert shadow(CHEAP_FAR).place(cached, view, 0.0).prefill == "p"


@pytest.mark.parametrize("kind", [int, np.float32])
def test_prices_may_be_of_any_kind(kind):
    prices = Prices({"p": kind(1), "d": kind(2)}, {("p", "d"): kind(1)})
    assert shadow(prices).place(Request(5000, 9), idle_view(ONE), 0.0).decode == "d"


def test_new_prices_count_at_once():
    request, view, policy = Request(5000, 9), busy_view(2.0, 2.0), shadow(CHEAP_FAR)
    assert policy.place(request, view, 0.0).prefill == "p"
    assert dataclasses.replace(policy, prices=CHEAP_NEAR).place(request, view, 0.0).prefill is None


def test_a_placement_names_an_open_path_whatever_is_busy_late_or_down():
    rng, predictor = np.random.default_rng(2), Predictor(FOUR, CHUNK)
    placed = refused = 0
    for i in range(400):
        view, request = random_view(rng), Request(int(10 ** rng.uniform(1, 5)), 9, *(rng.integers(0, 10, 2) for _ in range(2)))
        prices = Prices({name: rng.random() for name in "pqde"}, {("p", "d"): 1e-9 * rng.random()} if i % 2 else {})
        policy, now = ShadowPrice(predictor, prices, busy_s=float(rng.choice([0.5, 50.0]))), float(rng.choice([0.0, 19.5, 100.0]))
        paths = predictor.paths(request, view, now)
        if np.isinf(paths.ttft_s).all():
            with pytest.raises(NoDecodeServer):
                policy.place(request, view, now)
            refused += 1
            continue
        got = policy.place(request, view, now)
        assert got == policy.place(request, view, now)
        row = 0 if got.prefill is None else 1 + view.prefill.names.index(got.prefill)
        ttft = paths.ttft_s[row, view.decode.names.index(got.decode)]
        slo = 3 * paths.work_s.min() + 0.5
        assert ttft < math.inf and (ttft <= 0.9 * slo or paths.ttft_s.min() > 0.9 * slo)
        placed += 1
    assert placed > 300 and refused > 5


BAD = [("busy_s", 0.0), ("margin", 0.0), ("slo_scale", -1.0), ("slo_base_s", -0.1), ("queue_price", math.nan), ("gather_s", 0.0)]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_constants_are_refused(field, value):
    with pytest.raises(InvalidInput) as error:
        shadow(CHEAP_FAR, **{field: value})
    assert error.value.field == f"shadow_price.{field}"


# --- prefixes that are copied --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [LeastTtft, lambda p: ShadowPrice(p, Prices({"p": 1.0, "d": 1.0}, {}))])
def test_a_prefix_is_copied_where_that_is_faster_than_computing_it(make):
    """The region holds the prefix; the prefill cluster is far faster at the rest."""
    view = idle_view(ONE)
    got = make(Predictor(ONE, CHUNK)).place(Request(90_000, 9, 0, 40_960), view, 0.0)
    assert (got.prefill, got.copied_tokens) == ("p", 40_960) and got.reason.endswith("40960 tokens copied")
    view.links.bytes_per_s[:] = view.links.transfer_bytes_per_s[:] = 0.5 * GBPS
    slow = make(Predictor(ONE, CHUNK)).place(Request(90_000, 9, 0, 40_960), view, 0.0)
    assert slow.copied_tokens == 0, "the link is too slow for that"
    assert make(Predictor(ONE, CHUNK)).place(Request(90_000, 9, 0, 0), idle_view(ONE), 0.0).copied_tokens == 0


@pytest.mark.parametrize("make", [LeastTtft, lambda p: ShadowPrice(p, Prices({}, {}))])
@pytest.mark.parametrize("held", [5000, np.array([5000])])
def test_a_prefix_without_any_prefill_cluster_is_not_copied(make, held):
    alone = Topology(KV, (), (Region("d", SLOW, 1, 1),), ())
    got = make(Predictor(alone, CHUNK)).place(Request(9000, 9, 0, held), idle_view(alone), 0.0)
    assert (got.prefill, got.decode, got.copied_tokens) == (None, "d", 0)


def test_a_copy_towards_the_region_has_the_price_of_its_link():
    """The prefill cluster holds the prefix and is busy; the region computes the rest, if the copy costs less than it saves."""
    view = idle_view(ONE)
    view.prefill.load.drained_at_s[:] = view.prefill.load.free_at_s[:] = 600.0
    view.prefill.load.jobs[:] = 9
    request = Request(30_000, 9, 24_576, 0)
    free = shadow(Prices({"p": 1.0, "d": 1.0}, {})).place(request, view, 0.0)
    assert (free.prefill, free.copied_tokens) == (None, 24_576)
    dear = Prices({"p": 1.0, "d": 1.0}, {("p", "d"): 10 / KV.bytes(24_576)})
    assert shadow(dear).place(request, view, 0.0).copied_tokens == 0


def test_every_path_copies_what_its_other_side_holds_if_that_gains_time():
    far, near = np.array([0, 12_000]), np.array([20_000, 4096])
    request, predictor = Request(30_000, 9, far, near), Predictor(FOUR, CHUNK)
    asked, ttft = (see(request, idle_view(FOUR), 0.0) for see in (predictor.asked, predictor.paths))

    def copy(time, own, other, rate, delay_s):
        saved = time.growth(other) - time.growth(own)
        return other - own, saved, saved - KV.bytes(other, own) / rate - delay_s

    # Paths are d, e, then p to d, p to e, q to d, q to e; q, which holds most, has no link to d.
    expected = {
        1: copy(TABLE.prefill, 4096, 12_000, 80 * GBPS, 0.0),
        2: copy(FAST.prefill, 0, 20_000, 40 * GBPS, 0.01),
        3: copy(FAST.prefill, 0, 4096, 10 * GBPS, 0.05),
    }
    assert expected.pop(3)[2] < 0, "slower than to compute it"
    for path in range(6):
        got = copy_of(asked, ttft.ttft_s, path)
        assert got[:3] == pytest.approx(expected.get(path, (0, 0.0, 0.0)))
        assert got[3:] == {1: (KV.bytes(12_000, 4096), 1)}.get(path, (0.0, 0))


def test_prices_count_on_prefixes_that_can_be_copied():
    mix = Mix.of(np.array([30_000, 50_000]), 9, cached_pd=np.array([20_000, 0]), cached_prfaas=np.array([0, 40_000]))
    both = after_copies(ONE, mix)
    order = np.argsort(both.tokens)
    assert both.cached_pd[order].tolist() == both.cached_prfaas[order].tolist() == [20_000, 40_000]
    slow = dataclasses.replace(ONE, links=(dataclasses.replace(ONE.links[0], bytes_per_s=0.1 * GBPS),))
    order = np.argsort(after_copies(slow, mix).tokens)
    assert after_copies(slow, mix).cached_pd[order].tolist() == [20_000, 0]
    assert after_copies(dataclasses.replace(ONE, links=()), mix) is mix

import dataclasses
import itertools
import math

import numpy as np
import pytest
from systems import idle_view

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft, Prices, ShadowPrice
from prfaas_jax.scheduling.prices import after_copies
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill, Instance, MeasuredPrefill, prefill_s
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Request

KV = KvFootprint(182_353_920, 17_280)
FAST = Instance("fast", FittedPrefill(0.48, 0.4, 0.01))
SLOW = Instance("slow", FittedPrefill(0.5, 1.3, 0.03), FittedDecode(0.025), max_batch=20)
TABLE = Instance("table", MeasuredPrefill((1000, 10_000, 131_072), (0.2, 1.0, 20.0)), FittedDecode(0.02), max_batch=10)
CHUNK = 8192
ONE = Topology(KV, (PrefillCluster("p", FAST, 4),), (Region("d", SLOW, 3, 5, 800 * GBPS),), (Link("p", "d", 100 * GBPS, 0.1),))
# Two clusters of two kinds, two regions of two kinds; no link from q to d; e has but a quarter of the rate for one transfer.
FOUR = Topology(
    KV,
    (PrefillCluster("p", FAST, 2), PrefillCluster("q", TABLE, 1)),
    (Region("d", SLOW, 1, 2, 400 * GBPS), Region("e", TABLE, 1, 2, 800 * GBPS)),
    (Link("p", "d", 40 * GBPS, 0.02), Link("p", "e", 40 * GBPS, 0.1, 0.1 * 10 * GBPS), Link("q", "e", 80 * GBPS)),
)
LENGTHS = [1, 500, CHUNK - 1, CHUNK, CHUNK + 1, 20_000, 100_000]


def paths_of(request: Request, view: ClusterView, topology: Topology = ONE, overlap: bool = True, now: float = 0.0):
    return Predictor(topology, CHUNK, overlap).paths(request, view, now)


def tail(tokens: int, held: int = 0, overlap: bool = True) -> float:
    """Bytes of the last chunk and the states, or of all."""
    return KV.bytes(tokens, max(held, (tokens - 1) // CHUNK * CHUNK) if overlap else held)


# --- predictions -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_an_idle_system(tokens, overlap):
    paths = paths_of(Request(tokens, 9), idle_view(ONE), overlap=overlap)
    near, far = (prefill_s(x.prefill, tokens) for x in (SLOW, FAST))
    assert paths.local_ttft_s == pytest.approx([near + tail(tokens, 0, overlap) / (800 * GBPS)], rel=1e-12)
    assert paths.remote_ttft_s == pytest.approx(np.array([[far + tail(tokens, 0, overlap) / (100 * GBPS) + 0.05]]), rel=1e-12)
    assert (paths.local_work_s, paths.remote_work_s) == (pytest.approx([near]), pytest.approx([far]))
    assert paths.sent == KV.bytes(tokens)


def test_a_link_that_is_slower_than_the_prefill_decides():
    view = idle_view(ONE)
    view.links.bytes_per_s[:] = view.links.transfer_bytes_per_s[:] = 1 * GBPS
    paths = paths_of(Request(50_000, 9), view)
    assert paths.remote_ttft_s[0, 0] == pytest.approx(KV.bytes(50_000) / GBPS + 0.05)
    view.links.pending[:], view.links.pending_bytes[:] = 2, 3e9
    shared = paths_of(Request(50_000, 9), view).remote_ttft_s[0, 0]
    assert shared == pytest.approx((KV.bytes(50_000) + min(3e9, 2 * KV.bytes(50_000))) / GBPS + 0.05), "fairly: no more than they need"
    view.links.pending_bytes[:] = 1e6
    assert paths_of(Request(50_000, 9), view).remote_ttft_s[0, 0] == pytest.approx((KV.bytes(50_000) + 1e6) / GBPS + 0.05)


def test_several_profiles_links_and_prefixes_per_row():
    tokens, far, near = 30_000, np.array([0, 12_000]), np.array([20_000, 4096])
    request = Request(tokens, 9, far, near)
    paths = paths_of(request, idle_view(FOUR), FOUR)
    works = [prefill_s(x.prefill, tokens - int(held), int(held)) for x, held in ((SLOW, near[0]), (TABLE, near[1]))]
    assert paths.local_work_s == pytest.approx(works)
    rates = 400 * GBPS, 800 * GBPS
    assert paths.local_ttft_s == pytest.approx([w + tail(tokens, int(h)) / r for w, h, r in zip(works, near, rates, strict=True)])
    p, q = prefill_s(FAST.prefill, tokens), prefill_s(TABLE.prefill, 18_000, 12_000)
    assert paths.remote_work_s == pytest.approx([p, q]) and paths.sent == pytest.approx([KV.bytes(tokens, int(h)) for h in near])
    expected = [
        [p + tail(tokens, 20_000) / (40 * GBPS) + 0.01, p + tail(tokens, 4096) / (10 * GBPS) + 0.05],
        [math.inf, q + tail(tokens, 4096) / (80 * GBPS)],
    ]
    assert paths.remote_ttft_s == pytest.approx(np.array(expected))


@pytest.mark.parametrize("held", [0, 5000, 8192, 19_999])
@pytest.mark.parametrize("overlap", [True, False])
def test_prefixes_of_all_rows_are_the_same_as_one_for_all(held, overlap):
    view = idle_view(FOUR)
    view.prefill.load.jobs[:], view.prefill.load.free_at_s[:] = 3, 100.0
    view.decode.load.jobs[:], view.decode.load.free_at_s[:] = 2, 100.0
    one = paths_of(Request(20_000, 9, held, held), view, FOUR, overlap)
    each = paths_of(Request(20_000, 9, np.full(2, held), np.full(2, held)), view, FOUR, overlap)
    for field in ("ttft_s", "work_s", "sent"):
        np.testing.assert_array_equal(getattr(one, field), getattr(each, field))


def test_waiting_is_for_the_chunk_under_way_new_prompts_and_turns_and_never_for_more_than_there_is():
    view = idle_view(ONE)
    load = view.prefill.load
    load.jobs[:], load.fresh[:], load.free_at_s[:] = 3, 1, 1000.0
    chunk_s = FAST.prefill.growth(CHUNK)
    idle = paths_of(Request(20_000, 9), idle_view(ONE)).remote_ttft_s[0, 0]
    assert paths_of(Request(20_000, 9), view).remote_ttft_s[0, 0] - idle == pytest.approx((0.5 + 1 + 2 * 3) * chunk_s)
    load.free_at_s[:] = 7.25
    assert paths_of(Request(20_000, 9), view, now=7.0).remote_ttft_s[0, 0] - idle == pytest.approx(0.25)
    assert paths_of(Request(20_000, 9), view, now=8.0).remote_ttft_s[0, 0] == pytest.approx(idle)


def test_a_region_without_free_slots_is_behind_another():
    view = idle_view(FOUR)
    before = paths_of(Request(1000, 9), view, FOUR)
    view.decode.load.waiting[:] = 10, 0
    after = paths_of(Request(1000, 9), view, FOUR)
    assert after.local_ttft_s - before.local_ttft_s == pytest.approx([10 / 40, 0])
    assert after.remote_ttft_s[0] - before.remote_ttft_s[0] == pytest.approx([10 / 40, 0])


def changed(change) -> ClusterView:
    view = idle_view(FOUR)
    change(view)
    return view


@pytest.mark.parametrize(
    ("change", "local", "remote"),
    [
        (lambda v: v.decode.healthy.__setitem__(0, False), [0, 1], [[0, 1], [0, 1]]),
        (lambda v: v.decode.load.instances.__setitem__(1, 0), [1, 0], [[1, 1], [0, 1]]),
        (lambda v: v.prefill.healthy.__setitem__(0, False), [1, 1], [[0, 0], [0, 1]]),
        (lambda v: v.prefill.load.instances.__setitem__(1, 0), [1, 1], [[1, 1], [0, 0]]),
        (lambda v: v.links.bytes_per_s.__setitem__((0, 1), 0.0), [1, 1], [[1, 0], [0, 1]]),
    ],
)
def test_what_cannot_serve_is_infinitely_late(change, local, remote):
    request = Request(9000, 9, np.array([100, 0]), 0)
    with np.errstate(all="raise"):
        paths = paths_of(request, changed(change), FOUR)
    assert np.isfinite(paths.local_ttft_s).tolist() == [bool(x) for x in local]
    assert np.isfinite(paths.remote_ttft_s).tolist() == [[bool(x) for x in row] for row in remote]


def test_one_predictor_follows_every_column_and_other_views():
    """It keeps what follows from columns that seldom change."""
    predictor, view = Predictor(FOUR, CHUNK), idle_view(FOUR)
    columns = [(view.links, f.name) for f in dataclasses.fields(view.links) if f.init]
    columns += [(s.load, f) for s in (view.prefill, view.decode) for f in ("instances", "free_at_s", "jobs", "fresh", "waiting", "slots")]
    columns += [(view.prefill, "healthy"), (view.decode, "healthy")]
    rng = np.random.default_rng(0)
    for _ in range(120):
        owner, field = columns[rng.integers(len(columns))]
        column = getattr(owner, field)
        column.flat[rng.integers(column.size)] = rng.integers(0, 2) * rng.choice([1.0, 3.0, 1e9])
        request, now = Request(int(rng.integers(1, 90_000)), 9), float(rng.random())
        got, fresh = predictor.paths(request, view, now), paths_of(request, view, FOUR, now=now)
        np.testing.assert_array_equal(got.ttft_s, fresh.ttft_s)
        assert predictor.paths(request, idle_view(FOUR), now).ttft_s == pytest.approx(paths_of(request, idle_view(FOUR), FOUR).ttft_s)
    kept = predictor.paths(Request(1000, 9), view, 0.0)
    before = kept.ttft_s.copy(), kept.work_s.copy()
    predictor.paths(Request(90_000, 9), view, 1.0)
    for got, then in zip((kept.ttft_s, kept.work_s), before, strict=True):
        np.testing.assert_array_equal(got, then)


def test_views_that_do_not_tell_are_refused():
    view = idle_view(ONE)
    bare = [dataclasses.replace(s, load=None) for s in (view.prefill, view.decode)]
    wrong = [
        ClusterView(bare[0], view.decode, view.links),
        ClusterView(view.prefill, bare[1], view.links),
        ClusterView(view.prefill, view.decode),
        dataclasses.replace(view, prefill=dataclasses.replace(view.prefill, names=("moon",))),
        dataclasses.replace(view, decode=dataclasses.replace(view.decode, names=("moon",))),
    ]
    for policy in (LeastTtft(Predictor(ONE, CHUNK)), ShadowPrice(Predictor(ONE, CHUNK), Prices({}, {}))):
        for other in wrong:
            with pytest.raises(InvalidInput, match="view"):
                policy.place(Request(10, 1), other, 0.0)


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
    assert shadow(dear, gather_s=1e-3).place(request, view, 0.0).prefill is None, "but not where nothing is open"


def test_links_have_prices():
    request, view = Request(5000, 9), busy_view(2.0, 2.0)
    byte = 0.4 * prefill_s(SLOW.prefill, 5000) / KV.bytes(5000)
    for factor, taken in ((0.5, "p"), (1.2, None)):
        prices = dataclasses.replace(CHEAP_FAR, links={("p", "d"): factor * byte})
        assert shadow(prices, queue_price=0.0).place(request, view, 0.0).prefill == taken
    cached = dataclasses.replace(request, cached_decode=4500)
    assert shadow(CHEAP_FAR).place(cached, view, 0.0).prefill == "p"


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
    scene = predictor.scene(idle_view(FOUR), 0.0)

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
        got = predictor.copy(scene, request, path)
        assert got is None if path not in expected else got[:3] == pytest.approx(expected[path])
    assert predictor.copy(scene, request, 1)[3:] == (KV.bytes(12_000, 4096), 2) and predictor.copy(scene, request, 2)[3:] == (0.0, 1)


def test_prices_count_on_prefixes_that_can_be_copied():
    mix = Mix.of(np.array([30_000, 50_000]), 9, cached_pd=np.array([20_000, 0]), cached_prfaas=np.array([0, 40_000]))
    both = after_copies(ONE, mix)
    order = np.argsort(both.tokens)
    assert both.cached_pd[order].tolist() == both.cached_prfaas[order].tolist() == [20_000, 40_000]
    slow = dataclasses.replace(ONE, links=(dataclasses.replace(ONE.links[0], bytes_per_s=0.1 * GBPS),))
    order = np.argsort(after_copies(slow, mix).tokens)
    assert after_copies(slow, mix).cached_pd[order].tolist() == [20_000, 0]
    assert after_copies(dataclasses.replace(ONE, links=()), mix) is mix

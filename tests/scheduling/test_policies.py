import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.policies import (
    AlwaysLocal,
    AlwaysRemote,
    CacheHitRule,
    LengthBlind,
    PaperPrefix,
    Reverse,
    Threshold,
    make_policy,
)
from prfaas_jax.scheduling.view import ClusterView, Links, Load, NoDecodeServer, Placement, Request, Servers, ServerStatus


def servers(*rows: tuple[str, bool, int]) -> Servers:
    return Servers.of(ServerStatus(*row) for row in rows)


ONE_EACH = ClusterView(prefill=servers(("p0", True, 0)), decode=servers(("d0", True, 0)))
REQUEST = Request(1987, 64)


def test_each_policy_places_and_says_why():
    assert AlwaysLocal().place(REQUEST, ONE_EACH, 0.0) == Placement(None, "d0", "always_local")
    assert AlwaysRemote().place(REQUEST, ONE_EACH, 0.0) == Placement("p0", "d0", "always_remote")
    assert Threshold(512).place(REQUEST, ONE_EACH, 0.0) == Placement("p0", "d0", "threshold: 1987 > 512 tokens")
    assert Threshold(2048).place(REQUEST, ONE_EACH, 0.0) == Placement(None, "d0", "threshold: 1987 <= 2048 tokens")


def test_the_threshold_itself_stays_local():
    assert Threshold(512).place(Request(512, 1), ONE_EACH, 0.0).prefill is None
    assert Threshold(512).place(Request(513, 1), ONE_EACH, 0.0).prefill == "p0"


def test_only_what_the_decode_side_lacks_counts():
    warm = dataclasses.replace(REQUEST, cached_decode=1500, cached_prefill=100)
    assert Threshold(512).place(warm, ONE_EACH, 0.0) == Placement(None, "d0", "threshold: 1987 - 1500 cached = 487 <= 512 tokens")
    elsewhere = dataclasses.replace(REQUEST, cached_prefill=1900)
    assert Threshold(512).place(elsewhere, ONE_EACH, 0.0).prefill == "p0"


@pytest.mark.parametrize("prefill", [servers(), servers(("p0", False, 0), ("p1", False, 0))])
@pytest.mark.parametrize("policy", [AlwaysRemote(), Threshold(512)])
def test_no_healthy_prefill_server_means_local_with_the_reason(policy, prefill):
    got = policy.place(REQUEST, ClusterView(prefill, ONE_EACH.decode), 0.0)
    assert got.prefill is None and got.decode == "d0"
    assert f"local: 0 of {len(prefill.names)} prefill servers healthy" in got.reason


@pytest.mark.parametrize("decode", [servers(), servers(("d0", False, 0), ("d1", False, 0))])
@pytest.mark.parametrize("policy", [AlwaysLocal(), AlwaysRemote(), Threshold(512)])
def test_no_healthy_decode_server_is_an_error(policy, decode):
    with pytest.raises(NoDecodeServer, match=f"0 of {len(decode.names)} decode servers healthy"):
        policy.place(REQUEST, ClusterView(ONE_EACH.prefill, decode), 0.0)


def test_the_shortest_queue_of_the_healthy_wins():
    view = ClusterView(
        prefill=servers(("p0", True, 4), ("p1", False, 0), ("p2", True, 1)),
        decode=servers(("d0", True, 2), ("d1", True, 2), ("d2", True, 9)),
    )
    got = AlwaysRemote().place(REQUEST, view, 0.0)
    assert (got.prefill, got.decode) == ("p2", "d0")
    assert got.reason == "always_remote; prefill p2: queue 1, shortest of 2 healthy; decode d0: queue 2, shortest of 3 healthy"


rows = st.lists(st.tuples(st.booleans(), st.integers(0, 2**62)), max_size=6)


@given(rows, rows, st.sampled_from([AlwaysLocal(), AlwaysRemote(), Threshold(0), Threshold(1000)]), st.integers(1, 3000))
def test_a_placement_names_healthy_servers_with_the_shortest_queue(prefill, decode, policy, tokens):
    view = ClusterView(*(servers(*((f"s{i}", *row) for i, row in enumerate(side))) for side in (prefill, decode)))
    if not any(healthy for healthy, _ in decode):
        with pytest.raises(NoDecodeServer):
            policy.place(Request(tokens, 1), view, 0.0)
        return
    got = policy.place(Request(tokens, 1), view, 0.0)
    assert got == policy.place(Request(tokens, 1), view, 0.0)
    for name, side in ((got.prefill, prefill), (got.decode, decode)):
        if name is not None:
            healthy, queue = side[int(name[1:])]
            assert healthy and queue == min(q for h, q in side if h)
    wants_remote = isinstance(policy, AlwaysRemote) or (isinstance(policy, Threshold) and tokens > policy.tokens)
    assert (got.prefill is not None) == (wants_remote and any(h for h, _ in prefill))


def test_make_policy():
    assert make_policy("threshold", tokens=512) == Threshold(512)
    assert make_policy("always_local") == AlwaysLocal() and make_policy("always_remote") == AlwaysRemote()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("treshold", {}, "policy='treshold': expected one of always_local, always_remote, cache_hit_rule, "),
        ("threshold", {}, "policy threshold parameters={}"),
        ("always_local", {"tokens": 5}, "policy always_local parameters={'tokens': 5}"),
        ("threshold", {"tokens": -1}, "threshold.tokens=-1"),
        ("threshold", {"tokens": 19.4}, "threshold.tokens=19.4"),
    ],
)
def test_unknown_policies_and_parameters_are_refused(name, params, message):
    with pytest.raises(InvalidInput) as error:
        make_policy(name, **params)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: Request(0, 1), "request.tokens=0"),
        (lambda: Request(1, 0), "request.output_tokens=0"),
        (lambda: Request(5, 1, cached_decode=6), "request.cached_decode=6"),
        (lambda: Request(5, 1, cached_prefill=-1), "request.cached_prefill=-1"),
        (lambda: servers(("a", True, 0), ("a", True, 1)), "servers.names"),
        (lambda: Servers(("a",), np.array([True, True]), np.array([0])), "servers.healthy=(2,)"),
    ],
)
def test_bad_views_and_requests_name_the_field(call, field):
    with pytest.raises(InvalidInput) as error:
        call()
    assert field in str(error.value)


# --- rules that know more, or less, than a threshold --------------------------------------------------------------------------------


def test_reverse_is_the_threshold_upside_down():
    for held in (0, 700):
        for tokens in (1000, 1512, 1513, 3000):
            request = Request(tokens, 1, cached_decode=held)
            there, here = (make(1512 - 700).place(request, ONE_EACH, 0.0).prefill for make in (Reverse, Threshold))
            assert {there, here} == {"p0", None}
    assert Reverse(512).place(Request(512, 1), ONE_EACH, 0.0).reason == "reverse: 512 <= 512 tokens"
    assert Reverse(512).place(Request(513, 1), ONE_EACH, 0.0) == Placement(None, "d0", "reverse: 513 > 512 tokens")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.777, 1.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_length_blind_keeps_its_share_at_every_moment(share, seed):
    policy, remote = LengthBlind(share, seed), 0
    for n in range(1, 2001):
        remote += policy.place(Request(1 + n % 50, 1), ONE_EACH, 0.0).prefill == "p0"
        assert abs(remote / n - share) <= 2.5 / n * math.log2(n + 1) / 2
    assert abs(remote / 2000 - share) <= 2 / 2000


def test_length_blind_repeats_itself_per_seed_whatever_the_lengths():
    def drawn(seed: int, tokens: int) -> list[bool]:
        policy = LengthBlind(0.3, seed)
        return [policy.place(Request(tokens, 1), ONE_EACH, 0.0).prefill is None for _ in range(50)]

    assert drawn(1, 10) == drawn(1, 100_000) != drawn(2, 10)


def linked(pending_bytes: float, rate: float = 1e9, cached: ClusterView = ONE_EACH) -> ClusterView:
    shape = len(cached.prefill.names), len(cached.decode.names)
    return dataclasses.replace(
        cached, links=Links(*(np.full(shape, x) for x in (rate, rate, 0.0, float(pending_bytes > 0), pending_bytes)))
    )


@pytest.mark.parametrize(
    ("near", "far", "scarce", "abundant"),
    [  # (prefill, copied tokens) of a prompt of 10,000 at t = 4,000
        (0, 0, ("p0", 0), ("p0", 0)),
        (6000, 0, (None, 0), (None, 0)),
        (0, 6000, ("p0", 0), (None, 6000)),
        (2000, 6000, ("p0", 0), (None, 4000)),
        (5999, 3000, ("p0", 0), ("p0", 2999)),
        (3000, 5000, ("p0", 0), ("p0", 0)),
        (10_000, 10_000, (None, 0), (None, 0)),
    ],
)
def test_paper_prefix_asks_the_decode_side_where_bandwidth_is_scarce_and_both_where_it_is_not(near, far, scarce, abundant):
    policy, request = PaperPrefix(4000), Request(10_000, 1, cached_prefill=far, cached_decode=near)
    for view, expected, word in ((linked(1.01e9), scarce, "scarce"), (linked(0.99e9), abundant, "abundant")):
        got = policy.place(request, view, 0.0)
        assert (got.prefill, got.copied_tokens) == expected and f"paper_prefix ({word})" in got.reason
    assert policy.place(request, linked(0.0, rate=0.0), 0.0).reason.startswith("paper_prefix (scarce)"), "the link is down"
    lenient = dataclasses.replace(policy, scarce_s=math.inf).place(request, linked(1e12), 0.0)
    assert (lenient.prefill, lenient.copied_tokens) == abundant


def test_paper_prefix_without_a_prefill_server_is_local_and_copies_nothing():
    down = ClusterView(servers(("p0", False, 0)), ONE_EACH.decode)
    got = PaperPrefix(4000).place(Request(10_000, 1, cached_prefill=9000), linked(0.0, cached=down), 0.0)
    assert (got.prefill, got.copied_tokens) == (None, 0) and "0 of 1 prefill servers healthy" in got.reason


def test_paper_prefix_refuses_a_view_without_links():
    with pytest.raises(InvalidInput, match=r"view\.links=None"):
        PaperPrefix(4000).place(REQUEST, ONE_EACH, 0.0)


@pytest.mark.parametrize(
    ("tokens", "held", "remote"),
    [
        (20_000, 20_000 - 2047, False),
        (20_000, 20_000 - 2048, True),
        (1000, 300, True),  # a share of exactly 0.7
        (1000, 301, False),
        (1000, 0, True),
        (1, 1, False),
    ],
)
def test_cache_hit_rule_needs_little_left_by_count_and_by_share(tokens, held, remote):
    got = CacheHitRule().place(Request(tokens, 1, cached_decode=held), ONE_EACH, 0.0)
    assert (got.prefill == "p0") == remote and got.reason.startswith(f"cache_hit_rule: {tokens - held} uncached, ")
    assert CacheHitRule(tokens=0).place(Request(tokens, 1, cached_decode=held), ONE_EACH, 0.0).prefill == "p0"


EVERY = [
    *(AlwaysLocal(), AlwaysRemote(), Threshold(4000), Reverse(4000), PaperPrefix(4000), CacheHitRule()),
    *(LengthBlind(0.0), LengthBlind(1.0)),
]


@pytest.mark.parametrize("policy", EVERY, ids=lambda p: type(p).__name__)
def test_prefixes_count_on_the_rows_that_are_chosen(policy):
    """An array of prefixes is the scalar of the row with the shortest queue."""
    view = ClusterView(
        servers(("p0", True, 5), ("p1", True, 1), ("p2", False, 0)), servers(("d0", False, 0), ("d1", True, 3), ("d2", True, 2))
    )
    view = linked(0.0, cached=view)
    for near, far in itertools.product((0, 5000, 9500), repeat=2):
        arrays = Request(10_000, 1, np.array([9999, far, 1]), np.array([1, 9999, near]))
        got = policy.place(arrays, view, 0.0)
        assert got == policy.place(Request(10_000, 1, far, near), view, 0.0)
        assert got.decode == "d2" and got.prefill in (None, "p1")
    assert (arrays.held_by_prefill(0), arrays.held_by_decode(2)) == (9999, near)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: Reverse(-1), "reverse.tokens"),
        (lambda: Reverse(True), "reverse.tokens"),
        (lambda: PaperPrefix(1.5), "paper_prefix.tokens"),
        (lambda: PaperPrefix(1, scarce_s=-1.0), "paper_prefix.scarce_s"),
        (lambda: PaperPrefix(1, scarce_s=math.nan), "paper_prefix.scarce_s"),
        (lambda: CacheHitRule(-1), "cache_hit_rule.tokens"),
        (lambda: CacheHitRule(1, 1.1), "cache_hit_rule.share"),
        (lambda: CacheHitRule(1, math.nan), "cache_hit_rule.share"),
        (lambda: LengthBlind(-0.1), "length_blind.share"),
        (lambda: LengthBlind(math.nan), "length_blind.share"),
        (lambda: make_policy("length_blind", share=2), "length_blind.share"),
        (lambda: Request(5, 1, cached_decode=np.array([0, 6])), "request.cached_decode"),
        (lambda: Request(5, 1, cached_prefill=np.array([-1, 0])), "request.cached_prefill"),
        (lambda: Servers(("a",), np.array([True]), np.array([0]), Load.idle(2)), "servers.load"),
        (lambda: ClusterView(ONE_EACH.prefill, ONE_EACH.decode, Links(*(np.zeros((1, 2)) for _ in range(5)))), "links"),
    ],
)
def test_parameters_and_columns_out_of_range_are_refused(call, field):
    with pytest.raises(InvalidInput) as error:
        call()
    assert error.value.field == field

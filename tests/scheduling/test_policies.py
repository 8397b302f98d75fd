import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote, Threshold, make_policy
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Placement, Request, Servers, ServerStatus


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

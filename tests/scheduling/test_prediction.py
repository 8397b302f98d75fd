import dataclasses
import math

import numpy as np
import pytest
from systems import CHUNK, FAST, FOUR, KV, ONE, SLOW, TABLE, idle_view

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft, Prices, ShadowPrice
from prfaas_jax.scheduling.profiles import prefill_s
from prfaas_jax.scheduling.topology import GBPS, Topology
from prfaas_jax.scheduling.view import ClusterView, Request

LENGTHS = [1, 500, CHUNK - 1, CHUNK, CHUNK + 1, 20_000, 100_000]


def paths_of(request: Request, view: ClusterView, topology: Topology = ONE, overlap: bool = True, now: float = 0.0):
    return Predictor(topology, CHUNK, overlap).paths(request, view, now)


def tail(tokens: int, held: int = 0, overlap: bool = True) -> float:
    """Bytes of the last chunk and the states, or of all."""
    return KV.bytes(tokens, max(held, (tokens - 1) // CHUNK * CHUNK) if overlap else held)


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
        (lambda v: v.links.transfer_bytes_per_s.__setitem__((0, 1), 0.0), [1, 1], [[1, 0], [0, 1]]),
    ],
)
def test_what_cannot_serve_is_infinitely_late(change, local, remote):
    request = Request(9000, 9, np.array([100, 0]), 0)
    paths = paths_of(request, changed(change), FOUR)
    assert np.isfinite(paths.local_ttft_s).tolist() == [bool(x) for x in local]
    assert np.isfinite(paths.remote_ttft_s).tolist() == [[bool(x) for x in row] for row in remote]


@pytest.mark.parametrize("field", ["cached_prefill", "cached_decode"])
@pytest.mark.parametrize("shape", [1, 3, (2, 2)])
def test_prefixes_that_are_not_one_per_row_are_refused(field, shape):
    request = dataclasses.replace(Request(9000, 9), **{field: np.ones(shape, np.int64)})
    with pytest.raises(InvalidInput, match=f"request.{field}"):
        paths_of(request, idle_view(FOUR), FOUR)


def test_every_row_takes_its_turns_for_what_it_does_not_hold_itself():
    """One number of turns for all rows made long prompts look late where their prefix is."""
    view = idle_view(FOUR)
    view.prefill.load.jobs[:], view.prefill.load.free_at_s[:] = 4, 1e6
    request, turns = Request(60_000, 9, np.array([0, 50_000])), np.array([7, 1])
    busy, idle = (paths_of(request, v, FOUR).remote_ttft_s[:, 1] for v in (view, idle_view(FOUR)))
    chunk_s = [x.prefill.growth(CHUNK) for x in (FAST, TABLE)]
    assert busy - idle == pytest.approx((0.5 + 4 * turns) * chunk_s)


def test_prefixes_may_be_any_whole_numbers():
    request = Request(9000, 9, np.array([100, 0]), np.array([7, 9]))
    expected = paths_of(request, idle_view(FOUR), FOUR).ttft_s
    fixed = np.array([100, 0])
    fixed.flags.writeable = False
    for far, near in ((np.array([100, 0], np.int32), request.cached_decode), (fixed, np.array([7, 0, 9])[::2])):
        np.testing.assert_array_equal(paths_of(Request(9000, 9, far, near), idle_view(FOUR), FOUR).ttft_s, expected)


def test_a_predictor_of_no_chunk_is_refused():
    with pytest.raises(InvalidInput, match="predictor"):
        Predictor(FOUR, 0)


def test_one_predictor_follows_every_column_and_other_views():
    """It keeps the view that it saw last."""
    (predictor, other), view = (Predictor(FOUR, CHUNK) for _ in range(2)), idle_view(FOUR)
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
        if rng.random() < 0.5:  # else what the predictor keeps would never be old
            other.paths(request, view, now)
        assert other.paths(request, idle_view(FOUR), now).ttft_s == pytest.approx(paths_of(request, idle_view(FOUR), FOUR).ttft_s)
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
        dataclasses.replace(view, decode=dataclasses.replace(view.decode, healthy=np.ones(1, np.int8))),
    ]
    for policy in (LeastTtft(Predictor(ONE, CHUNK)), ShadowPrice(Predictor(ONE, CHUNK), Prices({}, {}))):
        for other in wrong:
            with pytest.raises(InvalidInput, match="view"):
                policy.place(Request(10, 1), other, 0.0)

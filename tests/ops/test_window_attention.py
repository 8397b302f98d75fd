"""Window attention over rings against dense float64 attention; what prefill leaves in the rings, and decode on top of it."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.pool_write import write_tokens
from prfaas_jax.ops.window_attention import window_decode, window_prefill, write_rings
from prfaas_jax.testing.attention_cases import attend

LAYERS, LAYER, SLOTS = 2, 1, 7
KV_HEADS, GROUP, HEAD_DIM, VALUE_DIM = 2, 3, 24, 16
SCALE = HEAD_DIM**-0.5
F32 = np.dtype(np.float32)

prefill = jax.jit(window_prefill, static_argnames=("slots_per_layer", "window", "scale"))
decode = jax.jit(window_decode, static_argnames=("slots_per_layer", "scale"))
write = jax.jit(write_rings, static_argnames=("slots_per_layer", "window"))
write_token = jax.jit(write_tokens, static_argnames="pages_per_layer")


def ring(window: int, width: int, dtype: np.dtype = F32) -> np.ndarray:
    """All slots recycled: NaN everywhere, the dummy too."""
    return np.full((KV_HEADS, LAYERS * SLOTS, window, width), np.nan, dtype)


def put(pool: np.ndarray, slot: int, x: np.ndarray, length: int) -> None:
    """The last tokens of x [S, K, H] before `length`, into one slot of the layer under test."""
    window = pool.shape[2]
    for p in range(max(0, length - window), length):
        pool[:, LAYER * SLOTS + slot, p % window] = x[p]


def row(seed: int, length: int, dtype: np.dtype = F32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of all positions of a request, a function of the seed alone for its first tokens."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((length, KV_HEADS, GROUP * HEAD_DIM + HEAD_DIM + VALUE_DIM)).astype(dtype)
    q, k, v = np.split(x, [GROUP * HEAD_DIM, (GROUP + 1) * HEAD_DIM], axis=2)
    return q.reshape(length, KV_HEADS * GROUP, HEAD_DIM), k, v


def run_prefill(rows, starts: list[int], tokens: int, window: int, slots: list[int], sinks: np.ndarray | None = None) -> np.ndarray:
    dtype = rows[0][0].dtype
    rings = ring(window, HEAD_DIM, dtype), ring(window, VALUE_DIM, dtype)
    for (_, *kv), start, slot in zip(rows, starts, slots, strict=True):
        for pool, x in zip(rings, kv, strict=True):
            put(pool, slot, x, start)
    q, k, v = (np.stack([x[s : s + tokens] for x, s in zip(part, starts, strict=True)]) for part in zip(*rows, strict=True))
    out = prefill(
        q, k, v, *rings, np.array(slots, np.int32), np.array(starts, np.int32), jnp.int32(LAYER),
        slots_per_layer=SLOTS, window=window, scale=SCALE, sinks=sinks,
    )  # fmt: skip
    assert out.dtype == dtype
    return np.asarray(out)


def run_decode(rows, lengths: list[int], window: int, slots: list[int], sinks: np.ndarray | None = None) -> np.ndarray:
    dtype = rows[0][0].dtype
    rings = ring(window, HEAD_DIM, dtype), ring(window, VALUE_DIM, dtype)
    for (_, *kv), length, slot in zip(rows, lengths, slots, strict=True):
        for pool, x in zip(rings, kv, strict=True):
            put(pool, slot, x, length)
    q, k, v = (np.stack([x[n] for x, n in zip(part, lengths, strict=True)]) for part in zip(*rows, strict=True))
    slot, length = np.array(slots, np.int32), np.array(lengths, np.int32)
    out = decode(q, k, v, *rings, slot, length, jnp.int32(LAYER), slots_per_layer=SLOTS, scale=SCALE, sinks=sinks)
    assert out.dtype == dtype
    return np.asarray(out)


@pytest.mark.parametrize(
    ("window", "tokens", "sinks"),
    [(1, 5, True), (7, 1, False), (7, 300, False), (128, 64, True), (300, 200, False), (511, 64, True)],
)
def test_prefill_matches_dense_attention(window, tokens, sinks):
    starts = [0, 1, max(0, window - 1), window, window + 1, 3 * window + 7]
    rows = [row(i, start + tokens) for i, start in enumerate(starts)]
    sink = np.random.default_rng(window).standard_normal(KV_HEADS * GROUP).astype(np.float32) * 3 if sinks else None
    out = np.concatenate([
        run_prefill(rows[i : i + 2], starts[i : i + 2], tokens, window, [4, 2], sink) for i in range(0, len(rows), 2)
    ])  # fmt: skip
    for got, (q, k, v), start in zip(out, rows, starts, strict=True):
        np.testing.assert_allclose(got, attend(q[start:], k, v, SCALE, start, window, sink), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("window", "sinks"), [(1, False), (128, True), (300, False)])
def test_decode_matches_dense_attention(window, sinks):
    lengths = [0, 1, max(0, window - 1), window, window + 1, 3 * window + 7]
    rows = [row(i, length + 1) for i, length in enumerate(lengths)]
    sink = np.random.default_rng(window).standard_normal(KV_HEADS * GROUP).astype(np.float32) * 3 if sinks else None
    out = run_decode(rows, lengths, window, [0, 5, 3, 1, 4, 2], sink)
    for got, (q, k, v), length in zip(out, rows, lengths, strict=True):
        np.testing.assert_allclose(got, attend(q[length:], k, v, SCALE, length, window, sink)[0], atol=2e-6, rtol=2e-6)


def test_bfloat16():
    window, tokens = 20, 40
    for start in (0, 31):
        q, k, v = request = row(start, start + tokens, np.dtype(ml_dtypes.bfloat16))
        expected = attend(q, k, v, SCALE, 0, window)
        prefilled, decoded = run_prefill([request], [start], tokens, window, [3])[0], run_decode([request], [start], window, [3])[0]
        np.testing.assert_allclose(prefilled.astype(np.float64), expected[start:], atol=2e-2, rtol=2e-2)
        np.testing.assert_allclose(decoded.astype(np.float64), expected[start], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("window", "tokens", "start"), [(7, 64, 0), (300, 200, 320)])
def test_a_prefilled_row_does_not_depend_on_its_companions_its_position_or_its_slot(window, tokens, start):
    request, other = row(1, start + tokens), row(2, 1000 + tokens)
    alone = run_prefill([request, other, other], [start, 0, 0], tokens, window, [1, 2, 3])[0]
    for position, starts, slots in ((1, [64, start, 1000], [3, 2, 1]), (2, [1000, 1, start], [5, 1, 4])):
        rows = [request if i == position else other for i in range(3)]
        np.testing.assert_array_equal(run_prefill(rows, starts, tokens, window, slots)[position], alone)


@pytest.mark.parametrize(("window", "length"), [(7, 0), (7, 5), (300, 299), (300, 700)])
def test_a_decoded_row_does_not_depend_on_its_companions_its_position_or_its_slot(window, length):
    request, other = row(1, length + 1), row(2, 1001)
    alone = run_decode([request] + [other] * 4, [length, 0, 0, 0, 0], window, [1, 0, 0, 0, 0])[0]
    for position, lengths, slots in ((3, [1, 200, 1000, length, 9], [5, 4, 3, 2, 1]), (4, [300] * 4 + [length], [1, 2, 3, 4, 5])):
        rows = [request if i == position else other for i in range(5)]
        np.testing.assert_array_equal(run_decode(rows, lengths, window, slots)[position], alone)


def test_padding_at_the_end_of_a_row_changes_nothing_before_it():
    q, k, v = row(1, 104)
    before = run_prefill([(q, k, v)] * 3, [40] * 3, 64, 7, [1, 2, 3])
    k[-10:], v[-10:] = 1e20, 1e20
    np.testing.assert_array_equal(run_prefill([(q, k, v)] * 3, [40] * 3, 64, 7, [1, 2, 3])[:, :-10], before[:, :-10])


def test_keys_far_before_the_window_are_not_read():
    """What makes a long chunk's cost grow with its length and not its square: a NaN that is read is not silenced by a weight of zero."""
    q, k, v = row(4, 300)
    expected = attend(q, k, v, SCALE, 0, 7)
    k[:128], v[:128] = np.nan, np.nan
    out = run_prefill([(q, k, v)] * 2, [0, 0], 300, 7, [4, 2])
    np.testing.assert_allclose(out[0, 256:], expected[256:], atol=2e-6, rtol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rings_hold_the_last_window_after_any_chunks(data):
    """Chunks of any size in buckets of 8, each into the slot it was read from or the row's other one; then a decode step."""
    window, bucket, batch = data.draw(st.sampled_from([1, 5, 8, 11])), 8, 3
    tokens = np.random.default_rng(0).standard_normal((batch, LAYERS, 64, KV_HEADS, 4)).astype(np.float32)
    pool, length, slot = jnp.full((KV_HEADS, LAYERS * SLOTS, window, 4), np.nan), np.zeros(batch, np.int32), np.zeros(batch, np.int32)
    for _ in range(data.draw(st.integers(1, 4))):
        valid = np.array([data.draw(st.integers(0, bucket)) for _ in range(batch)], np.int32)
        home = np.array([data.draw(st.sampled_from([1, 4])) for _ in range(batch)], np.int32) + np.arange(batch, dtype=np.int32)
        new = np.full((LAYERS, batch, bucket, KV_HEADS, 4), np.nan, np.float32)
        for b in range(batch):
            new[:, b, : valid[b]] = tokens[b, :, length[b] : length[b] + valid[b]]
        before = np.asarray(pool)
        pool = write(pool, new, slot, home, length, valid, slots_per_layer=SLOTS, window=window)
        length, slot = length + valid, np.where(valid > 0, home, slot)
        for untouched in set(range(1, SLOTS)) - set(slot[valid > 0]):
            np.testing.assert_array_equal(np.asarray(pool)[:, untouched::SLOTS], before[:, untouched::SLOTS])
    for b in range(batch):
        check_ring(np.asarray(pool), tokens[b], slot[b], length[b])
    new = np.stack([tokens[b, :, n] for b, n in enumerate(length)], axis=1)
    pool = write_token(pool, new, slot, length % window, pages_per_layer=SLOTS)
    for b in range(batch):
        check_ring(np.asarray(pool), tokens[b], slot[b], length[b] + 1)


def check_ring(pool: np.ndarray, tokens: np.ndarray, slot: int, length: int) -> None:
    window = pool.shape[2]
    if slot:
        for p in range(max(0, length - window), length):
            np.testing.assert_array_equal(pool[:, slot::SLOTS, p % window], tokens[:, p].swapaxes(0, 1))


def test_chunks_then_decode_equal_one_long_attention():
    """The life of a request: chunks move from slot to slot, then tokens are decoded one by one."""
    window, bucket, chunks = 40, 64, [64, 30, 1, 64]
    total = sum(chunks) + 5
    q, k, v = row(3, total)
    pools = jnp.asarray(ring(window, HEAD_DIM)), jnp.asarray(ring(window, VALUE_DIM))
    shape, expected, start = {"slots_per_layer": SLOTS}, attend(q, k, v, SCALE, 0, window), 0
    for i, valid in enumerate(chunks):
        part = slice(start, start + valid)
        queries, *new = (np.pad(x[part], ((0, bucket - valid), (0, 0), (0, 0)))[None] for x in (q, k, v))
        read_slot, write_slot = (np.array([s], np.int32) for s in (i, i + 1))
        at, count = np.array([start], np.int32), np.array([valid], np.int32)
        out = prefill(queries, *new, *pools, read_slot, at, jnp.int32(LAYER), **shape, window=window, scale=SCALE)
        np.testing.assert_allclose(out[0, :valid], expected[part], atol=2e-6, rtol=2e-6)
        stacked = (np.stack([np.full_like(x, np.nan), x]) for x in new)
        pools = tuple(
            write(p, x, read_slot, write_slot, at, count, **shape, window=window) for p, x in zip(pools, stacked, strict=True)
        )
        start += valid
    slot = np.array([len(chunks)], np.int32)
    for n in range(start, total):
        out = decode(q[n][None], k[n][None], v[n][None], *pools, slot, np.array([n]), jnp.int32(LAYER), **shape, scale=SCALE)
        np.testing.assert_allclose(out[0], expected[n], atol=2e-6, rtol=2e-6)
        pools = tuple(
            write_token(p, x[n][None, None], slot, np.array([n % window]), pages_per_layer=SLOTS, first_layer=LAYER)
            for p, x in zip(pools, (k, v), strict=True)
        )


def test_a_window_of_another_size_than_the_rings_is_refused():
    with pytest.raises(InvalidInput, match="window=8"):
        run = functools.partial(window_prefill, slots_per_layer=SLOTS, window=8, scale=SCALE)
        x = jnp.zeros((1, 4, KV_HEADS, HEAD_DIM))
        run(x, x, x, ring(7, HEAD_DIM), ring(7, HEAD_DIM), jnp.zeros(1, int), jnp.zeros(1, int), jnp.int32(0))


abstract = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
INTS = (jax.ShapeDtypeStruct((2,), jnp.int32),) * 2
ONE = jax.ShapeDtypeStruct((), jnp.int32)


def temporaries(lowered) -> int:
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_reading_copies_no_pool():
    """Compiled temporaries do not grow with the pool, also when the layer is traced."""

    def temp_bytes(slots: int) -> tuple[int, int]:
        pool = abstract((2, 3 * slots, 128, 64))
        new, one = abstract((2, 64, 2, 64)), abstract((2, 2, 64))
        shape = {"slots_per_layer": slots, "scale": 1.0}
        return (
            temporaries(prefill.lower(abstract((2, 64, 6, 64)), new, new, pool, pool, *INTS, ONE, window=128, **shape)),
            temporaries(decode.lower(abstract((2, 6, 64)), one, one, pool, pool, *INTS, ONE, **shape)),
        )

    for few, many in zip(temp_bytes(10), temp_bytes(200), strict=True):
        assert many <= few + 4096


def test_a_donated_pool_is_written_in_place():
    def memory(slots: int) -> tuple[int, int, int]:
        pool = abstract((2, 3 * slots, 128, 64))
        donating = jax.jit(functools.partial(write_rings, slots_per_layer=slots, window=128), donate_argnums=0)
        stats = donating.lower(pool, abstract((3, 2, 64, 2, 64)), *INTS, *INTS).compile().memory_analysis()
        return stats.temp_size_in_bytes, stats.alias_size_in_bytes, pool.size * 4

    (few, *_), (many, alias, pool_bytes) = memory(10), memory(200)
    assert alias == pool_bytes
    assert many <= few + 4096

"""Latent attention: prefill expands, decode absorbs, and both equal dense float64 attention over expanded keys and values."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prfaas_jax.ops.latent_attention import latent_decode, latent_prefill
from prfaas_jax.testing import attention_cases as oracle

HEADS, NOPE, ROPE, RANK, VALUE = 3, 16, 8, 32, 24
SCALE = (NOPE + ROPE) ** -0.5
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)

prefill = jax.jit(latent_prefill, static_argnames=("pages_per_layer", "scale"))
decode = jax.jit(latent_decode, static_argnames=("pages_per_layer", "scale"))


def weights(dtype: np.dtype = F32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return tuple((rng.standard_normal((HEADS, n, RANK)) * RANK**-0.5).astype(dtype) for n in (NOPE, VALUE))


def run(case: oracle.PagedCase, q: np.ndarray, tokens: int | None = None) -> np.ndarray:
    """Prefill of `tokens` per row, or decode of one; q is [B, T, N, nope + rope]."""
    latents = np.stack([row[-(tokens or 1) :, 0] for row in case.k])
    args = (*np.split(q, [NOPE], axis=-1), latents)
    op = prefill if tokens else decode
    if not tokens:
        args = tuple(x[:, 0] for x in args)
    out = op(
        *args, case.k_pool, case.table, case.cached, jnp.int32(case.layer), *weights(q.dtype),
        pages_per_layer=case.pages_per_layer, scale=SCALE,
    )  # fmt: skip
    assert out.dtype == q.dtype
    return np.asarray(out).reshape(*q.shape[:-1], VALUE)


def expected(case: oracle.PagedCase, q: np.ndarray) -> np.ndarray:
    k_up, v_up = (w.astype(np.float64) for w in weights(q.dtype))
    rows = []
    for queries, latents, cached in zip(q, case.k, case.cached, strict=True):
        c, k_rope = np.split(latents[:, 0].astype(np.float64), [RANK], axis=-1)
        shared = np.broadcast_to(k_rope[:, None], (len(c), HEADS, ROPE))
        k = np.concatenate([np.einsum("sr,nhr->snh", c, k_up), shared], axis=-1)
        rows.append(oracle.attend(queries, k, np.einsum("sr,nvr->snv", c, v_up), SCALE, int(cached)))
    return np.stack(rows)


def make(cached: list[int], tokens: int, page_size: int = 16, dtype: np.dtype = F32) -> tuple[oracle.PagedCase, np.ndarray]:
    """A case whose rows are a function of their prefix length only; pages no row owns, and the dummy, hold NaN."""
    case = oracle.paged_case(
        np.random.default_rng(0), cached, tokens, kv_heads=1, head_dim=RANK + ROPE, page_size=page_size, dtype=dtype,
        dummy=np.nan, table_width=1152 // page_size, pages_per_layer=8192 // page_size,
    )  # fmt: skip
    q = np.zeros((len(cached), tokens, HEADS, NOPE + ROPE), dtype)
    for row, length in enumerate(cached):
        rng = np.random.default_rng(length)
        latents = rng.standard_normal((length + tokens, 1, RANK + ROPE)).astype(dtype)
        oracle.set_row(case, row, latents, latents)
        q[row] = rng.standard_normal(q.shape[1:]).astype(dtype)
    return case, q


@pytest.mark.parametrize(
    ("tokens", "cached", "page_size"),
    [(1, [0, 3], 16), (64, [0, 1, 64, 700], 16), (200, [128, 0, 255, 257], 64), (600, [300, 0], 16)],
)
def test_prefill_matches_dense_attention(tokens, cached, page_size):
    case, q = make(cached, tokens, page_size)
    out = run(case, q, tokens)
    np.testing.assert_allclose(out, expected(case, q), atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(run(*make(cached[::-1], tokens, page_size), tokens)[::-1], out)


@pytest.mark.parametrize("page_size", [16, 64])
def test_decode_matches_dense_attention(page_size):
    case, q = make([0, 1, 16, 17, 127, 128, 129, 530], 1, page_size)
    np.testing.assert_allclose(run(case, q), expected(case, q), atol=2e-6, rtol=2e-6)


def test_bfloat16():
    case, q = make([0, 40], 20, dtype=BF16)
    np.testing.assert_allclose(run(case, q, 20).astype(np.float64), expected(case, q), atol=2e-2, rtol=2e-2)
    case, q = make([0, 40], 1, dtype=BF16)
    np.testing.assert_allclose(run(case, q).astype(np.float64), expected(case, q), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("tokens", "length"), [(64, 320), (None, 0), (None, 300)])
def test_a_row_does_not_depend_on_its_companions_its_position_or_the_page_size(tokens, length):
    def at(lengths: list[int], page_size: int = 16) -> np.ndarray:
        return run(*make(lengths, tokens or 1, page_size), tokens)

    rest = 3 if tokens else 7
    alone = at([length] + [0] * rest)[0]
    for position, companions in ((1, [64, 1000] + [7] * (rest - 2)), (rest, [600] * rest)):
        lengths = [*companions[:position], length, *companions[position:]]
        for page_size in (16, 64):
            np.testing.assert_array_equal(at(lengths, page_size)[position], alone)


def test_padding_at_the_end_of_a_row_changes_nothing_before_it():
    case, q = make([128, 0, 0, 0], 64)
    before = run(case, q, 64)
    case.k[0][-10:] = 1e15
    np.testing.assert_array_equal(run(case, q, 64)[0, :-10], before[0, :-10])


def test_without_a_prefix_the_pool_is_not_read():
    """All of the pool is NaN, and the table names pages that do not exist; decode's padded rows are such rows."""
    for tokens in (64, None):
        case, q = make([0] * (4 if tokens else 8), tokens or 1)
        case.k_pool[:], case.table[:] = np.nan, 10**6
        np.testing.assert_allclose(run(case, q, tokens), expected(case, q), atol=2e-6)


def lowered(pages: int, *, tokens: int | None, width: int = 20, rank: int = RANK) -> jax.stages.Lowered:
    a = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    lead = (2, tokens) if tokens else (2,)
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, width), (2,), ())]
    pool, latent = a((1, 3 * pages, 16, rank + ROPE)), a((*lead, rank + ROPE))
    args = a((*lead, HEADS, NOPE)), a((*lead, HEADS, ROPE)), latent, pool, *ints, a((HEADS, NOPE, rank)), a((HEADS, VALUE, rank))
    return (prefill if tokens else decode).lower(*args, pages_per_layer=pages, scale=1.0)


@pytest.mark.parametrize("tokens", [64, None])
def test_temporaries_grow_neither_with_the_pool_nor_with_the_prefix(tokens):
    """Blocks are read and expanded one after another, never the whole prefix; the pool is not copied, also by a traced layer."""

    def temp_bytes(pages: int, width: int) -> int:
        return lowered(pages, tokens=tokens, width=width).compile().memory_analysis().temp_size_in_bytes

    # The table itself is shifted to the layer and padded.
    table_bytes = 2 * 2 * 1000 * 4
    assert temp_bytes(1000, 1020) <= temp_bytes(100, 20) + table_bytes + 4096


def test_decode_never_expands_a_latent():
    """No product of the compiled program has a cached token's keys or values: widths NOPE and VALUE belong to queries and outputs."""
    compiled = lowered(100, tokens=None).compile().as_text()
    dots = [line.split("=")[1].split()[0] for line in compiled.splitlines() if " dot(" in line]
    assert dots
    block = 128
    assert not [dot for dot in dots if str(block) in dot and (f",{NOPE}]" in dot or f",{VALUE}]" in dot)], dots

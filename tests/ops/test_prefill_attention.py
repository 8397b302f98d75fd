import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prfaas_jax.ops.prefill_attention import prefill_attention
from prfaas_jax.testing import attention_cases as oracle

F32 = np.dtype(np.float32)
attention = jax.jit(prefill_attention, static_argnames=("pages_per_layer", "scale"))


def run(case: oracle.PagedCase, q: np.ndarray, scale: float = 0.125) -> np.ndarray:
    tokens = q.shape[1]
    k_new, v_new = (np.stack([row[-tokens:] for row in rows]) for rows in (case.k, case.v))
    out = attention(
        q, k_new, v_new, case.k_pool, case.v_pool, case.table, case.cached, jnp.int32(case.layer),
        pages_per_layer=case.pages_per_layer, scale=scale,
    )  # fmt: skip
    assert out.dtype == q.dtype
    return np.asarray(out)


def expected(case: oracle.PagedCase, q: np.ndarray, scale: float = 0.125) -> np.ndarray:
    rows = zip(q, case.k, case.v, case.cached, strict=True)
    return np.stack([oracle.attend(x, k, v, scale, int(n)) for x, k, v, n in rows])


@pytest.mark.parametrize(
    ("tokens", "cached", "page_size", "group", "head_dim", "dtype"),
    [
        (1, [0, 3], 16, 1, 64, "float32"),
        (64, [0, 1, 64, 700], 16, 3, 64, "float32"),
        (64, [0, 64, 300], 64, 4, 128, "bfloat16"),
        (200, [128, 0], 16, 4, 64, "float32"),
        (512, [0, 512], 64, 1, 128, "float32"),
        (600, [300], 16, 2, 64, "float32"),
        (1024, [0, 320], 16, 1, 64, "float32"),
    ],
)
def test_matches_dense_attention(tokens, cached, page_size, group, head_dim, dtype):
    rng = np.random.default_rng(tokens + head_dim)
    dtype = F32 if dtype == "float32" else np.dtype(ml_dtypes.bfloat16)
    case = oracle.paged_case(
        rng, cached, tokens, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype=dtype, layer=2, dummy=np.nan
    )
    q = rng.standard_normal((len(cached), tokens, 2 * group, head_dim)).astype(dtype)
    tolerance = 2e-6 if dtype == F32 else 2e-2
    np.testing.assert_allclose(run(case, q).astype(np.float64), expected(case, q), atol=tolerance, rtol=tolerance)


def test_values_of_another_width_and_sinks():
    rng = np.random.default_rng(2)
    case = oracle.paged_case(rng, [0, 70], 40, kv_heads=2, head_dim=24, value_dim=16, page_size=16, dtype=F32)
    q, sinks = rng.standard_normal((2, 40, 6, 24)).astype(F32), rng.standard_normal(6).astype(F32) * 3
    k_new, v_new = (np.stack([row[-40:] for row in rows]) for rows in (case.k, case.v))
    out = attention(
        q, k_new, v_new, case.k_pool, case.v_pool, case.table, case.cached, jnp.int32(case.layer), sinks=sinks,
        pages_per_layer=case.pages_per_layer, scale=0.2,
    )  # fmt: skip
    rows = zip(q, case.k, case.v, case.cached, strict=True)
    want = np.stack([oracle.attend(x, k, v, 0.2, int(n), sinks=sinks) for x, k, v, n in rows])
    np.testing.assert_allclose(out, want, atol=2e-6, rtol=2e-6)


def case_of(lengths: list[int], tokens: int, page_size: int) -> tuple[oracle.PagedCase, np.ndarray]:
    """A case whose rows are a function of their prefix length only, in a table of fixed width in tokens."""
    case = oracle.paged_case(
        np.random.default_rng(1), lengths, tokens, kv_heads=1, head_dim=64, page_size=page_size, dtype=F32,
        table_width=2048 // page_size, pages_per_layer=6400 // page_size,
    )  # fmt: skip
    q = np.zeros((len(lengths), tokens, 3, 64), np.float32)
    for row, length in enumerate(lengths):
        rng = np.random.default_rng(length)
        oracle.set_row(case, row, *(rng.standard_normal((length + tokens, 1, 64)).astype(np.float32) for _ in range(2)))
        q[row] = rng.standard_normal((tokens, 3, 64))
    return case, q


@pytest.mark.parametrize(("tokens", "length"), [(64, 0), (64, 320), (256, 256), (640, 128)])
def test_a_row_does_not_depend_on_its_companions_its_position_or_the_page_size(tokens, length):
    alone = run(*case_of([length, 0, 0], tokens, 16))[0]
    for position, companions in ((1, [64, 1024]), (0, [1344, 0])):
        lengths = [*companions[:position], length, *companions[position:]]
        for page_size in (16, 64):
            np.testing.assert_array_equal(run(*case_of(lengths, tokens, page_size))[position], alone)


def test_padding_at_the_end_of_a_row_changes_nothing_before_it():
    case, q = case_of([128, 0], 64, 16)
    before = run(case, q)
    for rows in (case.k, case.v):
        rows[0][-10:] = 1e20
    np.testing.assert_array_equal(run(case, q)[0, :-10], before[0, :-10])


def test_without_a_prefix_the_pool_is_not_read():
    """All of the pool is NaN, and the table names pages that do not exist."""
    case, q = case_of([0, 0], 64, 16)
    case.k_pool[:] = case.v_pool[:] = np.nan
    case.table[:] = 10**6
    np.testing.assert_allclose(run(case, q), expected(case, q), atol=2e-6)


def test_temporaries_do_not_grow_with_the_pool():
    def temp_bytes(pages: int) -> int:
        a = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 20), (2,), ())]
        pool, new = a((2, 3 * pages, 16, 64)), a((2, 64, 2, 64))
        lowered = attention.lower(a((2, 64, 6, 64)), new, new, pool, pool, *ints, pages_per_layer=pages, scale=1.0)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(1000) <= temp_bytes(100) + 4096

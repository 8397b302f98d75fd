import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prfaas_jax.ops.pool_write import _scatter_pages, gather_tokens, read_pages, write_pages, write_tokens

L, P, K, H = 3, 7, 2, 8


def tokens(rng: np.random.Generator, count: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (page, offset) pairs outside the dummy page."""
    flat = rng.permutation(np.arange(page_size, P * page_size))[:count].astype(np.int32)
    return flat // page_size, flat % page_size


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write_matches_numpy_and_gather_reads_it_back(page_size, dtype):
    rng = np.random.default_rng(0)
    pool = np.asarray(jnp.asarray(rng.standard_normal((K, L * P, page_size, H)), dtype))
    new = np.asarray(jnp.asarray(rng.standard_normal((L, 40, K, H)), dtype))
    page, offset = tokens(rng, 40, page_size)
    want = pool.copy()
    for layer in range(L):
        for r in range(40):
            want[:, layer * P + page[r], offset[r]] = new[layer, r]
    got = jax.jit(functools.partial(write_tokens, pages_per_layer=P))(pool, new, page, offset)
    np.testing.assert_array_equal(np.asarray(got), want)
    back = jax.jit(functools.partial(gather_tokens, pages_per_layer=P))(got, page, offset)
    np.testing.assert_array_equal(np.asarray(back), new)


def test_padded_rows_collide_in_the_dummy_page_only():
    rng = np.random.default_rng(1)
    page, offset = tokens(rng, 5, 16)
    page, offset = np.concatenate([page, np.zeros(11, np.int32)]), np.concatenate([offset, np.zeros(11, np.int32)])
    new = rng.standard_normal((L, 16, K, H)).astype(np.float32)
    got = np.array(write_tokens(jnp.zeros((K, L * P, 16, H)), jnp.asarray(new), page, offset, pages_per_layer=P))
    got[:, ::P] = 0
    want = np.zeros_like(got)
    for layer in range(L):
        want[:, layer * P + page[:5], offset[:5]] = new[layer, :5].transpose(1, 0, 2)
    np.testing.assert_array_equal(got, want)


def test_new_tokens_take_the_dtype_of_the_pool():
    pool = write_tokens(
        jnp.zeros((K, L * P, 16, H), jnp.bfloat16), jnp.full((L, 1, K, H), 1.001), jnp.array([1]), jnp.array([2]), pages_per_layer=P
    )
    assert pool.dtype == jnp.bfloat16 and float(pool[0, 1, 2, 0]) == 1.0


@pytest.mark.parametrize("rows", [8, 64, 256])
def test_a_donated_pool_is_written_in_place(rows):
    def memory(pages: int) -> tuple[int, int, int]:
        pool = jax.ShapeDtypeStruct((K, L * pages, 16, H), jnp.float32)
        new = jax.ShapeDtypeStruct((L, rows, K, H), jnp.float32)
        index = jax.ShapeDtypeStruct((rows,), jnp.int32)
        write = jax.jit(functools.partial(write_tokens, pages_per_layer=pages), donate_argnums=0)
        stats = write.lower(pool, new, index, index).compile().memory_analysis()
        return stats.temp_size_in_bytes, stats.alias_size_in_bytes, pool.size * 4

    (small_temp, *_), (temp, alias, pool_bytes) = memory(20), memory(2000)
    assert alias == pool_bytes
    assert temp <= small_temp + 4096


@pytest.mark.parametrize("page", [(16, 8), (3, 8), (5,)])
def test_whole_pages_are_written_and_read_back(page):
    """Also by the form that TPUs take."""
    rng, layers, pages, heads = np.random.default_rng(0), 3, 7, 2
    pool = rng.standard_normal((heads, layers * pages, *page)).astype(np.float32)
    new = rng.standard_normal((layers, 2, heads, int(np.prod(page)))).astype(np.float32)
    at, expected = np.array([4, 2], np.int32), pool.copy()
    for layer in range(layers):
        for row, p in enumerate(at):
            expected[:, layer * pages + p] = new[layer, row].reshape(heads, *page)
    np.testing.assert_array_equal(write_pages(jnp.asarray(pool), jnp.asarray(new), at, pages_per_layer=pages), expected)
    ids = np.arange(layers)[:, None] * pages + at
    np.testing.assert_array_equal(_scatter_pages(jnp.asarray(pool), jnp.asarray(new), jnp.asarray(ids)), expected)
    np.testing.assert_array_equal(read_pages(jnp.asarray(expected), jnp.asarray(ids)), expected[:, ids])
    last = write_pages(jnp.asarray(pool), jnp.asarray(new[2:]), at, pages_per_layer=pages, first_layer=2)
    np.testing.assert_array_equal(last[:, : 2 * pages], pool[:, : 2 * pages])
    np.testing.assert_array_equal(last[:, 2 * pages :], expected[:, 2 * pages :])

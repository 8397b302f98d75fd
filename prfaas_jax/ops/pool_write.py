"""Tokens into and out of a paged pool, several layers at once.

Pages of all layers form one axis of tokens, so each (layer, token) is one index with a window [K, H], in the order of the
canonical layout [L, R, K, H]: no transposed copy on either way, and the fastest of the variants measured on CPU.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int


def _token_ids(
    layers: int, page: Int[Array, " R"], offset: Int[Array, " R"], first_layer: Int[Array, ""] | int, pages_per_layer: int, page_size: int
) -> Int[Array, "L R"]:
    """Index of each token in the pool's flattened [X * page_size] axis."""
    layer = first_layer + jnp.arange(layers, dtype=jnp.int32)[:, None]
    return (layer * pages_per_layer + page) * page_size + offset


def write_tokens(
    pool: Float[Array, "K X page_size H"],
    new: Float[Array, "L R K H"],
    page: Int[Array, " R"],
    offset: Int[Array, " R"],
    *,
    pages_per_layer: int,
    first_layer: Int[Array, ""] | int = 0,
) -> Float[Array, "K X page_size H"]:
    """Writes token r of layers `first_layer`.. at (page[r], offset[r]) of each: ONE scatter, in place when the pool is donated.

    Padded rows point at page 0, where they may collide. Indices must be in range:
    0 <= page < pages_per_layer, 0 <= offset < page_size (unchecked: the engine's plan guarantees it).
    """
    ids = _token_ids(new.shape[0], page, offset, first_layer, pages_per_layer, pool.shape[2])
    return jax.lax.platform_dependent(pool, new.astype(pool.dtype), ids, tpu=_scatter_rows, default=_scatter_windows)


def _scatter_windows(
    pool: Float[Array, "K X *page_size H"], new: Float[Array, "L R K H"], ids: Int[Array, "L R"]
) -> Float[Array, "K X *page_size H"]:
    """One index per token, a window [K, H] each."""
    kv_heads, head_dim = pool.shape[0], pool.shape[-1]
    windows = jax.lax.ScatterDimensionNumbers(update_window_dims=(2, 3), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(1,))
    tokens = pool.reshape(kv_heads, -1, head_dim)
    return jax.lax.scatter(tokens, ids[..., None], new, windows, mode="promise_in_bounds").reshape(pool.shape)


def _scatter_rows(
    pool: Float[Array, "K X page_size H"], new: Float[Array, "L R K H"], ids: Int[Array, "L R"]
) -> Float[Array, "K X page_size H"]:
    """One index per token and head, a row [H] each: a window over heads makes the TPU compiler re-lay, so copy, the whole pool."""
    kv_heads, head_dim = pool.shape[0], pool.shape[-1]
    tokens = math.prod(pool.shape[1:-1])
    rows = jax.lax.ScatterDimensionNumbers(update_window_dims=(3,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))
    head = jnp.arange(kv_heads, dtype=jnp.int32) * tokens
    row = (ids[..., None] + head)[..., None]
    return jax.lax.scatter(pool.reshape(-1, head_dim), row, new, rows, mode="promise_in_bounds").reshape(pool.shape)


def write_pages(
    pool: Float[Array, "K X *page"],
    new: Float[Array, "L R K page_size"],
    page: Int[Array, " R"],
    *,
    pages_per_layer: int,
    first_layer: Int[Array, ""] | int = 0,
) -> Float[Array, "K X *page"]:
    """Writes whole pages, such as states: r of layers `first_layer`.. at page[r] of each; otherwise like `write_tokens`."""
    ids = _token_ids(new.shape[0], page, jnp.zeros_like(page), first_layer, pages_per_layer, 1)

    def as_tokens(pool: Array, new: Array, ids: Array) -> Array:
        return _scatter_windows(pool.reshape(*pool.shape[:2], -1), new, ids).reshape(pool.shape)

    return jax.lax.platform_dependent(pool, new.astype(pool.dtype), ids, tpu=_scatter_pages, default=as_tokens)


# Rows of every TPU tile divide this.
_TILE_ROWS = 16


def _scatter_pages(
    pool: Float[Array, "K X *page"], new: Float[Array, "L R K page_size"], ids: Int[Array, "L R"]
) -> Float[Array, "K X *page"]:
    """One index per page and head, see `_scatter_rows`.

    Pages of whole tiles lie below each other in one matrix, which a TPU leaves as it is; a stack of pages it may turn around, so copy.
    Other pages are no matrix without a copy.
    """
    kv_heads, pages, *page = pool.shape
    tiles = len(page) == 2 and page[0] % _TILE_ROWS == 0
    whole = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(3, 3 + len(page))),
        inserted_window_dims=() if tiles else (0,),
        scatter_dims_to_operand_dims=(0,),
    )
    head = jnp.arange(kv_heads, dtype=jnp.int32) * pages
    at = ((ids[..., None] + head) * (page[0] if tiles else 1))[..., None]
    operand = pool.reshape(-1, *(page[1:] if tiles else page))
    return jax.lax.scatter(operand, at, new.reshape(*new.shape[:3], *page), whole, mode="promise_in_bounds").reshape(pool.shape)


def read_pages(pool: Float[Array, "K X *page"], page: Int[Array, "..."]) -> Float[Array, "K ..."]:
    """Whole pages by their index in the pool: [K, *page.shape, *pool.shape[2:]].

    One index per page and head: a slice over heads, or single tokens, would make a TPU re-lay, so copy, the whole pool.
    """
    kv_heads, pages, *shape = pool.shape
    head = (jnp.arange(kv_heads, dtype=jnp.int32) * pages).reshape(kv_heads, *(1,) * page.ndim)
    found = pool.reshape(-1, *shape).at[head + page].get(mode="promise_in_bounds")
    # Whoever wants another order in front transposes what was read, not the pool.
    return with_layout_constraint(found, Layout(tuple(range(found.ndim))))


def gather_tokens(
    pool: Float[Array, "K X page_size H"],
    page: Int[Array, " R"],
    offset: Int[Array, " R"],
    *,
    pages_per_layer: int,
) -> Float[Array, "L R K H"]:
    """The inverse of `write_tokens`: token r of every layer, read at (page[r], offset[r]); the canonical export layout."""
    kv_heads, _, _, head_dim = pool.shape
    windows = jax.lax.GatherDimensionNumbers(offset_dims=(2, 3), collapsed_slice_dims=(1,), start_index_map=(1,))
    ids = _token_ids(pool.shape[1] // pages_per_layer, page, offset, 0, pages_per_layer, pool.shape[2])[..., None]
    return jax.lax.gather(pool.reshape(kv_heads, -1, head_dim), ids, windows, (kv_heads, 1, head_dim), mode="promise_in_bounds")

"""Tokens into and out of a paged pool, all layers at once.

Pages of all layers form one axis of tokens, so each (layer, token) is one index with a window [K, H], in the order of the
canonical layout [L, R, K, H]: no transposed copy on either way, and the fastest of the variants measured on CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _token_ids(
    pool: Float[Array, "K X page_size H"], page: Int[Array, " R"], offset: Int[Array, " R"], pages_per_layer: int
) -> Int[Array, "L R 1"]:
    """Index of each token in the pool's flattened [X * page_size] axis."""
    _, pages, page_size, _ = pool.shape
    layer = jnp.arange(pages // pages_per_layer, dtype=jnp.int32)[:, None]
    return ((layer * pages_per_layer + page) * page_size + offset)[..., None]


def write_tokens(
    pool: Float[Array, "K X page_size H"],
    new: Float[Array, "L R K H"],
    page: Int[Array, " R"],
    offset: Int[Array, " R"],
    *,
    pages_per_layer: int,
) -> Float[Array, "K X page_size H"]:
    """Writes token r of every layer at (page[r], offset[r]) of that layer: ONE scatter, in place when the pool is donated.

    Padded rows point at page 0, where they may collide. Indices must be in range: 0 <= page < pages_per_layer,
    0 <= offset < page_size (unchecked: the engine's plan guarantees it).
    """
    kv_heads, _, _, head_dim = pool.shape
    windows = jax.lax.ScatterDimensionNumbers(update_window_dims=(2, 3), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(1,))
    ids = _token_ids(pool, page, offset, pages_per_layer)
    tokens = pool.reshape(kv_heads, -1, head_dim)
    return jax.lax.scatter(tokens, ids, new.astype(pool.dtype), windows, mode="promise_in_bounds").reshape(pool.shape)


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
    ids = _token_ids(pool, page, offset, pages_per_layer)
    return jax.lax.gather(pool.reshape(kv_heads, -1, head_dim), ids, windows, (kv_heads, 1, head_dim), mode="promise_in_bounds")

"""Tokens into and out of a paged pool, all layers at once.

The pool's page axis is viewed as [L, P], so that one index (page, offset) addresses a token in every layer and kv head: R indices
with windows [K, L, H] instead of L * R small ones.
"""

from jaxtyping import Array, Float, Int


def _by_layer(pool: Array, pages_per_layer: int) -> Array:
    kv_heads, pages, page_size, head_dim = pool.shape
    return pool.reshape(kv_heads, pages // pages_per_layer, pages_per_layer, page_size, head_dim)


def write_tokens(
    pool: Float[Array, "K X page_size H"],
    new: Float[Array, "L R K H"],
    page: Int[Array, " R"],
    offset: Int[Array, " R"],
    *,
    pages_per_layer: int,
) -> Float[Array, "K X page_size H"]:
    """Writes token r of every layer at (page[r], offset[r]) of that layer; in place when the pool is donated.

    Padded rows point at page 0, where they may collide. Indices must be in range: 0 <= page < pages_per_layer,
    0 <= offset < page_size (unchecked: the engine's plan guarantees it).
    """
    tokens = new.astype(pool.dtype).transpose(2, 0, 1, 3)
    layers = _by_layer(pool, pages_per_layer)
    return layers.at[:, :, page, offset].set(tokens, mode="promise_in_bounds").reshape(pool.shape)


def gather_tokens(
    pool: Float[Array, "K X page_size H"],
    page: Int[Array, " R"],
    offset: Int[Array, " R"],
    *,
    pages_per_layer: int,
) -> Float[Array, "L R K H"]:
    """The inverse of `write_tokens`: token r of every layer, read at (page[r], offset[r]); the canonical export layout."""
    tokens = _by_layer(pool, pages_per_layer).at[:, :, page, offset].get(mode="promise_in_bounds")
    return tokens.transpose(1, 2, 0, 3)



"""The "pallas_tpu" implementation: the jax wheel's Mosaic kernel, with the pool passed whole.

The kernel rounds loaded K and V to bfloat16 whatever the pool's dtype, and masks by adding a huge negative number, so pages it
may load (a row's own, and page 0 of the layer) must hold finite values, also past the row's length; pools that start as zeros do.
"""

import contextlib

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel
from jaxtyping import Array, Float, Int

# Tokens that one step of the kernel loads.
_BLOCK_TOKENS = 512


def unsupported(*, head_dim: int, page_size: int) -> str | None:
    """Why the kernel does not take this shape, or None. Pages are copied as whole tiles: 128 lanes, 8 sublanes."""
    if head_dim % 128:
        return f"head_dim={head_dim} is not a multiple of 128"
    if page_size % 8:
        return f"page_size={page_size} is not a multiple of 8"
    return None


def paged_attention(
    q: Float[Array, "B N H"],
    k_pool: Float[Array, "K X page_size H"],
    v_pool: Float[Array, "K X page_size H"],
    table: Int[Array, "B MP"],
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    pages_per_layer: int,
    scale: float,
    interpret: bool,
) -> Float[Array, "B N H"]:
    """Attention over `lengths[b] + 1` tokens of the pool, the current one included."""
    pages = min(table.shape[1], max(1, _BLOCK_TOKENS // k_pool.shape[2]))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages))) + layer * pages_per_layer
    # float32 queries, so that folding the scale in rounds nothing.
    scaled = q.astype(jnp.float32) * scale
    with pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext():
        return kernel(scaled, k_pool, v_pool, lengths + 1, table, pages_per_compute_block=pages).astype(q.dtype)

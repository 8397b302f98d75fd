"""The "pallas_gpu" implementation: the jax wheel's Triton kernel, with the pool passed whole.

The kernel multiplies masked weights of exactly 0 with whatever V it loaded, so pages it may load (a row's own, and page 0 of the
layer) must hold finite values, also past the row's length; pools that start as zeros do.
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as kernel
from jaxtyping import Array, Float, Int

# Partitions of a row's keys that run in parallel; the kernel's own default.
_MAX_SPLITS = 16


def unsupported(*, head_dim: int, page_size: int) -> str | None:
    """Why the kernel does not take this shape, or None. Triton tensors have power-of-two sides, dots at least 16."""
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"head_dim={head_dim} is not a power of two >= 16"
    if page_size & (page_size - 1):
        return f"page_size={page_size} is not a power of two"
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
    head_dim, page_size = q.shape[-1], k_pool.shape[2]
    # Two key and two value blocks are in shared memory at a time: 64 KiB each at most.
    block_tokens = 128 if head_dim * k_pool.dtype.itemsize <= 256 else 64
    pages = max(1, block_tokens // page_size)
    splits = min(_MAX_SPLITS, -(-table.shape[1] // pages))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % (splits * pages)))) + layer * pages_per_layer
    out = kernel(
        (q.astype(jnp.float32) * scale).astype(k_pool.dtype),
        k_pool,
        v_pool,
        table,
        lengths + 1,
        pages_per_compute_block=pages,
        k_splits=splits,
        interpret=interpret,
    )
    return out.astype(q.dtype)

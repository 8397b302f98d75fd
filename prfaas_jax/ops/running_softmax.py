"""Softmax attention over key blocks that arrive one after another, and the read of one such block from a paged pool.

The state always starts from keys that every query may attend (at least its own), so its maximum is finite and a fully masked
block changes nothing, bit for bit: the maximum stays, its correction is exp(0) = 1 and its weights are exact zeros.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prfaas_jax.ops.thin_matmul import FEW_ROWS, matmul_transposed

# Tokens per key block: fixed, so that results do not depend on page size (as long as a page is no larger) or table width. Few queries
# read smaller blocks: less is read beyond a row's end, and a block stays in a CPU's cache between its gather and the two products.
KEY_BLOCK = 256
KEY_BLOCK_FEW = 128

# Score of a masked key: finite, so no inf - inf; far below any score, so its weight is exactly zero.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class SoftmaxState(NamedTuple):
    """Running softmax of `R` queries per kv head: `top` the largest score, `total` the sum of weights, `acc` the weighted values."""

    top: Float[Array, "K B R"]
    total: Float[Array, "K B R"]
    acc: Float[Array, "K B R H"]

    def output(self) -> Float[Array, "K B R H"]:
        """Attention output in float32."""
        return self.acc / self.total[..., None]


def scores(q: Float[Array, "K B R H"], k: Float[Array, "K B S H"], scale: float) -> Float[Array, "K B R S"]:
    """Scaled scores in float32."""
    return matmul_transposed(q, k, preferred_element_type=jnp.float32) * scale


def start_state(s: Float[Array, "K B R S"], v: Float[Array, "K B S H"]) -> SoftmaxState:
    """State after a first block whose masked scores are `MASKED`; each query must attend at least one key of it."""
    top = s.max(axis=-1)
    weights = jnp.exp(s - top[..., None])
    acc = jnp.einsum("kbrs,kbsh->kbrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return SoftmaxState(top, weights.sum(axis=-1), acc)


def add_block(state: SoftmaxState, s: Float[Array, "K B R S"], v: Float[Array, "K B S H"]) -> SoftmaxState:
    """State after one more block. Masked scores are `MASKED`; `v` must be finite there."""
    top = jnp.maximum(state.top, s.max(axis=-1))
    correction = jnp.exp(state.top - top)
    weights = jnp.exp(s - top[..., None])
    acc = jnp.einsum("kbrs,kbsh->kbrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return SoftmaxState(top, state.total * correction + weights.sum(axis=-1), state.acc * correction[..., None] + acc)


def add_cached(
    state: SoftmaxState,
    q: Float[Array, "K B R H"],
    k_pool: Float[Array, "K X page_size H"],
    v_pool: Float[Array, "K X page_size H"],
    table: Int[Array, "B MP"],
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    pages_per_layer: int,
    scale: float,
) -> SoftmaxState:
    """Adds each row's first `lengths[b]` cached tokens, read page by page; the cost follows the longest row, 0 reads nothing."""
    kv_heads, _, page_size, head_dim = k_pool.shape
    batch = table.shape[0]
    pages = max(1, (KEY_BLOCK_FEW if q.shape[2] < FEW_ROWS else KEY_BLOCK) // page_size)
    block = pages * page_size
    # Entries beyond the table's width are dummies: the last block may reach past it.
    table = jnp.pad(table + layer * pages_per_layer, ((0, 0), (0, -table.shape[1] % pages)))

    def read(pool: Array, ids: Int[Array, "B pages"], live: Bool[Array, "B S"]) -> Float[Array, "K B S H"]:
        tokens = pool.at[:, ids].get(mode="promise_in_bounds").reshape(kv_heads, batch, block, head_dim)
        # A weight of zero does not silence a NaN that a recycled page may hold.
        return jnp.where(live[None, :, :, None], tokens, 0)

    def body(i: Int[Array, ""], state: SoftmaxState) -> SoftmaxState:
        ids = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        live = i * block + jnp.arange(block) < lengths[:, None]
        s = jnp.where(live[None, :, None, :], scores(q, read(k_pool, ids, live), scale), MASKED)
        return add_block(state, s, read(v_pool, ids, live))

    return jax.lax.fori_loop(0, (lengths.max() + block - 1) // block, body, state)

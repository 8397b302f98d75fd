"""Softmax attention over key blocks that arrive one after another, and the reads of such blocks from a paged pool.

The state always starts from keys that every query may attend (at least its own), so its maximum is finite and a fully masked
block changes nothing, bit for bit: the maximum stays, its correction is exp(0) = 1 and its weights are exact zeros.
"""

import dataclasses
from collections.abc import Callable
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
    acc: Float[Array, "K B R Hv"]

    def output(self) -> Float[Array, "K B R Hv"]:
        """Attention output in float32."""
        return self.acc / self.total[..., None]


def scores(q: Float[Array, "K B R H"], k: Float[Array, "K B S H"], scale: float) -> Float[Array, "K B R S"]:
    """Scaled scores in float32."""
    return matmul_transposed(q, k, preferred_element_type=jnp.float32) * scale


def start_state(s: Float[Array, "K B R S"], v: Float[Array, "K B S Hv"]) -> SoftmaxState:
    """State after a first block whose masked scores are `MASKED`; each query must attend at least one key of it."""
    top = s.max(axis=-1)
    weights = jnp.exp(s - top[..., None])
    acc = jnp.einsum("kbrs,kbsh->kbrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return SoftmaxState(top, weights.sum(axis=-1), acc)


def add_block(state: SoftmaxState, s: Float[Array, "K B R S"], v: Float[Array, "K B S Hv"]) -> SoftmaxState:
    """State after one more block. Masked scores are `MASKED`; `v` must be finite there."""
    top = jnp.maximum(state.top, s.max(axis=-1))
    correction = jnp.exp(state.top - top)
    weights = jnp.exp(s - top[..., None])
    acc = jnp.einsum("kbrs,kbsh->kbrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return SoftmaxState(top, state.total * correction + weights.sum(axis=-1), state.acc * correction[..., None] + acc)


def add_sinks(state: SoftmaxState, sinks: Float[Array, " N"]) -> SoftmaxState:
    """State after one more key per query: its score is the query head's `sinks`, in float32, and it has no value.

    Queries are ordered as (N // K, tokens) within R, in every attention op.
    """
    kv_heads, _, rows = state.top.shape
    sink = jnp.repeat(sinks.reshape(kv_heads, 1, -1), rows * kv_heads // sinks.size, axis=2)
    top = jnp.maximum(state.top, sink)
    correction = jnp.exp(state.top - top)
    return SoftmaxState(top, state.total * correction + jnp.exp(sink - top), state.acc * correction[..., None])


# One key block: k [K, B, S, H], v [K, B, S, Hv] and which of its tokens are there, [B, S]. Both are finite everywhere: a weight of
# zero does not silence a NaN that a recycled page may hold.
Block = tuple[Float[Array, "K B S H"], Float[Array, "K B S Hv"], Bool[Array, "B S"]]


def add_blocks(
    state: SoftmaxState,
    q: Float[Array, "K B R H"],
    read: Callable[[Int[Array, ""]], Block],
    count: Int[Array, ""],
    *,
    scale: float,
) -> SoftmaxState:
    """Adds the blocks read(0) .. read(count - 1)."""

    def body(i: Int[Array, ""], state: SoftmaxState) -> SoftmaxState:
        k, v, live = read(i)
        return add_block(state, jnp.where(live[None, :, None, :], scores(q, k, scale), MASKED), v)

    return jax.lax.fori_loop(0, count, body, state)


@dataclasses.dataclass(frozen=True)
class CachedBlocks:
    """Each row's first `lengths[b]` cached tokens, block by block: `pages` pages of `page_size` tokens at a time.

    `ids` is the page of the pool, padded with dummies to whole blocks.
    """

    ids: Int[Array, "B MP"]
    lengths: Int[Array, " B"]
    pages: int
    page_size: int

    @classmethod
    def of(
        cls,
        table: Int[Array, "B MP"],
        lengths: Int[Array, " B"],
        layer: Int[Array, ""],
        *,
        rows: int,
        page_size: int,
        pages_per_layer: int,
    ) -> "CachedBlocks":
        """Blocks of a size that suits `rows` queries per kv head."""
        pages = max(1, (KEY_BLOCK_FEW if rows < FEW_ROWS else KEY_BLOCK) // page_size)
        ids = jnp.pad(table + layer * pages_per_layer, ((0, 0), (0, -table.shape[1] % pages)))
        return cls(ids, lengths, pages, page_size)

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.pages * self.page_size

    @property
    def count(self) -> Int[Array, ""]:
        """Blocks of the longest row."""
        return (self.lengths.max() + self.size - 1) // self.size

    def live(self, i: Int[Array, ""]) -> Bool[Array, "B S"]:
        """Which tokens of block i are cached."""
        return i * self.size + jnp.arange(self.size) < self.lengths[:, None]

    def read(self, pool: Float[Array, "K X page_size H"], i: Int[Array, ""]) -> Float[Array, "K B S H"]:
        """Block i, zeros where nothing is cached."""
        ids = jax.lax.dynamic_slice_in_dim(self.ids, i * self.pages, self.pages, axis=1)
        tokens = pool.at[:, ids].get(mode="promise_in_bounds").reshape(pool.shape[0], ids.shape[0], self.size, pool.shape[3])
        return jnp.where(self.live(i)[None, :, :, None], tokens, 0)


def add_cached(
    state: SoftmaxState,
    q: Float[Array, "K B R H"],
    k_pool: Float[Array, "K X page_size H"],
    v_pool: Float[Array, "K X page_size Hv"],
    table: Int[Array, "B MP"],
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    pages_per_layer: int,
    scale: float,
) -> SoftmaxState:
    """Adds each row's first `lengths[b]` cached tokens, read page by page; the cost follows the longest row, 0 reads nothing."""
    cached = CachedBlocks.of(
        table, lengths, layer, rows=q.shape[2], page_size=k_pool.shape[2], pages_per_layer=pages_per_layer
    )

    def read(i: Int[Array, ""]) -> Block:
        return cached.read(k_pool, i), cached.read(v_pool, i), cached.live(i)

    return add_blocks(state, q, read, cached.count, scale=scale)

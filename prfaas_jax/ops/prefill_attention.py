"""Causal attention of a prefill chunk over its cached prefix and itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prfaas_jax.ops.running_softmax import MASKED, SoftmaxState, add_block, add_cached, add_sinks, scores, start_state

# Query tokens per block: key blocks above the diagonal are skipped in steps of this.
QUERY_BLOCK = 128

# Chunks up to this many tokens meet their own keys in one dense block per query block; longer ones in blocks of this size.
DENSE_LIMIT = 512


def prefill_attention(
    q: Float[Array, "B T N H"],
    k_new: Float[Array, "B T K H"],
    v_new: Float[Array, "B T K Hv"],
    k_pool: Float[Array, "K X page_size H"],
    v_pool: Float[Array, "K X page_size Hv"],
    table: Int[Array, "B MP"],
    start: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    pages_per_layer: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Attention of T new tokens per row: over the `start[b]` tokens already in the pool, and causally over themselves.

    Shard-local. The pool is only read, `start == 0` in all rows reads nothing of it. Padding sits at a row's end and must be
    finite; valid tokens never attend it. A row's result depends on its own data only, not on its companions, its position
    in the bucket or the page size. `sinks` is a logit per query head that joins the softmax and takes no value.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k_pool.shape[0]
    group = heads // kv_heads
    size = min(tokens, DENSE_LIMIT)
    blocks = -(-tokens // size)
    pad = ((0, 0), (0, blocks * size - tokens), (0, 0), (0, 0))
    q_blocks = jnp.pad(q, pad).reshape(batch, blocks, size, kv_heads, group, head_dim).transpose(1, 3, 0, 4, 2, 5)
    k, v = (jnp.pad(x, pad).transpose(2, 0, 1, 3) for x in (k_new, v_new))

    def attend(i: Int[Array, ""], queries: Float[Array, "K B G t H"]) -> Float[Array, "K B G t Hv"]:
        def own(x: Array, j: Int[Array, ""]) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=2)

        rows = queries.reshape(kv_heads, batch, group * size, head_dim)

        def earlier(j: Int[Array, ""], state: SoftmaxState) -> SoftmaxState:
            return add_block(state, scores(rows, own(k, j), scale), own(v, j))

        state = causal_state(queries, own(k, i), own(v, i), scale)
        state = jax.lax.fori_loop(0, i, earlier, state)
        state = add_cached(state, rows, k_pool, v_pool, table, start, layer, pages_per_layer=pages_per_layer, scale=scale)
        if sinks is not None:
            state = add_sinks(state, sinks)
        return state.output().reshape(kv_heads, batch, group, size, -1).astype(q.dtype)

    out = attend(jnp.int32(0), q_blocks[0])[None] if blocks == 1 else jax.lax.map(lambda x: attend(*x), (jnp.arange(blocks), q_blocks))
    return out.transpose(2, 0, 4, 1, 3, 5).reshape(batch, blocks * size, heads, -1)[:, :tokens]


def causal_state(
    q: Float[Array, "K B G T H"], k: Float[Array, "K B T H"], v: Float[Array, "K B T Hv"], scale: float
) -> SoftmaxState:
    """Causal attention of T tokens over themselves: each query block meets the keys up to its own end."""
    kv_heads, batch, group, tokens, head_dim = q.shape
    parts = []
    for first in range(0, tokens, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, tokens)
        rows = q[:, :, :, first:last].reshape(kv_heads, batch, group * (last - first), head_dim)
        s = scores(rows, k[:, :, :last], scale)
        causal = jnp.arange(last) <= jnp.tile(jnp.arange(first, last), group)[:, None]
        state = start_state(jnp.where(causal, s, MASKED), v[:, :, :last])
        parts.append(jax.tree.map(lambda x, n=last - first: x.reshape(kv_heads, batch, group, n, *x.shape[3:]), state))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=3).reshape(kv_heads, batch, group * tokens, *xs[0].shape[4:]), *parts)

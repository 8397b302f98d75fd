"""The "xla" implementation: plain jnp, any platform, any shape; reads the pool and merges the current token itself."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prfaas_jax.ops.running_softmax import add_cached, add_sinks, scores, start_state


def paged_attention(
    q: Float[Array, "B N H"],
    k_new: Float[Array, "B K H"],
    v_new: Float[Array, "B K Hv"],
    k_pool: Float[Array, "K X page_size H"],
    v_pool: Float[Array, "K X page_size Hv"],
    table: Int[Array, "B MP"],
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    pages_per_layer: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B N Hv"]:
    """See `prfaas_jax.ops.paged_attention.paged_attention`."""
    batch, heads, head_dim = q.shape
    kv_heads = k_pool.shape[0]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 2, 3)
    k, v = (x.transpose(1, 0, 2)[:, :, None] for x in (k_new, v_new))
    state = start_state(scores(grouped, k, scale), v)
    state = add_cached(state, grouped, k_pool, v_pool, table, lengths, layer, pages_per_layer=pages_per_layer, scale=scale)
    if sinks is not None:
        state = add_sinks(state, sinks)
    return jnp.swapaxes(state.output(), 0, 1).reshape(batch, heads, -1).astype(q.dtype)

"""Multi-head latent attention (MLA): one cached latent per token, that all heads' keys and values are expanded from.

A latent [C] is [c | k_rope], R and Hr elements, after norm and rotation. Head n's key is [k_up[n] c | k_rope], its value v_up[n] c.
The pool is [1, layers * P, page_size, C]. Prefill expands latents block by block, which costs less where many queries share a block;
decode never does: q_nope goes through k_up instead, and v_up is applied to the weighted sum of latents.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prfaas_jax.ops.prefill_attention import DENSE_LIMIT, causal_state
from prfaas_jax.ops.running_softmax import MASKED, Block, CachedBlocks, SoftmaxState, add_block, add_blocks, scores, start_state


def latent_prefill(
    q_nope: Float[Array, "B T N Hn"],
    q_rope: Float[Array, "B T N Hr"],
    latent_new: Float[Array, "B T C"],
    pool: Float[Array, "1 X page_size C"],
    table: Int[Array, "B MP"],
    start: Int[Array, " B"],
    layer: Int[Array, ""],
    k_up: Float[Array, "N Hn R"],
    v_up: Float[Array, "N Hv R"],
    *,
    pages_per_layer: int,
    scale: float,
) -> Float[Array, "B T N Hv"]:
    """Attention of T new tokens per row: over the `start[b]` tokens already in the pool, and causally over themselves.

    Shard-local. The pool is only read, `start == 0` in all rows reads nothing of it. Every latent is expanded once, and never more
    than one block of them at a time. Padding sits at a row's end and must be finite; valid tokens never attend it. A row's result
    depends on its own data only, not on its companions, its position in the bucket or the page size.

    Args:
        q_nope: the part of the queries that meets expanded keys.
        q_rope: the part that meets what all heads share, already rotated.
        latent_new: the chunk's latents, C = R + Hr.
        pool: pages of all layers, X = L * pages_per_layer; page 0 of each layer is a dummy.
        table: page within a layer of each page of each row; unused entries 0.
        start: tokens before the chunk.
        layer: layer to read, may be traced.
        k_up: expands a latent to each head's keys.
        v_up: expands a latent to each head's values.
        pages_per_layer: P.
        scale: factor on q . k, usually (Hn + Hr) ** -0.5.
    """
    batch, tokens, heads, _ = q_nope.shape
    rank = k_up.shape[2]
    size = min(tokens, DENSE_LIMIT)
    blocks = -(-tokens // size)
    padding = blocks * size - tokens
    q = jnp.pad(jnp.concatenate([q_nope, q_rope], axis=-1), ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = q.reshape(batch, blocks, size, heads, -1).transpose(1, 3, 0, 2, 4)
    own = jnp.pad(latent_new, ((0, 0), (0, padding), (0, 0))).reshape(batch, blocks, size, -1).swapaxes(0, 1)

    def expand(latent: Float[Array, "B S C"]) -> tuple[Float[Array, "N B S H"], Float[Array, "N B S Hv"]]:
        c, k_rope = latent[..., :rank].astype(k_up.dtype), latent[..., rank:].astype(q.dtype)
        k, v = (jnp.einsum("bsr,nhr->nbsh", c, w, preferred_element_type=jnp.float32).astype(q.dtype) for w in (k_up, v_up))
        return jnp.concatenate([k, jnp.broadcast_to(k_rope, (heads, *k_rope.shape))], axis=-1), v

    def each(
        first: Int[Array, ""] | int, states: SoftmaxState, add: Callable[[SoftmaxState, Float[Array, "N B T H"]], SoftmaxState]
    ) -> SoftmaxState:
        """`add` applied to the states of query blocks first.. and their queries."""
        return jax.lax.fori_loop(first, blocks, lambda i, states: _put(states, i, add(_get(states, i), _get(q, i))), states)

    def add_own(step: Int[Array, ""], states: SoftmaxState) -> SoftmaxState:
        """Key block j starts its own queries' states and joins those of later queries, which started before: j counts down."""
        j = blocks - 1 - step
        k, v = expand(_get(own, j))
        states = _put(states, j, causal_state(_get(q, j)[:, :, None], k, v, scale))
        return each(j + 1, states, lambda state, rows: add_block(state, scores(rows, k, scale), v))

    cached = CachedBlocks.of(table, start, layer, rows=size, page_size=pool.shape[2], pages_per_layer=pages_per_layer)

    def add_prefix(i: Int[Array, ""], states: SoftmaxState) -> SoftmaxState:
        k, v = expand(cached.read(pool, i)[0])
        live = cached.live(i)[None, :, None, :]
        return each(0, states, lambda state, rows: add_block(state, jnp.where(live, scores(rows, k, scale), MASKED), v))

    rows = jnp.zeros((blocks, heads, batch, size), jnp.float32)
    states = SoftmaxState(rows, rows, jnp.zeros((*rows.shape, v_up.shape[1]), jnp.float32))
    states = jax.lax.fori_loop(0, blocks, add_own, states)
    states = jax.lax.fori_loop(0, cached.count, add_prefix, states)
    out = states.output().astype(q.dtype)
    return out.transpose(2, 0, 3, 1, 4).reshape(batch, blocks * size, heads, -1)[:, :tokens]


def latent_decode(
    q_nope: Float[Array, "B N Hn"],
    q_rope: Float[Array, "B N Hr"],
    latent_new: Float[Array, "B C"],
    pool: Float[Array, "1 X page_size C"],
    table: Int[Array, "B MP"],
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    k_up: Float[Array, "N Hn R"],
    v_up: Float[Array, "N Hv R"],
    *,
    pages_per_layer: int,
    scale: float,
) -> Float[Array, "B N Hv"]:
    """Attention of one new token per row over its `lengths[b]` cached tokens and itself: one key and value head of width C.

    Arguments and promises are those of `latent_prefill`. The new token need not be in the pool. Rows of length 0 with a dummy table
    are harmless.
    """
    rank = k_up.shape[2]
    # Heads in front: in the order "bnh,nhr->bnr" XLA's CPU backend has no such product of bfloat16.
    absorbed = jnp.einsum("nbh,nhr->nbr", q_nope.swapaxes(0, 1), k_up, preferred_element_type=jnp.float32)
    q = jnp.concatenate([absorbed.swapaxes(0, 1).astype(q_nope.dtype), q_rope], axis=-1)[None]
    cached = CachedBlocks.of(table, lengths, layer, rows=q.shape[2], page_size=pool.shape[2], pages_per_layer=pages_per_layer)

    def read(i: Int[Array, ""]) -> Block:
        # The shared part of a latent rides along as a value, and is cut off at the end: cheaper than a copy of each block without it.
        latents = cached.read(pool, i)
        return latents, latents, cached.live(i)

    own = latent_new[None, :, None]
    state = add_blocks(start_state(scores(q, own, scale), own), q, read, cached.count, scale=scale)
    context = state.output()[0, :, :, :rank].astype(v_up.dtype)
    return jnp.einsum("bnr,nvr->bnv", context, v_up, preferred_element_type=jnp.float32).astype(q_nope.dtype)


def _get(tree: Any, i: Int[Array, ""] | int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(states: SoftmaxState, i: Int[Array, ""] | int, state: SoftmaxState) -> SoftmaxState:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, axis=0), states, state)

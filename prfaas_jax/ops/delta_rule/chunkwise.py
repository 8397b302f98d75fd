"""The gated delta rule by chunks: the updates of a chunk's tokens solved at once (the WY form), then a scan over chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prfaas_jax.ops.delta_rule.within_chunk import inverse_of_one_plus, scores_per_channel, scores_per_head
from prfaas_jax.ops.products import einsum
from prfaas_jax.ops.token_chunks import CHUNK, float_where_live, join_chunks, live_in_chunk, live_tokens, split_chunks


class Chunk(NamedTuple):
    """One chunk, ready to meet a state. `solve` maps what the state and a token's key do not explain of its value to the updates."""

    live: Int[Array, " B"]
    keys_in: Float[Array, "B H C dk"]
    queries_in: Float[Array, "B H C dk"]
    keys_out: Float[Array, "B H C dk"]
    decay: Float[Array, "B H dg"]
    solve: Float[Array, "B H C C"]
    queries: Float[Array, "B H C C"]
    values: Float[Array, "B H C dv"]


def delta_rule(
    q: Float[Array, "B T H dk"],
    k: Float[Array, "B T H dk"],
    v: Float[Array, "B T H dv"],
    g: Float[Array, "B T H dg"],
    beta: Float[Array, "B T H 1"],
    state: Float[Array, "B H dk dv"],
    valid: Int[Array, " B"],
) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
    """See the package; beta has a last axis of 1."""
    chunks = tuple(split_chunks(x) for x in (q, k, v, g, beta))

    @jax.checkpoint
    def body(state: Float[Array, "B H dv dk"], chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        live, *padded = chunk
        # Here and not before the scan, where copies of whole sequences would cost more than they do within a chunk.
        tokens = (float_where_live(x, live_tokens(CHUNK, live)).swapaxes(1, 2) for x in padded)
        state, out = advance(state, _prepare(live, *tokens))
        return state, out.swapaxes(1, 2)

    # Transposed, the products need no other operand transposed but the updates.
    state, out = jax.lax.scan(body, state.mT, (live_in_chunk(len(chunks[0]), valid), *chunks))
    return join_chunks(out, q.shape[1]), state.mT


def _prepare(live: Array, q: Array, k: Array, v: Array, g: Array, beta: Array) -> Chunk:
    scores = (scores_per_channel if g.shape[-1] == k.shape[-1] > 1 else scores_per_head)(q, k, g)
    since_start = jnp.exp(scores.since_start)
    return Chunk(
        live=live,
        keys_in=k * since_start,
        queries_in=q * since_start,
        keys_out=k * jnp.exp(scores.until_end),
        decay=since_start[..., -1, :],
        solve=inverse_of_one_plus(beta * scores.keys) * beta.swapaxes(-1, -2),
        queries=scores.queries,
        values=v,
    )


def advance(state: Float[Array, "B H dv dk"], chunk: Chunk) -> tuple[Float[Array, "B H dv dk"], Float[Array, "B H C dv"]]:
    """The transposed state after a chunk, and the chunk's outputs."""
    unexplained = chunk.values - einsum("bhik,bhvk->bhiv", chunk.keys_in, state)
    updates = einsum("bhij,bhjv->bhiv", chunk.solve, unexplained)
    out = einsum("bhik,bhvk->bhiv", chunk.queries_in, state) + einsum("bhij,bhjv->bhiv", chunk.queries, updates)
    new = chunk.decay[..., None, :] * state + einsum("bhiv,bhik->bhvk", updates, chunk.keys_out)
    # A chunk of padding would turn -0 into 0.
    return jnp.where((chunk.live > 0)[:, None, None, None], new, state), out

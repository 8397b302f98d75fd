"""Lightning attention: linear attention whose state decays at a constant rate per head, by named implementations.

    recurrent   token by token; the reference, and the default for a single token
    chunkwise   matrix products within chunks of 64 tokens, a scan over chunks; the default otherwise
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.products import einsum, row_sum
from prfaas_jax.ops.token_chunks import CHUNK, float_where_live, join_chunks, live_in_chunk, live_tokens, split_chunks

IMPLEMENTATIONS = ("recurrent", "chunkwise")


def lightning_slopes(num_heads: int) -> Float[np.ndarray, " H"]:
    """ALiBi's series, the base rate of each head: `2 ** (-8 (h + 1) / num_heads)`."""
    return (0.5 ** (8 / num_heads)) ** np.arange(1, num_heads + 1, dtype=np.float64)


def log_decay(layer: Int[Array, ""] | int, num_layers: int, num_heads: int) -> Float[Array, " H"]:
    """Logarithm of each head's decay per token in a model of `num_layers` layers; `layer` counts from 0 and may be traced.

    Heads are all of the model's: a shard takes its slice.
    """
    # 1 - layer / (num_layers - 1 + 1e-5) + 1e-5 without cancellation: at the last layer it is 1e-5 and a bit.
    last = num_layers - 1
    factor = (jnp.asarray(last - layer, jnp.float32) + 1e-5) / (last + 1e-5) + 1e-5
    return -jnp.asarray(lightning_slopes(num_heads), jnp.float32) * factor


def lightning(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T H d"],
    v: Float[Array, "B T H d"],
    log_decay: Float[Array, " H"],
    state: Float[Array, "B H d d"],
    valid: Int[Array, " B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H d d"]]:
    """`S_t = exp(log_decay) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`, in float32.

    Shard-local. A row's result depends on its own data only; "chunkwise" split at a multiple of 64 tokens equals one call, bit for bit.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: logarithm of the decay per token, at most 0.
        state: S before the first token, float32.
        valid: tokens of each row that are no padding, 0..T; the rest leave the state as it is, and their outputs are finite.
        implementation: one of `IMPLEMENTATIONS`; None is "recurrent" for a single token, else "chunkwise".

    Raises:
        InvalidInput: unknown implementation.
    """
    name = implementation or ("recurrent" if q.shape[1] == 1 else "chunkwise")
    if name not in IMPLEMENTATIONS:
        raise InvalidInput("implementation", name, f"one of {IMPLEMENTATIONS}")
    return (_recurrent if name == "recurrent" else _chunkwise)(q, k, v, log_decay, state, valid)


def _recurrent(q: Array, k: Array, v: Array, log_decay: Array, state: Array, valid: Array) -> tuple[Array, Array]:
    decay = jnp.exp(log_decay)[:, None, None]

    def step(state: Float[Array, "B H d d"], token: tuple[Array, ...]) -> tuple[Array, Array]:
        position, *padded = token
        live = (position < valid)[:, None]
        q, k, v = (float_where_live(x[:, None], live)[:, 0] for x in padded)
        new = decay * state + k[..., None] * v[..., None, :]
        # The old state is read, not the new one, so that reading does not wait for writing.
        seen = einsum("bhk,bhkv->bhv", q, state) * decay[..., 0] + row_sum(q * k) * v
        return jnp.where(live[..., None, None], new, state), seen

    by_token = (jnp.arange(q.shape[1]), *(x.swapaxes(0, 1) for x in (q, k, v)))
    if q.shape[1] == 1:
        state, out = step(state, tuple(x[0] for x in by_token))
        return out[:, None], state
    state, out = jax.lax.scan(step, state, by_token)
    return out.swapaxes(0, 1), state


def _chunkwise(q: Array, k: Array, v: Array, log_decay: Array, state: Array, valid: Array) -> tuple[Array, Array]:
    position = jnp.arange(CHUNK)
    rate = log_decay[:, None]
    since_start = jnp.exp(rate * (position + 1))[..., None]
    gap = position[:, None] - position
    within = jnp.exp(jnp.where(gap >= 0, rate[..., None] * gap, -jnp.inf))

    @jax.checkpoint
    def body(state: Float[Array, "B H d d"], chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        live, *padded = chunk
        q, k, v = (float_where_live(x, live_tokens(CHUNK, live)).swapaxes(1, 2) for x in padded)
        seen = einsum("bhik,bhjk->bhij", q, k) * within
        out = einsum("bhik,bhkv->bhiv", q * since_start, state) + einsum("bhij,bhjv->bhiv", seen, v)
        # Keys at padding are zero: they only must not overflow.
        until_end = jnp.exp(rate * jnp.maximum(live[:, None, None] - 1 - position, 0))[..., None]
        new = jnp.exp(log_decay * live[:, None])[..., None, None] * state + einsum("bhik,bhiv->bhkv", k * until_end, v)
        return jnp.where((live > 0)[:, None, None, None], new, state), out.swapaxes(1, 2)

    chunks = tuple(split_chunks(x) for x in (q, k, v))
    state, out = jax.lax.scan(body, state, (live_in_chunk(len(chunks[0]), valid), *chunks))
    return join_chunks(out, q.shape[1]), state

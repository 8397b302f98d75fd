"""Tokens in chunks of a fixed size, over which linear attention scans a sequence.

The scan's body has the same shapes whatever the sequence's length, so a sequence that is resumed at a multiple of `CHUNK` repeats
the very same operations.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Tokens per chunk. Recurrent states are exact at multiples of it.
CHUNK = 64


def live_tokens(tokens: int, valid: Int[Array, " B"]) -> Bool[Array, "B T"]:
    """Which tokens are no padding: those before `valid[b]`."""
    return jnp.arange(tokens) < valid[:, None]


def float_where_live(x: Float[Array, "B T *rest"], live: Bool[Array, "B T"]) -> Float[Array, "B T *rest"]:
    """`x` in float32, zero where a token is padding, whatever stood there."""
    return jnp.where(live.reshape(*live.shape, *(1,) * (x.ndim - 2)), x.astype(jnp.float32), 0)


def split_chunks(x: Float[Array, "B T H d"]) -> Float[Array, "n B C H d"]:
    """Chunks of `CHUNK` tokens, the last one filled up with zeros. A scan's body moves heads to the front: there it costs no memory."""
    batch, tokens, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -tokens % CHUNK), (0, 0), (0, 0)))
    return x.reshape(batch, -1, CHUNK, heads, dim).swapaxes(0, 1)


def join_chunks(x: Float[Array, "n B C H d"], tokens: int) -> Float[Array, "B T H d"]:
    """The inverse of `split_chunks`."""
    chunks, batch, size, heads, dim = x.shape
    return x.swapaxes(0, 1).reshape(batch, chunks * size, heads, dim)[:, :tokens]


def live_in_chunk(chunks: int, valid: Int[Array, " B"]) -> Int[Array, "n B"]:
    """How many tokens of each chunk are no padding, 0..CHUNK."""
    return jnp.clip(valid - CHUNK * jnp.arange(chunks)[:, None], 0, CHUNK)

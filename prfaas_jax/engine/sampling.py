"""Drawing tokens: greedy, temperature, top-k, top-p, each row with its own parameters and its own key.

The vocabulary axis may be sharded, so nothing here sorts, gathers or indexes along it: thresholds are found by bisection, whose
every pass is a sum over the vocabulary. (A sort of 150,000 logits takes the TPU compiler minutes.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prfaas_jax.engine.plan import SamplingRows


def sample(
    logits: Float[Array, "B V"], rows: SamplingRows, position: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token per row; returns tokens and their log-probabilities under the unmodified distribution.

    `position` is the absolute position of the drawn token. The key is fold_in(key(seed), position), so neither placement nor
    batching nor a retry changes a seeded sample. Ties at the top-k or top-p border are all kept.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature = jnp.asarray(rows.temperature)
    # The thresholds are only paid for when some row of the batch asks for them.
    token = jax.lax.cond(
        jnp.any(temperature > 0),
        lambda: jnp.where(temperature > 0, _draw(logits, rows, position), greedy),
        lambda: greedy,
    )
    drawn = jnp.where(jnp.arange(logits.shape[-1]) == token[:, None], logits, 0).sum(axis=-1)
    return token, drawn - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: Float[Array, "B V"], rows: SamplingRows, position: Int[Array, " B"]) -> Int[Array, " B"]:
    vocab = logits.shape[-1]
    # Differences to the largest logit: a tiny temperature may send all others to -inf, but never makes inf - inf.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = below / jnp.maximum(jnp.where(rows.temperature > 0, rows.temperature, 1.0), jnp.finfo(jnp.float32).tiny)[:, None]
    key = _ordered(scaled)
    top_k = jnp.where(rows.top_k > 0, rows.top_k, vocab)
    # The largest border with at least top_k tokens at or above it.
    border = _bisect(key, lambda t: (key >= t[:, None]).sum(axis=-1) >= top_k)
    mass = jax.nn.softmax(jnp.where(key >= border[:, None], scaled, -jnp.inf), axis=-1)
    # A token stays while the mass above it is below top_p: the likeliest one always does. All below the largest border at which
    # the mass above has reached top_p go.
    gone = _bisect(key, lambda t: jnp.where(key > t[:, None], mass, 0).sum(axis=-1) >= rows.top_p)
    border = jnp.where(rows.top_p < 1, jnp.maximum(border, gone + 1), border)
    keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(jnp.asarray(rows.seed), position)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,), jnp.float32))(keys)
    return jnp.argmax(jnp.where(key >= border[:, None], scaled, -jnp.inf) + noise, axis=-1).astype(jnp.int32)


def _ordered(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """float32 as int32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _bisect(key: Int[Array, "B V"], holds: Callable[[Int[Array, " B"]], Bool[Array, " B"]]) -> Int[Array, " B"]:
    """Per row the largest t in [min(key) - 1, max(key)] at which `holds`, which holds up to some t and not beyond."""
    low, high = key.min(axis=-1) - 1, key.max(axis=-1) + 1

    def halve(_: Int[Array, ""], ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        held = holds(middle)
        return jnp.where(held, middle, low), jnp.where(held, high, middle)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]

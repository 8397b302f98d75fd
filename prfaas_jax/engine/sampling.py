"""Drawing tokens: greedy, temperature, top-k, top-p, each row with its own parameters and its own key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    # The sort is only paid for when some row of the batch asks for it.
    token = jax.lax.cond(
        jnp.any(temperature > 0),
        lambda: jnp.where(temperature > 0, _draw(logits, rows, position), greedy),
        lambda: greedy,
    )
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    return token, logprob


def _draw(logits: Float[Array, "B V"], rows: SamplingRows, position: Int[Array, " B"]) -> Int[Array, " B"]:
    vocab = logits.shape[-1]
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    rank = jnp.arange(vocab)
    top_k = jnp.where(rows.top_k > 0, rows.top_k, vocab)[:, None]
    mass = jax.nn.softmax(jnp.where(rank < top_k, ordered, -jnp.inf), axis=-1)
    # A token stays while the mass in front of it is below top_p: the likeliest one always does.
    kept = (rank < top_k) & (jnp.cumsum(mass, axis=-1) - mass < rows.top_p[:, None])
    floor = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(jnp.asarray(rows.seed), position)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,), jnp.float32))(keys)
    return jnp.argmax(jnp.where(scaled >= floor, scaled, -jnp.inf) + noise, axis=-1).astype(jnp.int32)

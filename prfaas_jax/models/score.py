"""Teacher-forced scoring of whole token sequences with dense causal attention: perplexity, and the oracle of the paged engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.params import abstract
from prfaas_jax.sharding import Sharder


def dense_attend(
    layer: jax.Array, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], carry: None
) -> tuple[Float[Array, "B T N H"], None]:
    """Causal attention over the sequence itself, softmax in float32; the [T, T] scores are materialised."""
    del layer
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape), carry


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward_logits(config: ModelConfig, params: nnx.State, tokens: Int[Array, "B T"], shard: Sharder) -> Float[Array, "B T V"]:
    """Logits of the token after every position, float32, each sequence starting at position 0."""
    model = nnx.merge(abstract(config)[0], params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = model(tokens, positions, dense_attend, None, shard)
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logprobs(config: ModelConfig, params: nnx.State, tokens: Int[Array, "B T"], shard: Sharder) -> Float[Array, "B T-1"]:
    logits = forward_logits(config, params, tokens, shard)[:, :-1]
    drawn = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return drawn - jax.nn.logsumexp(logits, axis=-1)


def score(config: ModelConfig, params: nnx.State, tokens: np.ndarray, shard: Sharder) -> np.ndarray:
    """Log-probability of every token given those before it.

    Args:
        config: the model.
        params: its parameters, placed as `shard` says.
        tokens: int [B, T], T >= 2, unpadded. Compiles once per shape.
        shard: the mesh.

    Returns:
        float32 [B, T - 1]; entry t is log p(tokens[t + 1] | tokens[: t + 1]), in nats.

    Raises InvalidInput for a wrong rank or length, or ids outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.shape[1] > config.max_position:
        raise InvalidInput("tokens shape", tokens.shape, f"[B, T] with 2 <= T <= max_position={config.max_position}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise InvalidInput("tokens", (int(tokens.min()), int(tokens.max())), f"ids in [0, {config.vocab_size})")
    return np.asarray(_logprobs(config, params, tokens.astype(np.int32), shard))


def perplexity(config: ModelConfig, params: nnx.State, tokens: np.ndarray, shard: Sharder) -> float:
    """exp of the mean negative log-probability of `tokens` [B, T], the first token of each row not counted."""
    return float(np.exp(-score(config, params, tokens, shard).astype(np.float64).mean()))

"""Teacher-forced scoring of whole token sequences with dense causal attention: perplexity, and the oracle of the paged engine."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import CacheSpec, cache_spec
from prfaas_jax.models.caching import New, Place
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import AttentionConfig, LatentConfig
from prfaas_jax.models.params import abstract
from prfaas_jax.sharding import Sharder


class WholeSequence:
    """The `Cache` of a forward pass that starts at position 0 and keeps nothing: attention in its dense form, states from zero."""

    def __init__(self, spec: CacheSpec, tokens: Int[Array, "B T"], shard: Sharder):
        self.spec, self.shard = spec, shard
        self.valid = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)

    def attend(
        self,
        place: Place,
        config: AttentionConfig,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K Hv"],
        sinks: Float[Array, " N"] | None,
        carry: Any,
    ) -> tuple[Float[Array, "B T N Hv"], Any]:
        """See `Cache.attend`."""
        del place
        return _dense_attention(q, k, v, config.softmax_scale, config.window, sinks), carry

    def attend_latent(
        self,
        place: Place,
        config: LatentConfig,
        q_nope: Float[Array, "B T N Hn"],
        q_rope: Float[Array, "B T N Hr"],
        latent: Float[Array, "B T C"],
        k_up: Float[Array, "N Hn R"],
        v_up: Float[Array, "N Hv R"],
    ) -> Float[Array, "B T N Hv"]:
        """See `Cache.attend_latent`."""
        del place
        c, k_rope = latent[..., : config.kv_lora_rank], latent[..., config.kv_lora_rank :]
        k_nope, v = jnp.einsum("btr,nhr->btnh", c, k_up), jnp.einsum("btr,nhr->btnh", c, v_up)
        k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], config.rope_dim))
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)
        return _dense_attention(q, k, v, config.softmax_scale)

    def states(self, place: Place) -> New:
        """See `Cache.states`."""
        batch, tensors = self.valid.shape[0], self.spec.groups[place.group].cache.tensors
        heads = lambda t: t.heads * self.shard.copies(t.heads)  # noqa: E731
        return tuple(jnp.zeros((batch, heads(t), t.width), jnp.dtype(t.dtype)) for t in tensors)


def _dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    scale: float,
    window: int | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of a sequence's last T tokens over all S of it, softmax in float32; the [T, S] scores are materialised."""
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    grouped = q.reshape(batch, length, k.shape[2], group, dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    total = k.shape[1]
    behind = jnp.arange(total - length, total)[:, None] - jnp.arange(total)
    visible = (behind >= 0) & (behind <= (total if window is None else window))
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.reshape(1, -1, group, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :total].astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, heads, v.shape[-1])


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward_logits(config: ModelConfig, params: nnx.State, tokens: Int[Array, "B T"], shard: Sharder) -> Float[Array, "B T V"]:
    """Logits of the token after every position, float32, each sequence starting at position 0."""
    model = nnx.merge(abstract(config)[0], params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = model(tokens, positions, WholeSequence(cache_spec(config), tokens, shard), None, shard)
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

"""Multi-head latent attention (MLA): one cached latent per token, shared by all heads."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from prfaas_jax.models.caching import New, Place, Step
from prfaas_jax.models.layer_config import LatentConfig
from prfaas_jax.models.modules import Linear, Maker, RMSNorm
from prfaas_jax.models.rope import rotate

# Norms of the compressed queries and latents have this epsilon in every published model, whatever the model's own.
LATENT_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Queries, and the latent that keys and values are expanded from; the cache's `attend_latent` does the rest."""

    def __init__(self, config: LatentConfig, make: Maker):
        self.config = config
        d, n, rank = make.config.hidden_size, config.num_heads, config.kv_lora_rank
        queries = n * (config.nope_dim + config.rope_dim)
        q_rank = config.q_lora_rank
        self.q_proj = Linear(make, queries, d, ("heads", "embed")) if q_rank is None else None
        self.q_a_proj = None if q_rank is None else Linear(make, q_rank, d, ("latent", "embed"))
        self.q_a_norm = None if q_rank is None else RMSNorm(make, q_rank, "latent", eps=LATENT_EPS)
        self.q_b_proj = None if q_rank is None else Linear(make, queries, q_rank, ("heads", "latent"))
        self.kv_a_proj = Linear(make, rank + config.rope_dim, d, ("latent", "embed"))
        self.kv_a_norm = RMSNorm(make, rank, "latent", eps=LATENT_EPS)
        self.k_up = make((n, config.nope_dim, rank), ("heads", "head_dim", "latent"))
        self.v_up = make((n, config.value_dim, rank), ("heads", "head_dim", "latent"))
        self.o_proj = Linear(make, d, n * config.value_dim, ("embed", "heads"))

    def __call__(self, x: Float[Array, "B T D"], place: Place, step: Step, carry: Any) -> tuple[Float[Array, "B T D"], Any, New]:
        """Returns the branch, the carry, and this layer's new latents [B, T, 1, rank + rope]."""
        config = self.config
        q = self._queries(x).reshape(*x.shape[:2], config.num_heads, -1)
        q = step.shard.constrain(q, "batch", None, "heads", None)
        q_nope, q_rope = q[..., : config.nope_dim], q[..., config.nope_dim :]
        compressed = self.kv_a_proj(x)
        c, k_rope = self.kv_a_norm(compressed[..., : config.kv_lora_rank]), compressed[..., config.kv_lora_rank :]
        if config.rope is not None:
            tables = step.rope[config.rope, config.rope.dims or config.rope_dim]
            q_rope, k_rope = rotate(q_rope, tables), rotate(k_rope[:, :, None], tables)[:, :, 0]
        latent = step.shard.constrain(jnp.concatenate([c, k_rope], axis=-1), "batch", None, "latent")
        o = step.cache.attend_latent(place, config, q_nope, q_rope, latent, self.k_up[...], self.v_up[...])
        return self.o_proj(o.reshape(*x.shape[:2], -1)), carry, (latent[:, :, None],)

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Q"]:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None and self.q_a_norm is not None and self.q_b_proj is not None
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))

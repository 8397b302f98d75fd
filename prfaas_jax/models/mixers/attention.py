"""Grouped-query softmax attention: full or windowed, with optional sinks, norms and output gate."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from prfaas_jax.models.caching import New, Place, Step
from prfaas_jax.models.layer_config import AttentionConfig
from prfaas_jax.models.modules import Linear, Maker, RMSNorm
from prfaas_jax.models.rope import rotate


class Attention(nnx.Module):
    """Projections, optional q/k norm, rotary embedding; the cache's `attend` does the rest."""

    def __init__(self, config: AttentionConfig, make: Maker):
        self.config = config
        d, n, k = make.config.hidden_size, config.num_heads, config.num_kv_heads
        self.kv_axis = f"kv_heads/{k}"
        self.q_proj = Linear(make, n * config.head_dim, d, ("heads", "embed"), config.bias)
        self.k_proj = Linear(make, k * config.head_dim, d, (self.kv_axis, "embed"), config.bias)
        self.v_proj = Linear(make, k * config.values, d, (self.kv_axis, "embed"), config.bias)
        self.o_proj = Linear(make, d, n * config.values, ("embed", "heads"))
        self.gate_proj = Linear(make, n * config.values, d, ("heads", "embed")) if config.output_gate else None
        self.sinks = make((n,), ("heads",), nnx.initializers.zeros) if config.sinks else None
        normed, together = config.qk_norm != "none", config.qk_norm == "all"
        sizes = (n * config.head_dim, k * config.head_dim) if together else (config.head_dim,) * 2
        axes = ("heads", self.kv_axis) if together else ("head_dim",) * 2
        self.q_norm = RMSNorm(make, sizes[0], axes[0], make.config.norm_offset) if normed else None
        self.k_norm = RMSNorm(make, sizes[1], axes[1], make.config.norm_offset) if normed else None

    def __call__(self, x: Float[Array, "B T D"], place: Place, step: Step, carry: Any) -> tuple[Float[Array, "B T D"], Any, New]:
        """Returns the branch, the carry, and this layer's new (k, v), as they are cached: after norm, rotation and scale."""
        q, k, v = self.project(x, step)
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        o, carry = step.cache.attend(place, self.config, q, k, v, sinks, carry)
        o = o.reshape(*o.shape[:2], -1)
        if self.gate_proj is not None:
            o = o * jax.nn.sigmoid(self.gate_proj(x))
        return self.o_proj(o), carry, (k, v)

    def project(
        self, x: Float[Array, "B T D"], step: Step
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K Hv"]]:
        """q, k, v as they are attended and cached; kv heads fewer than the devices that share them come in copies."""
        config, shard = self.config, step.shard
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.qk_norm == "all":
            q, k = self._normed(q, k)
        heads = lambda y, size: y.reshape(*y.shape[:2], -1, size)  # noqa: E731
        q, k, v = heads(q, config.head_dim), heads(k, config.head_dim), heads(v, config.values)
        if config.qk_norm == "head":
            q, k = self._normed(q, k)
        if config.value_scale != 1.0:
            v = v * jnp.asarray(config.value_scale, v.dtype)
        if config.rope is not None:
            tables = step.rope[config.rope, config.rope.dims or config.head_dim]
            q, k = rotate(q, tables), rotate(k, tables)
        k, v = (shard.spread(y, config.num_kv_heads, axis=2) for y in (k, v))
        kv = ("batch", None, "kv_heads", None)
        return shard.constrain(q, "batch", None, "heads", None), shard.constrain(k, *kv), shard.constrain(v, *kv)

    def _normed(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert self.q_norm is not None and self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)

"""Lightning attention: linear attention whose state decays at a fixed rate per head and layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from prfaas_jax.models.caching import New, Place, Step
from prfaas_jax.models.layer_config import LightningConfig
from prfaas_jax.models.modules import ACTIVATIONS, Linear, Maker, RMSNorm, unit_rms
from prfaas_jax.models.rope import rotate
from prfaas_jax.ops.lightning import lightning, log_decay

# The output norm has this epsilon in every published model, whatever the model's own.
LIGHTNING_EPS = 1e-6

_HEADS = ("batch", None, "heads", None)
_STATE = ("batch", "heads", None)


class Lightning(nnx.Module):
    """Lightning attention (MiniMax-Text-01, Ring 2.5)."""

    def __init__(self, config: LightningConfig, make: Maker):
        self.config, self.num_layers = config, make.config.num_layers
        d, width = make.config.hidden_size, config.num_heads * config.head_dim
        wide = ("heads", "embed")
        self.q_proj, self.k_proj = Linear(make, width, d, wide), Linear(make, width, d, wide)
        self.v_proj, self.gate_proj = Linear(make, width, d, wide), Linear(make, width, d, wide)
        self.o_proj = Linear(make, d, width, ("embed", "heads"))
        self.o_norm = nnx.Dict(weight=make((width,), ("heads",), nnx.initializers.ones))
        self.q_norm = RMSNorm(make, config.head_dim, "head_dim") if config.qk_norm else None
        self.k_norm = RMSNorm(make, config.head_dim, "head_dim") if config.qk_norm else None

    def __call__(self, x: Float[Array, "B T D"], place: Place, step: Step, carry: Any) -> tuple[Float[Array, "B T D"], Any, New]:
        """Returns the branch, the carry, and this layer's state after the new tokens."""
        config = self.config
        q, k, v = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj))
        if config.activation is not None:
            q, k, v = (ACTIVATIONS[config.activation](y) for y in (q, k, v))
        q, k, v = (step.shard.constrain(y.reshape(*y.shape[:2], -1, config.head_dim), *_HEADS) for y in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope is not None:
            tables = step.rope[config.rope, config.rope.dims or config.head_dim]
            q, k = rotate(q, tables), rotate(k, tables)
        if config.scale != 1.0:
            q = q * jnp.asarray(config.scale, q.dtype)
        decay = log_decay(place.layer, self.num_layers, config.num_heads)
        axes = (_HEADS, _HEADS, _HEADS, ("heads",), _STATE, ("batch",))
        (state,) = step.cache.states(place)
        o, state = step.island(_mix, axes, (_HEADS, _STATE))(q, k, v, decay, state, step.cache.valid)
        o = self._norm(o.astype(x.dtype)) * jax.nn.sigmoid(self.gate_proj(x))
        return self.o_proj(o), carry, (state,)

    def _norm(self, o: Float[Array, "B T N H"]) -> Float[Array, "B T NH"]:
        """RMS norm over the heads of each group together."""
        wide = unit_rms(o.reshape(*o.shape[:2], self.config.norm_groups, -1), LIGHTNING_EPS)
        return self.o_norm["weight"][...] * wide.reshape(*o.shape[:2], -1).astype(o.dtype)


def _mix(
    q: Float[Array, "B T H d"], k: Float[Array, "B T H d"], v: Float[Array, "B T H d"], decay: jax.Array, state: jax.Array, valid: jax.Array
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H dd"]]:
    """Lightning attention on one device's heads, in float32."""
    dim = q.shape[-1]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    o, new = lightning(q, k, v, decay, state.reshape(*state.shape[:2], dim, dim), valid)
    return o, new.reshape(state.shape)

"""Delta-rule mixers: Kimi Delta Attention (decay per key channel) and Gated DeltaNet (decay per head)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from prfaas_jax.models.caching import New, Place, Step
from prfaas_jax.models.layer_config import GatedDeltaConfig, KdaConfig
from prfaas_jax.models.modules import Linear, Maker, gated_rms_norm
from prfaas_jax.ops.causal_conv import causal_conv
from prfaas_jax.ops.delta_rule import delta_rule, l2_normalize

_HEADS = ("batch", None, "heads", None)
_STATE = ("batch", "heads", None)


def _mix(
    q: Float[Array, "B T Hk d"],
    k: Float[Array, "B T Hk d"],
    v: Float[Array, "B T H dv"],
    g: Float[Array, "B T H _"],
    beta: Float[Array, "B T H"],
    convs: tuple[jax.Array, jax.Array, jax.Array],
    states: New,
    valid: jax.Array,
) -> tuple[Float[Array, "B T H dv"], New]:
    """Convolutions, SiLU, normalisation and the delta rule on one device's heads; the recurrence runs in float32."""
    recurrent, *tails = states
    (q, q_tail), (k, k_tail), (v, v_tail) = (
        causal_conv(x, tail, w, valid) for x, tail, w in zip((q, k, v), tails, convs, strict=True)
    )
    q, k, v = (jax.nn.silu(x) for x in (q, k, v))
    q, k = l2_normalize(q) * q.shape[-1] ** -0.5, l2_normalize(k)
    # Each q/k head serves a run of consecutive value heads.
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    state = recurrent.reshape(*recurrent.shape[:2], k.shape[-1], v.shape[-1])
    o, state = delta_rule(q, k, v.astype(jnp.float32), g, beta, state, valid)
    return o, (state.reshape(recurrent.shape), q_tail, k_tail, v_tail)


def _run(
    step: Step, place: Place, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, convs: tuple, key_heads: int
) -> tuple[jax.Array, New]:
    """`_mix` shard by shard; q/k heads fewer than the devices that share them come in copies."""
    spread = lambda x, axis: step.shard.spread(x, key_heads, axis)  # noqa: E731
    q, k, convs = spread(q, 2), spread(k, 2), (spread(convs[0], 0), spread(convs[1], 0), convs[2])
    conv_axes = (("heads", None, None),) * 3
    states = step.cache.states(place)
    axes = (_HEADS, _HEADS, _HEADS, _HEADS, ("batch", None, "heads"), conv_axes, (_STATE,) * 4, ("batch",))
    return step.island(_mix, axes, (_HEADS, (_STATE,) * 4))(q, k, v, g, beta, convs, states, step.cache.valid)


def _heads(step: Step, x: Float[Array, "B T X"], size: int, axis: str = "heads") -> Float[Array, "B T H size"]:
    return step.shard.constrain(x.reshape(*x.shape[:2], -1, size), "batch", None, axis, None)


def _decay_init(low: float, high: float) -> Callable[..., jax.Array]:
    """Decay rates spread evenly in log scale, as the models are trained from."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


class KimiDelta(nnx.Module):
    """Kimi Delta Attention (Kimi Linear)."""

    def __init__(self, config: KdaConfig, make: Maker):
        self.config, self.eps = config, make.config.rms_norm_eps
        d, h, dk, dv, w = make.config.hidden_size, config.num_heads, config.key_dim, config.value_dim, config.conv_width
        out = ("heads", "embed")
        self.q_proj, self.k_proj = Linear(make, h * dk, d, out), Linear(make, h * dk, d, out)
        self.v_proj, self.o_proj = Linear(make, h * dv, d, out), Linear(make, d, h * dv, ("embed", "heads"))
        conv = ("heads", "head_dim", "latent")
        self.q_conv, self.k_conv, self.v_conv = make((h, dk, w), conv), make((h, dk, w), conv), make((h, dv, w), conv)
        self.a_log = make((h,), ("heads",), _decay_init(1.0, 16.0), "float32")
        self.dt_bias = make((h, dk), ("heads", "head_dim"), None, "float32")
        self.f_a_proj = Linear(make, config.gate_rank, d, ("latent", "embed"))
        self.f_b_proj = Linear(make, h * dk, config.gate_rank, ("heads", "latent"))
        self.g_a_proj = Linear(make, config.gate_rank, d, ("latent", "embed"))
        self.g_b_proj = Linear(make, h * dv, config.gate_rank, ("heads", "latent"))
        self.b_proj = Linear(make, h, d, out)
        self.o_norm = nnx.Dict(weight=make((dv,), ("head_dim",), nnx.initializers.ones))

    def __call__(self, x: Float[Array, "B T D"], place: Place, step: Step, carry: Any) -> tuple[Float[Array, "B T D"], Any, New]:
        """Returns the branch, the carry, and this layer's state after the new tokens."""
        config = self.config
        q, k = (_heads(step, p(x), config.key_dim) for p in (self.q_proj, self.k_proj))
        v = _heads(step, self.v_proj(x), config.value_dim)
        decay = _heads(step, self.f_b_proj(self.f_a_proj(x)), config.key_dim).astype(jnp.float32)
        g = -jnp.exp(self.a_log[...])[:, None] * jax.nn.softplus(decay + self.dt_bias[...])
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        convs = (self.q_conv[...], self.k_conv[...], self.v_conv[...])
        o, new = _run(step, place, q, k, v, g, beta, convs, config.num_heads)
        gate = jax.nn.sigmoid(_heads(step, self.g_b_proj(self.g_a_proj(x)), config.value_dim).astype(jnp.float32))
        o = gated_rms_norm(o.astype(x.dtype), self.o_norm["weight"][...], gate, self.eps).astype(x.dtype)
        return self.o_proj(o.reshape(*x.shape[:2], -1)), carry, new


class GatedDelta(nnx.Module):
    """Gated DeltaNet (Qwen3-Next, Qwen3.5)."""

    def __init__(self, config: GatedDeltaConfig, make: Maker):
        self.config, self.eps = config, make.config.rms_norm_eps
        hk, hv, dk, dv, w = config.num_key_heads, config.num_value_heads, config.key_dim, config.value_dim, config.conv_width
        d, self.key_axis = make.config.hidden_size, f"kv_heads/{hk}"
        keys, values = (self.key_axis, "embed"), ("heads", "embed")
        self.q_proj, self.k_proj = Linear(make, hk * dk, d, keys), Linear(make, hk * dk, d, keys)
        self.v_proj, self.z_proj = Linear(make, hv * dv, d, values), Linear(make, hv * dv, d, values)
        self.b_proj, self.a_proj = Linear(make, hv, d, values), Linear(make, hv, d, values)
        self.o_proj = Linear(make, d, hv * dv, ("embed", "heads"))
        conv = (self.key_axis, "head_dim", "latent")
        self.q_conv, self.k_conv = make((hk, dk, w), conv), make((hk, dk, w), conv)
        self.v_conv = make((hv, dv, w), ("heads", "head_dim", "latent"))
        self.a_log = make((hv,), ("heads",), _decay_init(0.01, 16.0), "float32")
        self.dt_bias = make((hv,), ("heads",), nnx.initializers.ones, "float32")
        self.o_norm = nnx.Dict(weight=make((dv,), ("head_dim",), nnx.initializers.ones))

    def __call__(self, x: Float[Array, "B T D"], place: Place, step: Step, carry: Any) -> tuple[Float[Array, "B T D"], Any, New]:
        """Returns the branch, the carry, and this layer's state after the new tokens."""
        config = self.config
        q, k = (_heads(step, p(x), config.key_dim, self.key_axis) for p in (self.q_proj, self.k_proj))
        v = _heads(step, self.v_proj(x), config.value_dim)
        g = -jnp.exp(self.a_log[...]) * jax.nn.softplus(self.a_proj(x).astype(jnp.float32) + self.dt_bias[...])
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        convs = (self.q_conv[...], self.k_conv[...], self.v_conv[...])
        o, new = _run(step, place, q, k, v, g[..., None], beta, convs, config.num_key_heads)
        gate = jax.nn.silu(_heads(step, self.z_proj(x), config.value_dim).astype(jnp.float32))
        o = gated_rms_norm(o.astype(x.dtype), self.o_norm["weight"][...], gate, self.eps).astype(x.dtype)
        return self.o_proj(o.reshape(*x.shape[:2], -1)), carry, new

"""Building blocks of every layer: declared parameters, projections, norms."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from prfaas_jax.models.config import ModelConfig
from prfaas_jax.ops.thin_matmul import matmul_transposed

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Maker:
    """Declares the parameters of one module; with `layers`, those of so many equal layers, stacked in front."""

    config: ModelConfig
    rngs: nnx.Rngs
    layers: int | None = None

    def __call__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        init: Callable[..., jax.Array] | None = None,
        dtype: str | None = None,
    ) -> nnx.Param:
        """One parameter: shape, logical axes (sharding.TABLE), initializer (normal by default), dtype (the model's by default)."""
        assert len(shape) == len(axes), (shape, axes)
        if self.layers is not None:
            shape, axes = (self.layers, *shape), ("layers", *axes)
        init = init or nnx.initializers.normal(0.02)
        return nnx.Param(init(self.rngs.params(), shape, jnp.dtype(dtype or self.config.dtype)), axes=axes)


class Linear(nnx.Module):
    """`y = x W^T + b`, W as [out, in]; `axes` names (out, in)."""

    def __init__(self, make: Maker, out: int, inp: int, axes: tuple[str, str], bias: bool = False):
        self.weight = make((out, inp), axes)
        self.bias = make((out,), axes[:1], nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Projects the last axis."""
        y = matmul_transposed(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


def unit_rms(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """x over its root mean square along the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32; with `offset` it multiplies by 1 + weight."""

    def __init__(self, make: Maker, size: int, axis: str, offset: bool = False, eps: float | None = None):
        self.offset = offset
        self.eps = make.config.rms_norm_eps if eps is None else eps
        self.weight = make((size,), (axis,), nnx.initializers.zeros if offset else nnx.initializers.ones)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; returns x's dtype."""
        wide = unit_rms(x, self.eps)
        if self.offset:
            return (wide * (1.0 + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return (self.weight[...] * wide.astype(x.dtype)).astype(x.dtype)


def gated_rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], gate: Float[Array, "*B D"], eps: float
) -> Float[Array, "*B D"]:
    """RMS norm of x times an activated gate, all in float32; returns float32."""
    return unit_rms(x, eps) * weight.astype(jnp.float32) * gate.astype(jnp.float32)

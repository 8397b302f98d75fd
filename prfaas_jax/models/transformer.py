"""The dense decoder-only transformer (Llama and Qwen3 families) as Flax NNX modules.

Weights of all layers are stacked on a leading axis and the layers run as one `lax.scan`. Weight matrices keep the Hugging Face
layout [out, in]. The model does not know where keys and values live: attention over the cache is the caller's `attend`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.rope import rope_tables, rotate
from prfaas_jax.ops.thin_matmul import matmul_transposed
from prfaas_jax.sharding import Sharder

Carry = TypeVar("Carry")
# (layer, q [B T N H], k [B T K H], v [B T K H], carry) -> (o [B T N H], carry)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Carry], tuple[jax.Array, Carry]]


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str, init: Callable[..., jax.Array] | None = None
) -> nnx.Param:
    """Declares one parameter: shape, dtype, logical axes (sharding.TABLE) and initializer, all in one place."""
    assert len(shape) == len(axes), (shape, axes)
    init = init or nnx.initializers.normal(0.02)
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


class Linear(nnx.Module):
    """`y = x W^T + b`, W stacked over layers as [L, out, in]; `axes` names (out, in)."""

    def __init__(self, config: ModelConfig, out: int, inp: int, axes: tuple[str, str], rngs: nnx.Rngs, bias: bool = False):
        layers = config.num_layers
        self.weight = weight(rngs, (layers, out, inp), ("layers", *axes), config.dtype)
        self.bias = weight(rngs, (layers, out), ("layers", axes[0]), config.dtype, nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Projects the last axis."""
        y = matmul_transposed(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32; stacked over layers when `layers` is given."""

    def __init__(self, config: ModelConfig, size: int, axis: str, rngs: nnx.Rngs, layers: int | None = None):
        shape, axes = ((size,), (axis,)) if layers is None else ((layers, size), ("layers", axis))
        self.weight = weight(rngs, shape, axes, config.dtype, nnx.initializers.ones)
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; returns x's dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (self.weight[...] * wide.astype(x.dtype)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention: projections, optional q/k norm, rotary embedding; `attend` does the rest."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        self.config = config
        self.q_proj = Linear(config, config.num_heads * h, d, ("heads", "embed"), rngs, config.attention_bias)
        self.k_proj = Linear(config, config.num_kv_heads * h, d, ("kv_heads", "embed"), rngs, config.attention_bias)
        self.v_proj = Linear(config, config.num_kv_heads * h, d, ("kv_heads", "embed"), rngs, config.attention_bias)
        self.o_proj = Linear(config, d, config.num_heads * h, ("embed", "heads"), rngs)
        self.q_norm = RMSNorm(config, h, "head_dim", rngs, config.num_layers) if config.qk_norm else None
        self.k_norm = RMSNorm(config, h, "head_dim", rngs, config.num_layers) if config.qk_norm else None

    def project(
        self, x: Float[Array, "B T D"], rope: tuple[jax.Array, jax.Array], shard: Sharder
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """q, k, v as they are attended and cached: after norm and rotation."""
        batch, length, _ = x.shape
        heads = lambda y: y.reshape(batch, length, -1, self.config.head_dim)  # noqa: E731
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = shard.constrain(rotate(q, rope), "batch", None, "heads", None)
        k = shard.constrain(rotate(k, rope), "batch", None, "kv_heads", None)
        return q, k, shard.constrain(v, "batch", None, "kv_heads", None)


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(config, f, d, ("mlp", "embed"), rngs)
        self.up_proj = Linear(config, f, d, ("mlp", "embed"), rngs)
        self.down_proj = Linear(config, d, f, ("embed", "mlp"), rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """down(silu(gate x) * up x)."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One pre-norm transformer layer; its weights are those of all layers until the scan slices them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config, config.hidden_size, "embed", rngs, config.num_layers)
        self.attention = Attention(config, rngs)
        self.post_attention_norm = RMSNorm(config, config.hidden_size, "embed", rngs, config.num_layers)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, layer: jax.Array, x: Float[Array, "B T D"], rope: tuple[jax.Array, jax.Array], attend: Attend, carry: Any, shard: Sharder
    ) -> tuple[Float[Array, "B T D"], Any, tuple[jax.Array, jax.Array]]:
        """Returns the residual stream, the carry, and this layer's new (k, v)."""
        # The residual may be split along the sequence; what enters a projection is whole.
        whole = lambda y: shard.constrain(y, "batch", None, "embed")  # noqa: E731
        residual = lambda y: shard.constrain(y, "batch", "seq", "embed")  # noqa: E731
        q, k, v = self.attention.project(whole(self.input_norm(x)), rope, shard)
        o, carry = attend(layer, q, k, v, carry)
        x = x + residual(self.attention.o_proj(o.reshape(*o.shape[:2], -1)))
        x = x + residual(self.mlp(whole(self.post_attention_norm(x))))
        return x, carry, (k, v)


class Transformer(nnx.Module):
    """Token ids in, hidden states and every layer's new keys and values out."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        table = (config.vocab_size, config.hidden_size), ("vocab", "embed"), config.dtype
        self.embed = weight(rngs, *table)
        self.layers = Block(config, rngs)
        self.final_norm = RMSNorm(config, config.hidden_size, "embed", rngs)
        self.lm_head = None if config.tie_embeddings else weight(rngs, *table)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend, carry: Any, shard: Sharder
    ) -> tuple[Float[Array, "B T D"], Any, tuple[Float[Array, "L B T K H"], Float[Array, "L B T K H"]]]:
        """Runs all layers. `attend` sees one layer's q, k, v and threads `carry` (e.g. pools that a kernel must find updated).

        Returns the final-norm hidden states, the carry, and (k, v) of the new tokens of every layer: what is cached and exported.
        """
        x = shard.constrain(jnp.take(self.embed[...], tokens, axis=0), "batch", "seq", "embed")
        rope = rope_tables(positions, self.config)
        graph, stacked = nnx.split(self.layers)

        def body(state: tuple[jax.Array, Any], layer: tuple[jax.Array, PyTree]) -> tuple[tuple[jax.Array, Any], Any]:
            x, carry = state
            index, weights = layer
            x, carry, kv = nnx.merge(graph, weights)(index, x, rope, attend, carry, shard)
            return (x, carry), kv

        (x, carry), kv = jax.lax.scan(body, (x, carry), (jnp.arange(self.config.num_layers), stacked))
        return self.final_norm(x), carry, kv

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Unnormalised log-probabilities in float32."""
        head = self.embed if self.lm_head is None else self.lm_head
        return matmul_transposed(hidden, head[...], preferred_element_type=jnp.float32)

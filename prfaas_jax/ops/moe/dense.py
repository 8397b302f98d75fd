"""The "dense" implementation: every local expert on every token, one expert after another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from prfaas_jax.ops.moe.feed_forward import Activation, Stack, gated_mlp


def experts_mlp(
    x: Float[Array, "T D"],
    weights: Float32[Array, "T k"],
    experts: Int32[Array, "T k"],
    stack: Stack,
    activation: Activation,
) -> Float32[Array, "T D"]:
    """See `prfaas_jax.ops.moe.experts_mlp`; `experts` counts from the first local one."""

    def add(total: Float32[Array, "T D"], expert: tuple[jax.Array, ...]) -> tuple[Float32[Array, "T D"], None]:
        index, gate, up, down = expert
        chosen = experts == index
        weight = jnp.where(chosen, weights, 0.0).sum(axis=-1, keepdims=True)
        # Selected, not multiplied by zero: an expert that did not ask for this token may overflow on it.
        term = jnp.where(chosen.any(axis=-1, keepdims=True), weight * gated_mlp(x, gate, up, down, activation), 0.0)
        return total + term, None

    mine = (jax.lax.dynamic_index_in_dim(w, stack.layer, keepdims=False) for w in stack[:3])
    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (jnp.arange(stack.num_local), *mine))[0]

"""The "ragged" implementation: tokens sorted by expert, one `jax.lax.ragged_dot` per projection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from prfaas_jax.ops.moe.feed_forward import Activation, Stack, sort_assignments, weighted_sum


def experts_mlp(
    x: Float[Array, "T D"],
    weights: Float32[Array, "T k"],
    experts: Int32[Array, "T k"],
    stack: Stack,
    activation: Activation,
) -> Float32[Array, "T D"]:
    """See `prfaas_jax.ops.moe.experts_mlp`; `experts` counts from the first local one."""
    plan = sort_assignments(experts, stack.num_local)
    gate, up, down = stack.flat()
    # All layers' experts are groups, those of other layers without rows: whoever slices the stack copies it.
    sizes = jax.lax.dynamic_update_slice(jnp.zeros(gate.shape[0], jnp.int32), jnp.diff(plan.starts), (stack.first,))

    def product(rows: Float[Array, "A I"], w: Float[Array, "LE I O"]) -> Float32[Array, "A O"]:
        return jax.lax.ragged_dot(rows, w, sizes, preferred_element_type=jnp.float32)

    rows = x[plan.order // experts.shape[1]]
    wide = activation(product(rows, gate)) * product(rows, up)
    # Rows past the last group hold whatever the platform leaves there: `weighted_sum` drops them.
    return weighted_sum(product(wide.astype(x.dtype), down)[plan.place], weights, plan.local)

"""The "ragged" implementation: tokens sorted by expert, one `jax.lax.ragged_dot_general` per projection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from prfaas_jax.ops.moe.feed_forward import Activation, sort_assignments, weighted_sum

# Row r of group e times w[e]^T: the weights are used as they lie, [E, out, in].
_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)


def experts_mlp(
    x: Float[Array, "T D"],
    weights: Float32[Array, "T k"],
    experts: Int32[Array, "T k"],
    gate: Float[Array, "E_local F D"],
    up: Float[Array, "E_local F D"],
    down: Float[Array, "E_local D F"],
    activation: Activation,
) -> Float32[Array, "T D"]:
    """See `prfaas_jax.ops.moe.experts_mlp`; `experts` counts from the first local one."""
    plan = sort_assignments(experts, gate.shape[0])
    sizes = jnp.diff(plan.starts)

    def product(rows: Float[Array, "A I"], w: Float[Array, "E_local O I"]) -> Float32[Array, "A O"]:
        return jax.lax.ragged_dot_general(rows, w, sizes, _TRANSPOSED, preferred_element_type=jnp.float32)

    rows = x[plan.order // experts.shape[1]]
    wide = activation(product(rows, gate)) * product(rows, up)
    # Rows past the last group hold whatever the platform leaves there: `weighted_sum` drops them.
    return weighted_sum(product(wide.astype(x.dtype), down)[plan.place], weights, plan.local)

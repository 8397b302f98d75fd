"""The "grouped" implementation: tokens sorted by expert and cut into blocks of one expert each, one block after another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from prfaas_jax.ops.moe.feed_forward import Activation, gated_mlp, sort_assignments, weighted_sum

# Rows per block: the power of two next to the mean number of rows per expert, within these bounds.
MIN_BLOCK, MAX_BLOCK = 8, 128


def block_size(assignments: int, num_local: int) -> int:
    """Rows per block: a function of shapes only, so that a token meets the same products whatever its companions."""
    mean = -(-assignments // num_local)
    return min(max(MIN_BLOCK, 1 << (mean - 1).bit_length()), MAX_BLOCK)


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
    num_local, assignments = gate.shape[0], experts.size
    plan = sort_assignments(experts, num_local)
    size = block_size(assignments, num_local)
    # Every expert that has tokens may leave its last block part empty.
    blocks = (assignments + min(num_local, assignments) * (size - 1)) // size
    per_expert = -(-jnp.diff(plan.starts) // size)
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(per_expert, dtype=jnp.int32)])

    def run(block: Int32[Array, ""]) -> Float32[Array, "size D"]:
        expert = jnp.searchsorted(first_block, block, side="right") - 1
        places = plan.starts[expert] + (block - first_block[expert]) * size + jnp.arange(size)
        # A part-empty block goes on into the next expert's tokens, or repeats the last: nobody reads those rows.
        rows = x[plan.order[jnp.minimum(places, assignments - 1)] // experts.shape[1]]
        return gated_mlp(rows, gate[expert], up[expert], down[expert], activation)

    def skip(block: Int32[Array, ""]) -> Float32[Array, "size D"]:
        return jnp.zeros((size, x.shape[1]), jnp.float32)

    def visit(block: Int32[Array, ""]) -> Float32[Array, "size D"]:
        # Recomputed in the backward pass: kept, each block would hold a copy of its expert's weights.
        return jax.lax.cond(block < first_block[-1], jax.checkpoint(run), skip, block)

    outputs = jax.lax.map(visit, jnp.arange(blocks, dtype=jnp.int32)).reshape(blocks * size, -1)
    expert = jnp.clip(experts.reshape(-1), 0, num_local - 1)
    where = first_block[expert] * size + plan.place - plan.starts[expert]
    return weighted_sum(outputs[jnp.where(plan.local, where, 0)], weights, plan.local)

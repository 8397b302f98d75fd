"""What the implementations share: one gated feed-forward network, and the order that puts each expert's tokens side by side."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from prfaas_jax.ops.thin_matmul import matmul_transposed

Activation = Callable[[jax.Array], jax.Array]


def gated_mlp(
    x: Float[Array, "R D"], gate: Float[Array, "F D"], up: Float[Array, "F D"], down: Float[Array, "D F"], activation: Activation
) -> Float32[Array, "R D"]:
    """`down(activation(gate x) * up x)`, added up in float32."""
    wide = activation(matmul_transposed(x, gate, jnp.float32)) * matmul_transposed(x, up, jnp.float32)
    return matmul_transposed(wide.astype(x.dtype), down, jnp.float32)


class SortedAssignments(NamedTuple):
    """The T * k assignments (token t's slot s is t * k + s), local experts' first, in the order of experts, then of tokens.

    Attributes:
        order: the assignment at each sorted place.
        place: the sorted place of each assignment, the inverse of `order`.
        starts: first sorted place of each local expert; the last entry is the number of local assignments.
        local: whether an assignment's expert is local.
    """

    order: Int32[Array, " A"]
    place: Int32[Array, " A"]
    starts: Int32[Array, " E_local+1"]
    local: Bool[Array, " A"]


def sort_assignments(experts: Int32[Array, "T k"], num_local: int) -> SortedAssignments:
    """`experts` counts from the first local one: others are negative or too large."""
    expert = experts.reshape(-1)
    local = (expert >= 0) & (expert < num_local)
    key = jnp.where(local, expert, num_local)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    index = jnp.arange(key.size, dtype=jnp.int32)
    place = jnp.zeros_like(index).at[order].set(index, unique_indices=True)
    starts = jnp.searchsorted(key[order], jnp.arange(num_local + 1, dtype=key.dtype), method="compare_all").astype(jnp.int32)
    return SortedAssignments(order, place, starts, local)


def weighted_sum(
    outputs: Float32[Array, "A D"], weights: Float32[Array, "T k"], local: Bool[Array, " A"]
) -> Float32[Array, "T D"]:
    """Sum over a token's local assignments of weight * output; what stands in the outputs of the others does not matter."""
    tokens, top_k = weights.shape
    kept = jnp.where(local[:, None], outputs, 0.0).reshape(tokens, top_k, -1)
    # No dot: XLA may compute one with reduced precision, and the sum over k belongs to the fusion of the gather.
    return (kept * weights[..., None]).sum(axis=1)

"""What the implementations share: one gated feed-forward network, and the order that puts each expert's tokens side by side."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from prfaas_jax.ops.thin_matmul import matmul

Activation = Callable[[jax.Array], jax.Array]


class Stack(NamedTuple):
    """The local experts of several layers, and which layer is meant."""

    gate: Float[Array, "L E_local D F"]
    up: Float[Array, "L E_local D F"]
    down: Float[Array, "L E_local F D"]
    layer: Int32[Array, ""]

    @property
    def num_local(self) -> int:
        """Experts per layer."""
        return self.gate.shape[1]

    @property
    def first(self) -> Int32[Array, ""]:
        """Index of the layer's first expert in `flat`."""
        return self.layer * self.num_local

    def flat(self) -> tuple[Float[Array, "LE D F"], Float[Array, "LE D F"], Float[Array, "LE F D"]]:
        """Gate, up and down of all experts of all layers."""
        gate, up, down = (w.reshape(-1, *w.shape[2:]) for w in self[:3])
        return gate, up, down


def gated_mlp(
    x: Float[Array, "R D"], gate: Float[Array, "D F"], up: Float[Array, "D F"], down: Float[Array, "F D"], activation: Activation
) -> Float32[Array, "R D"]:
    """`(activation(x gate) * x up) down`, added up in float32."""
    wide = activation(matmul(x, gate, jnp.float32)) * matmul(x, up, jnp.float32)
    return matmul(wide.astype(x.dtype), down, jnp.float32)


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

"""Which experts a token goes to, and with what weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from prfaas_jax.errors import InvalidInput

SCORINGS = ("softmax", "sigmoid")


def route(
    logits: Float32[Array, "*B E"],
    bias: Float32[Array, " E"] | None,
    *,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    renormalize: bool,
    scale: float,
) -> tuple[Float32[Array, "*B k"], Int32[Array, "*B k"]]:
    """(weights, experts) of each token, best expert first; among equal scores the lowest index wins.

    Args:
        logits: router logits; float32, because a rounded score picks another expert.
        bias: joins the scores when experts are chosen, not when they are weighed.
        top_k: experts per token.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        num_groups: experts form this many groups of neighbours.
        top_groups: only experts of this many best groups are chosen; a group's score is the sum of its two best biased scores.
        renormalize: the weights are made to sum to 1.
        scale: factor on the weights, after that.

    Raises:
        InvalidInput: logits of another dtype, unknown scoring, groups that do not divide E, more experts asked for than can be reached.
    """
    num_experts = logits.shape[-1]
    if logits.dtype != jnp.float32:
        raise InvalidInput("logits.dtype", logits.dtype.name, "float32")
    if scoring not in SCORINGS:
        raise InvalidInput("scoring", scoring, f"one of {SCORINGS}")
    if num_groups < 1 or num_experts % num_groups:
        raise InvalidInput("num_groups", num_groups, f"a divisor of the {num_experts} experts")
    if not 1 <= top_groups <= num_groups:
        raise InvalidInput("top_groups", top_groups, f"1 to num_groups={num_groups}")
    if not 1 <= top_k <= num_experts // num_groups * top_groups:
        raise InvalidInput("top_k", top_k, f"1 to {num_experts // num_groups * top_groups}, the experts of {top_groups} group(s)")

    scores = jax.nn.softmax(logits, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if top_groups < num_groups:
        choice = jnp.where(_in_best_groups(choice, num_groups, top_groups), choice, -jnp.inf)
    _, experts = jax.lax.top_k(choice, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if renormalize:
        # All chosen sigmoids may underflow to zero.
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * scale, experts


def _in_best_groups(choice: Float32[Array, "*B E"], num_groups: int, top_groups: int) -> Bool[Array, "*B E"]:
    """Whether each expert belongs to one of the best groups."""
    grouped = choice.reshape(*choice.shape[:-1], num_groups, -1)
    best_two, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, groups = jax.lax.top_k(best_two.sum(axis=-1), top_groups)
    group_of = jnp.arange(choice.shape[-1]) // grouped.shape[-1]
    return (groups[..., None] == group_of).any(axis=-2)

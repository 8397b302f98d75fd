"""The "grouped" implementation: tokens sorted by expert and cut into blocks of one expert each, one block after another."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from prfaas_jax.ops.moe.feed_forward import Activation, Stack, gated_mlp, sort_assignments, weighted_sum

# Rows per block: the power of two from the mean number of rows per expert up, within these bounds. Measured on a
# CPU with 8 and with 64 experts: half or twice that is 10 % faster to 14 % slower.
MIN_BLOCK, MAX_BLOCK = 8, 128


# What a form of the blocks takes and gives: `one_by_one`.
RunBlocks = Callable[..., Float32[Array, "blocks size D"]]


def block_size(assignments: int, num_local: int, least: int = MIN_BLOCK) -> int:
    """Rows per block: a function of shapes only, so that a token meets the same products whatever its companions."""
    mean = -(-assignments // num_local)
    return min(max(least, 1 << (mean - 1).bit_length()), MAX_BLOCK)


def one_by_one(
    x: Float[Array, "T D"],
    gate: Float[Array, "LE D F"],
    up: Float[Array, "LE D F"],
    down: Float[Array, "LE F D"],
    expert_of: Int32[Array, " blocks"],
    tokens_of: Int32[Array, "blocks size"],
    activation: Activation,
) -> Float32[Array, "blocks size D"]:
    """Block b's tokens through its expert. Blocks of expert -1 are not in use: they are zero and cost nothing."""

    def visit(block: tuple[Int32[Array, ""], Int32[Array, " size"]]) -> Float32[Array, "size D"]:
        expert, tokens = block
        run = lambda: gated_mlp(x[tokens], gate[expert], up[expert], down[expert], activation)  # noqa: E731
        return jax.lax.cond(expert >= 0, run, lambda: jnp.zeros((tokens.size, x.shape[1]), jnp.float32))

    return jax.lax.map(visit, (expert_of, tokens_of))


def experts_mlp(
    x: Float[Array, "T D"],
    weights: Float32[Array, "T k"],
    experts: Int32[Array, "T k"],
    stack: Stack,
    activation: Activation,
    run_blocks: RunBlocks = one_by_one,
    least: int = MIN_BLOCK,
) -> Float32[Array, "T D"]:
    """See `prfaas_jax.ops.moe.experts_mlp`; `experts` counts from the first local one. Blocks have at least `least` rows."""
    num_local, assignments = stack.num_local, experts.size
    plan = sort_assignments(experts, num_local)
    size = block_size(assignments, num_local, least)
    # Every expert that has tokens may leave its last block part empty.
    blocks = (assignments + min(num_local, assignments) * (size - 1)) // size
    per_expert = -(-jnp.diff(plan.starts) // size)
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(per_expert, dtype=jnp.int32)])

    block = jnp.arange(blocks, dtype=jnp.int32)
    expert_of = jnp.searchsorted(first_block, block, side="right", method="compare_all").astype(jnp.int32) - 1
    first_place = plan.starts[expert_of] + (block - first_block[expert_of]) * size
    # A part-empty block goes on into the next expert's tokens, or repeats the last: nobody reads those rows.
    places = jnp.minimum(first_place[:, None] + jnp.arange(size), assignments - 1)
    tokens_of = plan.order[places] // experts.shape[1]

    in_stack = jnp.where(expert_of < num_local, stack.first + expert_of, -1)
    outputs = _run_blocks(x, *stack.flat(), in_stack, tokens_of, activation, run_blocks).reshape(blocks * size, -1)
    expert = jnp.clip(experts.reshape(-1), 0, num_local - 1)
    row = first_block[expert] * size + plan.place - plan.starts[expert]
    return weighted_sum(outputs[jnp.where(plan.local, row, 0)], weights, plan.local)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _run_blocks(
    x: Float[Array, "T D"],
    gate: Float[Array, "LE D F"],
    up: Float[Array, "LE D F"],
    down: Float[Array, "LE F D"],
    expert_of: Int32[Array, " blocks"],
    tokens_of: Int32[Array, "blocks size"],
    activation: Activation,
    run_blocks: RunBlocks,
) -> Float32[Array, "blocks size D"]:
    """`run_blocks` with a derivative."""
    return run_blocks(x, gate, up, down, expert_of, tokens_of, activation)


def _forward(*args: Any) -> tuple[Float32[Array, "blocks size D"], tuple[Array, ...]]:
    return _run_blocks(*args), args[:-2]


def _backward(
    activation: Activation, run_blocks: RunBlocks, args: tuple[Array, ...], cotangent: Float32[Array, "blocks size D"]
) -> tuple[Array | None, ...]:
    """Adds each block's gradient to its own expert's; the derivative of the loop would add it to all experts' and keep copies of them."""
    del run_blocks  # one by one, whatever computed the blocks
    x, *projections, expert_of, tokens_of = args

    def visit(total: list[Array], block: tuple[Array, ...]) -> tuple[list[Array], None]:
        expert, tokens, cotangent = block
        primals = x[tokens], *(w[expert] for w in projections)
        run = lambda: jax.vjp(lambda x, g, u, d: gated_mlp(x, g, u, d, activation), *primals)[1](cotangent)  # noqa: E731
        gradients = jax.lax.cond(expert >= 0, run, lambda: tuple(map(jnp.zeros_like, primals)))
        return [t.at[i].add(g) for t, i, g in zip(total, (tokens, expert, expert, expert), gradients, strict=True)], None

    zeros = [jnp.zeros(a.shape, jnp.float32) for a in (x, *projections)]
    total, _ = jax.lax.scan(visit, zeros, (expert_of, tokens_of, cotangent))
    return *(t.astype(a.dtype) for t, a in zip(total, (x, *projections), strict=True)), None, None


_run_blocks.defvjp(_forward, _backward)

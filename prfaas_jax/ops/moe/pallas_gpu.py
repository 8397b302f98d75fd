"""The blocks of "grouped" by two Triton kernels, all blocks at once: gate and up with the activation between, then down.

Programs read an expert's matrices where they lie in the stack and tokens by their index; nothing is gathered beforehand.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from prfaas_jax.ops.moe.feed_forward import Activation

# Triton's dots have sides of at least 16.
MIN_TILE = 16
# Output columns per program, bytes of a token's features per step of its loop, and steps whose loads are under way: at most 96 KiB of
# shared memory. Measured on an H200 with the experts of Kimi-Linear-48B: twice the depth or three steps is 0 to 20 % slower.
_MAX_COLUMNS, _DEPTH_BYTES, _STAGES = 128, 64, 4


def unsupported(*, width: int, intermediate: int) -> str | None:
    """Why the kernels do not take experts of D = `width` and F = `intermediate`, or None."""
    for name, size in (("width", width), ("intermediate", intermediate)):
        if size % MIN_TILE:
            return f"{name}={size} is no multiple of {MIN_TILE}"
    return None


def run_blocks(
    x: Float[Array, "T D"],
    gate: Float[Array, "LE D F"],
    up: Float[Array, "LE D F"],
    down: Float[Array, "LE F D"],
    expert_of: Int32[Array, " blocks"],
    tokens_of: Int32[Array, "blocks size"],
    activation: Activation,
    *,
    interpret: bool = False,
) -> Float32[Array, "blocks size D"]:
    """Block b's tokens through its expert; blocks of expert -1 are not in use and zero. `size` is a power of two, at least `MIN_TILE`."""
    wide = expert_products(expert_of, x, tokens_of, (gate, up), activation, interpret)
    own = jnp.arange(tokens_of.size, dtype=jnp.int32).reshape(tokens_of.shape)
    return expert_products(expert_of, wide, own, (down,), None, interpret).reshape(*tokens_of.shape, -1)


# A jit of its own names it in compiled programs.
@functools.partial(jax.jit, static_argnames=("activation", "interpret"))
def expert_products(
    expert_of: Int32[Array, " blocks"],
    x: Float[Array, "R I"],
    rows_of: Int32[Array, "blocks size"],
    matrices: tuple[Float[Array, "LE I O"], ...],
    activation: Activation | None,
    interpret: bool,
) -> Float[Array, "blocks*size O"]:
    """Each block's rows of `x` times its expert's matrix, in float32; of two, activation(first) * second, in the dtype of `x`."""
    (blocks, size), (_, inputs, outputs) = rows_of.shape, matrices[0].shape
    columns = _tile(outputs, _MAX_COLUMNS)
    depth = _tile(inputs, _DEPTH_BYTES // x.dtype.itemsize)
    factors, out = jnp.result_type(x, *matrices), jnp.float32 if activation is None else x.dtype
    # float32 models are promised float32 products, which tensor cores do not have.
    precision = jax.lax.Precision.HIGHEST if factors == jnp.float32 else jax.lax.Precision.DEFAULT

    def kernel(expert_ref, rows_ref, x_ref, *refs):  # type: ignore[no-untyped-def]  # refs have no public type
        *matrix_refs, out_ref = refs
        expert, rows = expert_ref[0], rows_ref[0]
        mine = pl.ds(pl.program_id(1) * columns, columns)

        def add(step, sums):  # type: ignore[no-untyped-def]
            span = pl.ds(step * depth, depth)
            part = x_ref[rows, span].astype(factors)
            dot = functools.partial(jnp.dot, part, precision=precision, preferred_element_type=jnp.float32)
            return tuple(total + dot(w[expert, span, mine].astype(factors)) for total, w in zip(sums, matrix_refs, strict=True))

        # As a product: Triton's lowering makes a select between two constants a boolean.
        steps = (expert >= 0).astype(jnp.int32) * (inputs // depth)
        sums = jax.lax.fori_loop(0, steps, add, (jnp.zeros((size, columns), jnp.float32),) * len(matrix_refs))
        out_ref[...] = (sums[0] if activation is None else activation(sums[0]) * sums[1]).astype(out)

    block = pl.BlockSpec((size, columns), lambda b, c: (b, c))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=(blocks, outputs // columns),
        in_specs=[pl.BlockSpec((1,), lambda b, c: (b,)), pl.BlockSpec((1, size), lambda b, c: (b, 0)), *[whole] * (1 + len(matrices))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((blocks * size, outputs), out),
        compiler_params=plgpu.CompilerParams(num_warps=8 if size > 64 else 4, num_stages=_STAGES),
        interpret=interpret,
    )(expert_of, rows_of, x, *matrices)


def _tile(size: int, most: int) -> int:
    """The largest power of two that divides `size`, at most `most`."""
    return min(size & -size, most)

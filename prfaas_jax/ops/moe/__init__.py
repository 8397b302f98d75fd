"""Mixture of experts: the router, and the experts' feed-forward networks by named implementations.

    dense       every local expert on every token: the reference; pays for E / k times the products that are needed
    ragged      tokens sorted by expert, XLA's grouped product
    grouped     tokens sorted by expert and cut into blocks of one expert, one block after another
    pallas_gpu  the same blocks by a kernel of our own, all at once
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.moe import dense, grouped, pallas_gpu, ragged
from prfaas_jax.ops.moe.feed_forward import Activation, Stack
from prfaas_jax.ops.moe.router import SCORINGS, route

__all__ = ["IMPLEMENTATIONS", "SCORINGS", "default_implementation", "experts_mlp", "route", "supports"]

IMPLEMENTATIONS = ("dense", "ragged", "grouped", "pallas_gpu")


def supports(implementation: str, *, width: int, intermediate: int) -> str | None:
    """Why an implementation does not take experts of D = `width` and (local) F = `intermediate`, or None."""
    return pallas_gpu.unsupported(width=width, intermediate=intermediate) if implementation == "pallas_gpu" else None


def default_implementation(platform: str, *, width: int, intermediate: int) -> tuple[str, str]:
    """(implementation, reason) for a jax platform and a shape of experts."""
    if platform == "tpu":
        return "ragged", "XLA has a grouped product for tpu"
    if platform == "cuda":
        if reason := supports("pallas_gpu", width=width, intermediate=intermediate):
            return "grouped", f"the kernel for cuda does not take this shape: {reason}"
        return "pallas_gpu", "the kernel for cuda"
    return "grouped", f"XLA's grouped product on {platform} is every expert on every assignment"


def experts_mlp(
    x: Float[Array, "T D"],
    weights: Float32[Array, "T k"],
    experts: Int32[Array, "T k"],
    gate: Float[Array, "L E_local D F"],
    up: Float[Array, "L E_local D F"],
    down: Float[Array, "L E_local F D"],
    first_expert: Int[Array, ""] | int,
    layer: Int[Array, ""] | int = 0,
    *,
    activation: Activation = jax.nn.silu,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    """Sum over the LOCAL experts of weight * down(activation(gate x) * up x).

    Shard-local: the results of all shards of the experts, and of their width F, add up to the whole. Products add up in float32.
    Padding tokens cost time but change no other token. A token's result does not depend, bit for bit, on what its companions
    are and where they go, with "dense" and "grouped" on the CPU; otherwise within rounding.

    Args:
        x: tokens.
        weights: of each token's experts, from `route`.
        experts: index of each token's experts among all E, distinct per token.
        gate: of the E_local experts from `first_expert` on, for all layers of a stack: products read `layer`'s where they lie. A slice
            of the stack would copy every expert, also those that no token goes to.
        up: like `gate`.
        down: like `gate`.
        first_expert: index of the first local expert; may be traced.
        layer: index into the stack, in range (unchecked); may be traced.
        activation: of the gate; one that Triton has no code for, such as one with erf, needs another form than "pallas_gpu".
        implementation: one of `IMPLEMENTATIONS`; None is the default of the platform that the program is compiled for. A program that
            is exported for several platforms at once must name one that is no kernel.
        interpret: run a kernel in the Pallas interpreter, for tests on CPU.

    Raises:
        InvalidInput: unknown implementation or one that does not take this shape, or shapes that do not belong together.
    """
    tokens, width = x.shape
    layers, local, _, intermediate = gate.shape
    for field, array, shape in (
        ("experts.shape", experts, (tokens, weights.shape[-1])),
        ("weights.shape", weights, experts.shape),
        ("gate.shape", gate, (layers, local, width, intermediate)),
        ("up.shape", up, gate.shape),
        ("down.shape", down, (layers, local, intermediate, width)),
    ):
        if array.shape != shape:
            raise InvalidInput(field, array.shape, f"{shape}")
    sizes = {"width": width, "intermediate": intermediate}
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise InvalidInput("implementation", implementation, f"one of {IMPLEMENTATIONS}")
        if reason := supports(implementation, **sizes):
            raise InvalidInput("implementation", implementation, f"another one for this shape: {reason}")

    def run(name: str) -> Callable[..., Float32[Array, "T D"]]:
        forms: dict[str, Callable[..., Float32[Array, "T D"]]] = {
            "dense": dense.experts_mlp,
            "ragged": ragged.experts_mlp,
            "grouped": grouped.experts_mlp,
            "pallas_gpu": functools.partial(
                grouped.experts_mlp,
                run_blocks=functools.partial(pallas_gpu.run_blocks, interpret=interpret),
                least=pallas_gpu.MIN_TILE,
            ),
        }
        return functools.partial(forms[name], activation=activation)

    args = x, weights, experts - first_expert, Stack(gate, up, down, jnp.asarray(layer, jnp.int32))
    if implementation is not None:
        return run(implementation)(*args).astype(x.dtype)
    names = {platform: default_implementation(platform, **sizes)[0] for platform in ("cpu", "cuda", "rocm", "tpu")}
    return jax.lax.platform_dependent(*args, **{platform: run(name) for platform, name in names.items()}).astype(x.dtype)

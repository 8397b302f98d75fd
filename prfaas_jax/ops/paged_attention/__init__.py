"""Decode attention: one new token per row over its paged cache, by named implementations."""

from jaxtyping import Array, Float, Int

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.paged_attention import reference

IMPLEMENTATIONS = ("xla",)


def needs_current_in_pool(implementation: str) -> bool:
    """Whether the caller must have written k_new and v_new at position `lengths[b]` before the call."""
    return implementation != "xla"


def paged_attention(
    q: Float[Array, "B N H"],
    k_new: Float[Array, "B K H"],
    v_new: Float[Array, "B K H"],
    k_pool: Float[Array, "K X page_size H"],
    v_pool: Float[Array, "K X page_size H"],
    table: Int[Array, "B MP"],
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    pages_per_layer: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """Attention of the current token over `lengths[b]` cached tokens and itself; query head n uses kv head n // (N // K)."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise InvalidInput("implementation", implementation, f"one of {IMPLEMENTATIONS}")
    return reference.paged_attention(
        q, k_new, v_new, k_pool, v_pool, table, lengths, layer, pages_per_layer=pages_per_layer, scale=scale
    )

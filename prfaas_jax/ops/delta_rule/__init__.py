"""The gated delta rule: linear attention that replaces what a key stood for instead of adding to it, by named implementations.

    recurrent   token by token; the reference, and the default for a single token
    chunkwise   matrix products within chunks of 64 tokens, a scan over chunks; the default otherwise

The decay is per key channel (Kimi Delta Attention) or one number per head (Gated DeltaNet).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.delta_rule import chunkwise, recurrent
from prfaas_jax.ops.products import row_sum

IMPLEMENTATIONS = ("recurrent", "chunkwise")


def l2_normalize(x: Float[Array, "*rest d"]) -> Float[Array, "*rest d"]:
    """`x / sqrt(sum x^2 + 1e-6)` over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(row_sum(jnp.square(x)) + 1e-6)


def delta_rule(
    q: Float[Array, "B T H dk"],
    k: Float[Array, "B T H dk"],
    v: Float[Array, "B T H dv"],
    g: Float[Array, "B T H dg"],
    beta: Float[Array, "B T H"],
    state: Float[Array, "B H dk dv"],
    valid: Int[Array, " B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
    """`S' = exp(g_t) S_{t-1}`, `S_t = S' + k_t beta_t (v_t - S'^T k_t)^T`, `o_t = S_t^T q_t`, in float32.

    Shard-local. No gate overflows, however negative. A row's result depends on its own data only, neither on its companions nor on
    how far it is padded; "chunkwise" split at a multiple of 64 tokens equals one call. Both hold bit for bit.

    Args:
        q: queries, normalised and scaled.
        k: keys, normalised (`l2_normalize`).
        v: values.
        g: logarithm of the decay, finite and at most 0; dg is dk (per channel) or 1 (per head, which is cheaper).
        beta: how much of the old value is replaced, 0..1.
        state: S before the first token, float32.
        valid: tokens of each row that are no padding, 0..T; the rest leave the state as it is, and their outputs are finite.
        implementation: one of `IMPLEMENTATIONS`; None is "recurrent" for a single token, else "chunkwise".

    Raises:
        InvalidInput: unknown implementation, or a decay that is neither per channel nor per head.
    """
    tokens, key_dim = k.shape[1], k.shape[-1]
    name = implementation or ("recurrent" if tokens == 1 else "chunkwise")
    if name not in IMPLEMENTATIONS:
        raise InvalidInput("implementation", name, f"one of {IMPLEMENTATIONS}")
    if g.shape != (*k.shape[:-1], key_dim) and g.shape != (*k.shape[:-1], 1):
        raise InvalidInput("g.shape", g.shape, f"{(*k.shape[:-1], key_dim)} (a decay per channel) or {(*k.shape[:-1], 1)} (per head)")
    op = recurrent.delta_rule if name == "recurrent" else chunkwise.delta_rule
    return op(q, k, v, g, beta[..., None], state, valid)

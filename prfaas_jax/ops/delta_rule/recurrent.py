"""The gated delta rule token by token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prfaas_jax.ops.products import einsum, row_sum
from prfaas_jax.ops.token_chunks import float_where_live


def delta_rule(
    q: Float[Array, "B T H dk"],
    k: Float[Array, "B T H dk"],
    v: Float[Array, "B T H dv"],
    g: Float[Array, "B T H dg"],
    beta: Float[Array, "B T H 1"],
    state: Float[Array, "B H dk dv"],
    valid: Int[Array, " B"],
) -> tuple[Float[Array, "B T H dv"], Float[Array, "B H dk dv"]]:
    """See the package; beta has a last axis of 1."""

    def step(state: Float[Array, "B H dk dv"], token: tuple[Array, ...]) -> tuple[Array, Array]:
        position, *rest = token
        live = (position < valid)[:, None]
        q, k, v, g, beta = (float_where_live(x[:, None], live)[:, 0] for x in rest)
        decay = jnp.exp(g)
        # The decay is applied to key and query instead of the state, which is thus read once for both and written once.
        read = einsum("bhik,bhkv->bhiv", jnp.stack([k * decay, q * decay], axis=2), state)
        update = beta * (v - read[:, :, 0])
        new = decay[..., None] * state + k[..., None] * update[..., None, :]
        out = read[:, :, 1] + row_sum(k * q) * update
        return jnp.where(live[..., None, None], new, state), out

    by_token = (jnp.arange(q.shape[1]), *(x.swapaxes(0, 1) for x in (q, k, v, g, beta)))
    if q.shape[1] == 1:
        state, out = step(state, tuple(x[0] for x in by_token))
        return out[:, None], state
    state, out = jax.lax.scan(step, state, by_token)
    return out.swapaxes(0, 1), state

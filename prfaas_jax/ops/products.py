"""Products and sums in float32 whose every row comes out the same whatever the number of rows."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Products of float32 as float32: the default of GPUs and TPUs rounds the factors to fewer bits.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def row_sum(x: Float[Array, "*rows d"]) -> Float[Array, "*rows 1"]:
    """Sum over the last axis.

    As a product with ones: XLA's CPU backend chooses the order of a reduction, but not of a matrix product, by the number of rows. The
    ones are a few columns wide, since a single one would be a reduction again.
    """
    if x.size == x.shape[-1]:
        # A single row would be the product of a vector.
        return row_sum(jnp.stack([x, x]))[0]
    return einsum("...d,dj->...j", x, jnp.ones((x.shape[-1], 8)))[..., :1]

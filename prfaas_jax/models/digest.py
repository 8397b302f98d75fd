"""A digest over every bit of a model's weights that does not depend on how they are sharded or where they came from."""

import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

# Odd constants (xxHash, MurmurHash3): one per array axis, then the finalizer's.
_AXIS_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)


def _float32_bits(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Bits of x as float32; bfloat16 widens by shifting, so no backend gets to flush a subnormal."""
    if x.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


@jax.jit
def _checksums(x: Float[Array, "..."]) -> tuple[jax.Array, jax.Array]:
    """Two sums of bits times a hash of the position, modulo 2**32: exact in any order of summation, hence on any mesh."""
    bits = _float32_bits(x)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, prime in zip(range(x.ndim), _AXIS_PRIMES, strict=False):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(prime)
    for shift, prime in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        position = (position ^ (position >> shift)) * jnp.uint32(prime)
    # Odd factors: one changed element always changes the sum.
    return jnp.sum(bits * (position | 1), dtype=jnp.uint32), jnp.sum(bits * ((position >> 15) ^ position | 1), dtype=jnp.uint32)


def weights_digest(arrays: Mapping[str, np.ndarray | jax.Array]) -> str:
    """Hex digest of named float32 or bfloat16 arrays, of at most four axes; equal values give equal digests in either dtype.

    Reads every element once, on the devices that hold it; host arrays visit the default device one at a time.
    """
    sums = {name: [int(s) for s in _checksums(array)] for name, array in sorted(arrays.items())}
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    return hashlib.sha256(json.dumps([sums, shapes], sort_keys=True).encode()).hexdigest()[:32]

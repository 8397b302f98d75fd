"""A digest over every bit of a model's weights that does not depend on how they are sharded or where they came from."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

# Odd constants (xxHash, MurmurHash3): one per array axis, then the finalizer's.
_AXIS_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)


# Up to so many elements an array is summed on the host: a program for each new shape takes longer to compile.
_SMALL = 1 << 16


def _float32_bits(x: Float[Array | np.ndarray, "..."]) -> UInt[Array | np.ndarray, "..."]:
    """Bits of x as float32; bfloat16 widens by shifting, so no backend gets to flush a subnormal."""
    if x.dtype == jnp.bfloat16:
        return x.view(jnp.uint16).astype(jnp.uint32) << 16
    return x.view(jnp.uint32)


def _checksums(x: Float[Array | np.ndarray, "..."], xp: Any) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """Two sums of bits times a hash of the position, modulo 2**32: exact in any order of summation, hence on any mesh, in either `xp`."""
    bits, position = _float32_bits(x), xp.zeros(x.shape, xp.uint32)
    for axis, prime in zip(range(x.ndim), _AXIS_PRIMES, strict=False):
        index = xp.arange(x.shape[axis], dtype=xp.uint32) * xp.uint32(prime)
        position = position + index.reshape(-1, *(1,) * (x.ndim - axis - 1))
    for shift, prime in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        position = (position ^ (position >> shift)) * xp.uint32(prime)
    # Odd factors: one changed element always changes the sum.
    return xp.sum(bits * (position | 1), dtype=xp.uint32), xp.sum(bits * ((position >> 15) ^ position | 1), dtype=xp.uint32)


_on_device = jax.jit(functools.partial(_checksums, xp=jnp))


def _sums(x: np.ndarray | jax.Array) -> list[int]:
    if x.size > _SMALL:
        return [int(s) for s in _on_device(x)]
    return [int(s) for s in _checksums(np.asarray(x), np)]


def weights_digest(arrays: Mapping[str, np.ndarray | jax.Array]) -> str:
    """Hex digest of named float32 or bfloat16 arrays, of at most four axes; equal values give equal digests in either dtype.

    Reads every element once, large arrays on the devices that hold them; host arrays visit the default device one at a time.
    """
    sums = {name: _sums(array) for name, array in sorted(arrays.items())}
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    return hashlib.sha256(json.dumps([sums, shapes], sort_keys=True).encode()).hexdigest()[:32]

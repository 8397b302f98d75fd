"""A cache in fewer bytes, on the device: the arithmetic of the codecs that `kvcache/codecs.py` names.

One scale per token and head, so what one head of one token holds never touches another's bits, and any run of tokens may be encoded alone.

    int8, fp8   uint8 [..., K, H + 2]: H bytes of values (int8, or float8_e4m3fn), then the scale, bfloat16, little endian
    bf16        bfloat16 [..., K, H]
    none        the array itself

Plain jnp: XLA fuses each direction into passes that wait for memory, which a kernel would not make shorter.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import SCALE_BYTES


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """Values of one byte each, in units of a scale.

    Attributes:
        dtype: of a value.
        largest: what the row's largest magnitude is scaled to.
        smallest_scale: the least scale for which value times scale is never subnormal; devices flush those to zero, or do not.
    """

    dtype: jnp.dtype
    largest: float
    smallest_scale: float


_SCALED = {
    "int8": _Scaled(jnp.dtype(jnp.int8), 127.0, 2.0**-126),
    "fp8": _Scaled(jnp.dtype(jnp.float8_e4m3fn), 448.0, 2.0**-117),
}
_NAMES = ("none", "bf16", *_SCALED)


def encode(x: Float[Array, "*lead K H"], codec: str) -> Float[Array, "*lead K H"] | UInt8[Array, "*lead K H+2"]:
    """What travels instead of `x`; elementwise but for one maximum over H, so it shards and fuses like its producer.

    With a = max |x| over one token and head, the scale s is a / 127 or a / 448 rounded up to bfloat16: s <= a / 127 * (1 + 2^-7), so that
    nothing saturates. `decode` to float32 is exactly value * s, and for finite x, a at least 1.5e-36 (int8) or 2.7e-33 (fp8)

        int8   |x - decoded| <= s / 2 <= a / 254 * (1 + 2^-7)
        fp8    |x - decoded| <= max(|x| * 2^-4, s * 2^-10)
        bf16   |x - decoded| <= |x| * 2^-8: nearest, ties to even; what lies beyond bfloat16's largest becomes infinite
        none   0, bit by bit

    each up to float32's own rounding (a factor of 1 + 2^-20), and up to 2^-126, as devices may take subnormal numbers for zero. A smaller a
    is written with the smallest scale, and loses at most 2^-126; a row of zeros comes back as zeros; from an a above 3e38 rounding may
    make an infinity, as in bf16. `decode` to bfloat16 rounds once more.

    A row with a NaN or an infinity comes back as NaN throughout: as visible as it was, and only in its own token and head. bf16 keeps
    NaN and infinities, each in its own element.

    Args:
        x: float32 or bfloat16, heads and width last.
        codec: a name of `kvcache.codecs.CODECS`.

    Raises:
        InvalidInput: another name, dtype or rank; a width of zero.
    """
    if codec not in _NAMES:
        raise InvalidInput("codec", codec, f"one of {_NAMES}")
    if x.dtype not in (jnp.float32, jnp.bfloat16) or x.ndim < 2 or not x.shape[-1]:
        raise InvalidInput("x", f"{x.dtype}{x.shape}", "float32 or bfloat16 [..., heads, width], width > 0")
    if codec == "none":
        return x
    if codec == "bf16":
        return x.astype(jnp.bfloat16)
    scaled = _SCALED[codec]
    values = x.astype(jnp.float32)
    # A maximum of floats loses NaN where compilers vectorise it, an infinity never.
    largest = jnp.max(jnp.where(jnp.isfinite(values), jnp.abs(values), jnp.inf), axis=-1, keepdims=True)
    finite = jnp.isfinite(largest)
    # Times the reciprocal, in so many words: compilers replace the division, eager execution does not.
    scale = jnp.maximum(largest * np.float32(1 / scaled.largest), scaled.smallest_scale)
    scale_bits = jnp.where(finite, _bfloat16_above(scale), np.uint16(0x7FC0))
    values = jnp.where(finite, values / _from_bits(scale_bits), 0)
    if scaled.dtype == jnp.int8:
        values = jnp.round(values)
    value_bytes = jax.lax.bitcast_convert_type(values.astype(scaled.dtype), jnp.uint8)
    return jnp.concatenate([value_bytes, (scale_bits & 0xFF).astype(jnp.uint8), (scale_bits >> 8).astype(jnp.uint8)], axis=-1)


def decode(wire: Array, codec: str, dtype: jax.typing.DTypeLike, width: int) -> Float[Array, "*lead K H"]:
    """What `encode` wrote, as `dtype` [..., K, H] with H = `width`; any bytes decode to something, elementwise.

    Args:
        wire: as `encode` with the same codec makes it.
        codec: a name of `kvcache.codecs.CODECS`.
        dtype: of the cache, float32 or bfloat16.
        width: elements per token and head.

    Raises:
        InvalidInput: another name or dtype, or a wire array whose dtype or last axis does not belong to these.
    """
    dtype = jnp.dtype(dtype)
    if codec not in _NAMES:
        raise InvalidInput("codec", codec, f"one of {_NAMES}")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise InvalidInput("dtype", dtype, "float32 or bfloat16")
    if codec in _SCALED:
        expected = jnp.dtype(jnp.uint8), width + SCALE_BYTES
    else:
        expected = jnp.dtype(jnp.bfloat16) if codec == "bf16" else dtype, width
    if wire.ndim < 2 or width <= 0 or (wire.dtype, wire.shape[-1]) != expected:
        raise InvalidInput("wire", f"{wire.dtype}{wire.shape}", f"{expected[0]} [..., heads, {expected[1]}] for codec {codec}")
    if codec not in _SCALED:
        return wire.astype(dtype)
    values = jax.lax.bitcast_convert_type(wire[..., :width], _SCALED[codec].dtype).astype(jnp.float32)
    low, high = wire[..., width, None].astype(jnp.uint16), wire[..., width + 1, None].astype(jnp.uint16)
    return (values * _from_bits(low | high << 8)).astype(dtype)


def rates(x: Float[Array, "*lead K H"], codec: str, repeats: int = 3) -> tuple[float, float]:
    """(encode, decode) bytes of `x` per second where it lies, each at its best of `repeats` after a first run that compiles."""
    wire = encode(x, codec)
    programs: tuple[Any, ...] = (
        jax.jit(functools.partial(encode, codec=codec)),
        jax.jit(functools.partial(decode, codec=codec, dtype=x.dtype, width=x.shape[-1])),
    )
    found = []
    for program, argument in zip(programs, (x, wire), strict=True):
        jax.block_until_ready(program(argument))
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(program(argument))
            seconds.append(time.perf_counter() - began)
        found.append(x.nbytes / min(seconds))
    return found[0], found[1]


def _bfloat16_above(x: Float[Array, "..."]) -> Array:
    """Bits, uint16, of the least bfloat16 that is not below `x`: positive, float32, well below the largest bfloat16."""
    return ((jax.lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(0xFFFF)) >> 16).astype(jnp.uint16)


def _from_bits(bits: Array) -> Float[Array, "..."]:
    """The float32 of a bfloat16's bits, uint16."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)

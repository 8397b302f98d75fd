"""The device codecs on whatever device is here: their promised errors against float64 on the host, and their speed."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from prfaas_jax.ops.kv_codec import decode, encode, rates

CODECS = ("none", "bf16", "int8", "fp8")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
VALUES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
LARGEST = {"int8": 127, "fp8": 448}
_SMALLEST_NORMAL = 2.0**-126

_encode = jax.jit(encode, static_argnums=1)
_decode = jax.jit(decode, static_argnums=(1, 2, 3))


def promised(x: np.ndarray, codec: str) -> np.ndarray:
    """Largest error that `encode` promises for each element of finite `x`, float64 [..., heads, width], decoded to float32."""
    match codec:
        case "none":
            return np.zeros_like(x)
        case "bf16":
            return np.abs(x) * 2.0**-8 + _SMALLEST_NORMAL
    scale = np.abs(x).max(axis=-1, keepdims=True) / LARGEST[codec] * (1 + 2.0**-7)
    error = np.broadcast_to(scale / 2, x.shape) if codec == "int8" else np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10)
    return error * (1 + 2.0**-20) + _SMALLEST_NORMAL


def read_wire(wire: np.ndarray, codec: str) -> tuple[np.ndarray, np.ndarray]:
    """(values [..., heads, width], scales [..., heads, 1]) of int8 or fp8 from the bytes alone, float64."""
    values = np.ascontiguousarray(wire[..., :-2]).view(VALUES[codec])
    scales = np.ascontiguousarray(wire[..., -2:]).view("<u2").astype(np.uint16).view(DTYPES["bfloat16"])
    return values.astype(np.float64), scales.astype(np.float64)


def check(dtype: str) -> Iterator[tuple[str, str, float]]:
    """(op, shape in words, largest error as a share of what is promised) per codec: 1 is the most that is right.

    Infinite where the bytes on the wire say something else than what was decoded, or where a row with a NaN does not come back as NaN, or
    touches another.
    """
    rng = np.random.default_rng(0)
    tokens, heads, width = 600, 3, 64
    magnitudes = 2.0 ** rng.integers(-40, 40, (tokens, heads, 1))
    x = (rng.standard_normal((tokens, heads, width)) * magnitudes).astype(DTYPES[dtype])
    x[7], x[8, 1, 5] = 0, np.nan
    broken = np.isnan(x.astype(np.float32))
    for codec in CODECS:
        wire = _encode(x, codec)
        got = np.asarray(_decode(wire, codec, dtype if codec == "none" else "float32", width)).astype(np.float64)
        nan = np.broadcast_to(broken.any(axis=-1, keepdims=True), x.shape) if codec in VALUES else broken
        exact = np.where(nan, 0, x.astype(np.float64))
        right = np.array_equal(np.isnan(got), nan)
        if codec in VALUES:
            values, scales = read_wire(np.asarray(wire), codec)
            right = right and np.array_equal(values * scales, got, equal_nan=True)
        limit = np.maximum(promised(exact, codec), np.finfo(np.float64).tiny)
        share = (np.abs(np.where(nan, 0, got) - exact) / limit).max()
        yield f"kv_codec/{codec}", f"{tokens} tokens, {heads} heads, width {width}", float(share) if right else np.inf


def measure(mebibytes: int = 256, repeats: int = 10) -> list[dict[str, Any]]:
    """A row per codec and dtype: encode and decode of a cache of 8 heads x 128 in its bytes per second, the fastest of `repeats`."""
    rows = []
    for dtype, item in DTYPES.items():
        heads, width = 8, 128
        shape = (mebibytes * 2**20 // (heads * width * item.itemsize), heads, width)
        x = jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype))
        for codec in CODECS[1:]:
            encode_rate, decode_rate = rates(x, codec, repeats)
            measured = {"encode_bytes_per_s": encode_rate, "decode_bytes_per_s": decode_rate}
            rows.append({"codec": codec, "dtype": dtype, "bytes": x.nbytes, "wire_bytes": _encode(x, codec).nbytes, **measured})
    return rows

"""Device codecs of what leaves a cache: bytes with a scale per token and head, or bfloat16 for states. Names: kvcache/codecs.py."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from prfaas_jax.kvcache.codecs import SCALE_BYTES

# Per byte-sized codec the largest magnitude that it writes, and the dtype of its elements.
_BYTES = {"int8": (127.0, jnp.int8), "fp8": (448.0, jnp.float8_e4m3fn)}


def encode(x: Float[Array, "... W"], codec: str) -> Array:
    """`x` as the codec writes it: uint8 [..., W + SCALE_BYTES], elements and then a bfloat16 scale; of "bf16", bfloat16 [..., W]."""
    if codec == "bf16":
        return x.astype(jnp.bfloat16)
    largest, dtype = _BYTES[codec]
    wide = x.astype(jnp.float32)
    scale = (jnp.abs(wide).max(axis=-1, keepdims=True) / largest).astype(jnp.bfloat16)
    divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
    scaled = jnp.clip(wide / divisor, -largest, largest)  # a scale rounded down would overflow
    elements = (jnp.round(scaled) if codec == "int8" else scaled).astype(dtype)
    as_bytes = jax.lax.bitcast_convert_type(scale, jnp.uint8).reshape(*x.shape[:-1], SCALE_BYTES)
    return jnp.concatenate([jax.lax.bitcast_convert_type(elements, jnp.uint8), as_bytes], axis=-1)


def decode(wire: Array, codec: str, dtype: DTypeLike, width: int) -> Float[Array, "... W"]:
    """What `encode` wrote, as `dtype`; `width` is W."""
    if codec == "bf16":
        return wire.astype(dtype)
    elements = jax.lax.bitcast_convert_type(wire[..., :width], _BYTES[codec][1]).astype(jnp.float32)
    scale = jax.lax.bitcast_convert_type(wire[..., width:], jnp.bfloat16)[..., None]
    return (elements * scale.astype(jnp.float32)).astype(dtype)

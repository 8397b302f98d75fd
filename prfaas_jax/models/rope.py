"""Rotary position embeddings, half-rotation convention (Hugging Face Llama and Qwen)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from prfaas_jax.models.layer_config import Rope, RopeScaling

Tables = tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]


def inverse_frequencies(rope: Rope, dims: int) -> np.ndarray:
    """Angular frequency of each rotated pair, float32 [dims / 2], scaled as `rope.scaling` says."""
    freqs = rope.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    match rope.scaling:
        case None:
            pass
        case RopeScaling(kind="linear", factor=factor):
            freqs = freqs / factor
        case scaling:
            wavelengths = 2 * np.pi / freqs
            low, high = (scaling.original_max_position / f for f in (scaling.low_freq_factor, scaling.high_freq_factor))
            # 0 where the wavelength is long (fully scaled), 1 where it is short (untouched), linear in the frequency between.
            smooth = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            smooth = np.where(wavelengths > low, 0.0, np.where(wavelengths < high, 1.0, smooth))
            freqs = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    return freqs.astype(np.float32)


def rope_tables(positions: Int[Array, "B T"], rope: Rope, dims: int) -> Tables:
    """Cosines and sines of the rotation angles of `dims` elements, float32, broadcastable over heads."""
    angles = positions.astype(jnp.float32)[..., None, None] * inverse_frequencies(rope, dims)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], tables: Tables) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + R]) of the first 2 R elements, R being the tables' width, in float32; returns x's dtype."""
    cos, sin = tables
    dims = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :dims].astype(jnp.float32), 2, axis=-1)
    parts = [a * cos - b * sin, b * cos + a * sin]
    if dims < x.shape[-1]:
        parts.append(x[..., dims:].astype(jnp.float32))
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)

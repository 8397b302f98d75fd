"""Rotary position embeddings, half-rotation convention (Hugging Face Llama and Qwen)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from prfaas_jax.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequency of each rotated pair, float32 [head_dim / 2], scaled as `config.rope_scaling` says."""
    freqs = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    match config.rope_scaling:
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


def rope_tables(positions: Int[Array, "B T"], config: ModelConfig) -> tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]]:
    """Cosines and sines of the rotation angles, float32, broadcastable over heads."""
    angles = positions.astype(jnp.float32)[..., None, None] * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], tables: tuple[jax.Array, jax.Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]) in float32; returns x's dtype."""
    cos, sin = tables
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

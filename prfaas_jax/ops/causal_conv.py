"""Depthwise causal convolution over tokens, continued from the inputs that came before."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prfaas_jax.errors import InvalidInput


def causal_conv(
    x: Float[Array, "B T H d"],
    tail: Float[Array, "B H tail"],
    weight: Float[Array, "H d W"],
    valid: Int[Array, " B"],
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H tail"]]:
    """`y_t = sum_w weight[..., w] x_{t - W + 1 + w}` and the inputs that the next call continues from; no bias, no activation.

    Shard-local. Summed in float32, in the same order for every token, so neither the row's companions nor where a sequence is split
    changes a bit. W may be 1: then the tail is empty.

    Args:
        x: inputs of T new tokens.
        tail: the W - 1 inputs before them, row-major `[W - 1, d]` per head, oldest first; zeros at a sequence's start.
        weight: taps of each channel, the current token's last.
        valid: tokens of each row that are no padding, 0..T.

    Returns:
        y in x's dtype, zero at padding; and the tail after `valid[b]` tokens in the tail's dtype (the old one where valid is 0).

    Raises:
        InvalidInput: a tail whose width is not (W - 1) * d.
    """
    batch, tokens, heads, dim = x.shape
    width = weight.shape[-1]
    if tail.shape[-1] != (width - 1) * dim:
        raise InvalidInput("tail.shape", tail.shape, f"(B, H, {(width - 1) * dim}), which is (W - 1) * d")
    before = tail.reshape(batch, heads, width - 1, dim).transpose(0, 2, 1, 3)
    inputs = jnp.concatenate([before.astype(x.dtype), x], axis=1)

    taps = weight.astype(jnp.float32)
    y = sum(inputs[:, w : w + tokens].astype(jnp.float32) * taps[..., w] for w in range(width))
    live = jnp.arange(tokens) < valid[:, None]
    y = jnp.where(live[..., None, None], y, 0).astype(x.dtype)

    kept = valid[:, None] + jnp.arange(width - 1)
    last = jnp.take_along_axis(inputs, kept[..., None, None], axis=1, mode="promise_in_bounds")
    return y, last.transpose(0, 2, 1, 3).reshape(tail.shape).astype(tail.dtype)

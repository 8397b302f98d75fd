from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.causal_conv import causal_conv

GOLDENS = Path(__file__).parents[1] / "goldens" / "ops"
op = jax.jit(causal_conv)


def case(batch: int, tokens: int, width: int, heads: int = 2, dim: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(width)
    shapes = (batch, tokens, heads, dim), (batch, heads, (width - 1) * dim), (heads, dim, width)
    x, tail, weight = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, tail, weight


def run(x: np.ndarray, tail: np.ndarray, weight: np.ndarray, valid: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.asarray(a) for a in op(x, tail, weight, np.asarray(valid, np.int32)))


def test_gives_the_numbers_of_transformers() -> None:
    x = dict(np.load(GOLDENS / "causal_conv.npz"))
    split, tokens = int(x["split"]), x["x"].shape[1]
    heads, dim, width = x["weight"].shape
    start = np.zeros((1, heads, (width - 1) * dim), np.float32)
    first, tail = run(x["x"][:, :split], start, x["weight"], [split])
    second, tail = run(x["x"][:, split:], tail, x["weight"], [tokens - split])
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), x["out"], atol=1e-6)
    # The golden tail is [B, W - 1, H, d] after all tokens.
    np.testing.assert_array_equal(tail.reshape(1, heads, width - 1, dim).swapaxes(1, 2), x["tail"])


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_tail_holds_the_last_inputs_of_each_row(width: int) -> None:
    """Also where a row has fewer of them than the tail is long, or none."""
    x, tail, weight = case(5, 8, width)
    valid = [0, 1, 2, 3, 8]
    y, new_tail = run(x, tail, weight, valid)
    before = tail.reshape(5, 2, width - 1, 6).swapaxes(1, 2)
    for row, count in enumerate(valid):
        history = np.concatenate([before[row], x[row, :count]])
        expected = sum(history[w : w + count].astype(np.float64) * weight[..., w] for w in range(width))
        np.testing.assert_allclose(y[row, :count], expected, atol=2e-6)
        kept = history[len(history) - (width - 1) :]
        np.testing.assert_array_equal(new_tail[row], kept.swapaxes(0, 1).reshape(2, -1))


@pytest.mark.parametrize("dim", [6, 64])
def test_neither_splits_nor_companions_nor_padding_change_a_bit(dim: int) -> None:
    x, tail, weight = case(3, 70, 4, dim=dim)
    y, end = run(x, tail, weight, [70] * 3)
    for splits in ([1, 70], [2, 3, 70], [64, 70]):
        first, current, parts = 0, tail, []
        for last in splits:
            part, current = run(x[:, first:last], current, weight, [last - first] * 3)
            parts.append(part)
            first = last
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), y)
        np.testing.assert_array_equal(current, end)
    padded = np.concatenate([x[1:2], np.full((1, 58, 2, dim), np.nan, np.float32)], axis=1)
    alone, alone_end = run(padded, tail[1:2], weight, [70])
    np.testing.assert_array_equal(alone[0, :70], y[1])
    np.testing.assert_array_equal(alone_end[0], end[1])
    assert np.isfinite(alone).all()


def test_bfloat16_is_summed_in_float32_and_kept_as_it_is() -> None:
    x, tail, weight = (np.asarray(a.astype(jnp.bfloat16)) for a in case(1, 8, 4))
    y, end = op(x, tail, weight, jnp.asarray([8]))
    exact, exact_end = op(*(a.astype(np.float32) for a in (x, tail, weight)), jnp.asarray([8]))
    assert y.dtype == end.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(end.astype(jnp.float32), exact_end)


def test_refuses_a_tail_of_another_width() -> None:
    x, _, weight = case(1, 8, 4)
    with pytest.raises(InvalidInput, match=r"tail\.shape"):
        causal_conv(x, np.zeros((1, 2, 12), np.float32), weight, np.asarray([8]))

"""Both implementations, against transformers' numbers and each other."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.lightning import IMPLEMENTATIONS, lightning, lightning_slopes, log_decay

GOLDENS = Path(__file__).parents[1] / "goldens" / "ops"
op = jax.jit(lightning, static_argnames="implementation")
Inputs = dict[str, np.ndarray]


def inputs(batch: int, tokens: int, heads: int = 3, dim: int = 8) -> Inputs:
    rng = np.random.default_rng(tokens)
    x = {n: rng.standard_normal((batch, tokens, heads, dim)).astype(np.float32) for n in ("q", "k", "v")}
    # From a state that never fades to one that is gone after a token.
    rates = -np.geomspace(1e-6, 200, heads).astype(np.float32)
    return {**x, "log_decay": rates, "state": rng.standard_normal((batch, heads, dim, dim)).astype(np.float32)}


def run(x: Inputs, valid: list[int] | None = None, implementation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    counts = jnp.asarray([x["q"].shape[1]] * len(x["q"]) if valid is None else valid, jnp.int32)
    out, state = op(**x, valid=counts, implementation=implementation)
    assert out.dtype == state.dtype == jnp.float32
    return np.asarray(out), np.asarray(state)


def part(x: Inputs, rows: list[int] | slice, tokens: slice = slice(None), state: np.ndarray | None = None) -> Inputs:
    cut = {n: x[n][rows, tokens] for n in ("q", "k", "v")}
    return {**cut, "log_decay": x["log_decay"], "state": x["state"][rows] if state is None else state}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gives_the_numbers_of_transformers(implementation: str) -> None:
    """From zeros by blocks, then on from the state by tokens."""
    x = dict(np.load(GOLDENS / "lightning.npz"))
    layer, layers = int(x["layer"]), int(x["layers"])
    rates = np.asarray(log_decay(layer, layers, x["q"].shape[2]))
    case = {**{n: x[n] for n in ("q", "k", "v")}, "log_decay": rates, "state": np.zeros_like(x["state"])}
    out, state = run(case, implementation=implementation)
    more_out, more_state = run({**case, "state": state}, implementation=implementation)
    for got, name in ((out, "out"), (state, "state"), (more_out, "more_out"), (more_state, "more_state")):
        # Sums of up to 168 terms without normalisation: relative to their size.
        np.testing.assert_allclose(got, x[name], atol=2e-6 * np.abs(x[name]).max(), rtol=0)


def test_rates_are_those_of_transformers() -> None:
    x = dict(np.load(GOLDENS / "lightning.npz"))
    layers, heads = int(x["layers"]), x["q"].shape[2]
    traced = jax.jit(functools.partial(log_decay, num_layers=layers, num_heads=heads))
    for layer in range(layers):
        np.testing.assert_allclose(log_decay(layer, layers, heads), -x[f"rate_{layer}"], rtol=2e-6)
        np.testing.assert_allclose(traced(jnp.int32(layer)), -x[f"rate_{layer}"], rtol=2e-6)
    np.testing.assert_allclose(lightning_slopes(8), [2.0**-h for h in range(1, 9)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decays_from_none_to_total(implementation: str) -> None:
    x = inputs(2, 150)
    out, state = run(x, implementation=implementation)
    q, k, v, rates, expected = (x[n].astype(np.float64) for n in ("q", "k", "v", "log_decay", "state"))
    for t in range(150):
        expected = np.exp(rates)[:, None, None] * expected + k[:, t, ..., None] * v[:, t, :, None]
        seen = np.einsum("bhk,bhkv->bhv", q[:, t], expected)
        # Nothing is normalised here: errors are relative to what was summed up.
        np.testing.assert_allclose(out[:, t], seen, atol=3e-6 * np.abs(seen).max())
    np.testing.assert_allclose(state, expected, atol=3e-6 * np.abs(expected).max())


def test_a_row_depends_on_its_own_tokens_only() -> None:
    valid = [130, 0, 64, 1, 192]
    x = inputs(5, 192, dim=64)
    for row, count in enumerate(valid):
        for name in ("q", "k", "v"):
            x[name][row, count:] = np.nan
    out, state = run(x, valid)
    assert np.isfinite(out).all()
    for order in ([4, 2, 0, 1, 3], [0]):
        moved_out, moved_state = run(part(x, order), [valid[i] for i in order])
        np.testing.assert_array_equal(moved_out, out[order])
        np.testing.assert_array_equal(moved_state, state[order])
    for row, count in enumerate(valid):
        if count:
            short_out, short_state = run(part(x, [row], slice(count)), implementation="chunkwise")
            np.testing.assert_array_equal(short_out, out[[row], :count])
            np.testing.assert_array_equal(short_state, state[[row]])


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_without_tokens_keeps_its_state_bit_for_bit(tokens: int, implementation: str) -> None:
    x = inputs(2, tokens)
    x["state"][0] = -0.0
    x["q"][0] = x["k"][0] = x["v"][0] = np.nan
    _, state = run(x, [0, tokens], implementation)
    assert state[0].tobytes() == x["state"][0].tobytes()
    assert not np.array_equal(state[1], x["state"][1])


def test_resuming_at_a_chunk_changes_no_bit() -> None:
    x = inputs(2, 300, dim=64)
    out, state = run(x)
    for split in (64, 256):
        first_out, between = run(part(x, slice(None), slice(split)))
        second_out, end = run(part(x, slice(None), slice(split, None), between))
        np.testing.assert_array_equal(np.concatenate([first_out, second_out], axis=1), out)
        np.testing.assert_array_equal(end, state)


def test_single_tokens_go_on_where_chunks_stopped() -> None:
    x = inputs(4, 98)
    out, _ = run(x)
    _, state = run(part(x, slice(None), slice(97)))
    step_out, after = run(part(x, slice(None), slice(97, 98), state))
    np.testing.assert_allclose(step_out[:, 0], out[:, 97], atol=5e-5)
    alone_out, alone = run(part(x, [2], slice(97, 98), state[[2]]))
    np.testing.assert_array_equal(alone_out[0], step_out[2])
    np.testing.assert_array_equal(alone[0], after[2])


def test_both_forms_have_the_same_gradients() -> None:
    x = inputs(2, 100)
    weights = np.random.default_rng(1).standard_normal(x["q"].shape)

    def gradients(implementation: str) -> dict[str, jax.Array]:
        def loss(x: dict[str, jax.Array]) -> jax.Array:
            out, state = lightning(**x, valid=jnp.asarray([100, 77]), implementation=implementation)
            return (out * weights).sum() + state.sum()

        return jax.jit(jax.grad(loss))(x)

    chunkwise, recurrent = gradients("chunkwise"), gradients("recurrent")
    for name in x:
        scale = float(jnp.abs(recurrent[name]).max())
        assert scale > 0
        np.testing.assert_allclose(chunkwise[name], recurrent[name], atol=1e-5 * scale, err_msg=name)


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(InvalidInput, match="implementation"):
        lightning(**inputs(1, 4), valid=np.asarray([4]), implementation="magic")

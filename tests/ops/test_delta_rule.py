"""Both implementations, against transformers' numbers, a float64 recurrence and each other."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.delta_rule import IMPLEMENTATIONS, delta_rule, l2_normalize

GOLDENS = Path(__file__).parents[1] / "goldens" / "ops"
op = jax.jit(delta_rule, static_argnames="implementation")
Inputs = dict[str, np.ndarray]


# Few shapes: compiling them takes most of the time.
ROWS, TOKENS = 5, 192


def inputs(batch: int = ROWS, tokens: int = TOKENS, *, heads: int = 2, dk: int = 64, dv: int = 32, channels: bool = True) -> Inputs:
    """Rows of random tokens; one in sixteen tokens erases the state, or for a decay per channel most of its channels."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((batch, *shape)).astype(np.float32)

    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(tokens, heads, dk), normal(tokens, heads, dk)))
    dg = dk if channels else 1
    erases = (rng.random((batch, tokens, heads, 1)) < 1 / 16) & (rng.random((batch, tokens, heads, dg)) < 0.8)
    g = np.where(erases, -300, -0.05 * np.abs(normal(tokens, heads, dg)) ** 3).astype(np.float32)
    beta = rng.random((batch, tokens, heads), dtype=np.float32)
    return {"q": q * dk**-0.5, "k": k, "v": normal(tokens, heads, dv), "g": g, "beta": beta, "state": normal(heads, dk, dv)}


def run(x: Inputs, valid: list[int] | None = None, implementation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    counts = jnp.asarray([x["q"].shape[1]] * len(x["q"]) if valid is None else valid, jnp.int32)
    out, state = op(**{n: jnp.asarray(a) for n, a in x.items()}, valid=counts, implementation=implementation)
    assert out.dtype == state.dtype == jnp.float32
    return np.asarray(out), np.asarray(state)


def rows(x: Inputs, which: slice | list[int]) -> Inputs:
    return {n: a[which] for n, a in x.items()}


def tokens_of(x: Inputs, first: int, last: int, state: np.ndarray | None = None) -> Inputs:
    cut = {n: a[:, first:last] for n, a in x.items() if n != "state"}
    return {**cut, "state": x["state"] if state is None else state}


def recurrence(x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in float64."""
    q, k, v, g, beta, state = (x[n].astype(np.float64) for n in ("q", "k", "v", "g", "beta", "state"))
    out = []
    for t in range(q.shape[1]):
        state = np.exp(g[:, t])[..., None] * state
        update = beta[:, t, :, None] * (v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, ..., None] * update[..., None, :]
        out.append(np.einsum("bhk,bhkv->bhv", q[:, t], state))
    return np.stack(out, axis=1), state


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model", ["kda", "gated_delta"])
def test_gives_the_numbers_of_transformers(model: str, implementation: str) -> None:
    x = dict(np.load(GOLDENS / f"{model}.npz"))
    q, k = (np.asarray(l2_normalize(x[n])) for n in ("q", "k"))
    g = x["g"] if model == "kda" else x["g"][..., None]
    case = {"q": q * q.shape[-1] ** -0.5, "k": k, "g": g, **{n: x[n] for n in ("v", "beta", "state")}}
    out, state = run(case, implementation=implementation)
    for form in ("recurrent", "chunked"):
        np.testing.assert_allclose(out, x[f"{form}_out"], atol=2e-6, rtol=0)
        np.testing.assert_allclose(state, x[f"{form}_state"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels", [True, False])
def test_is_exact_where_tokens_erase_the_state(channels: bool, implementation: str) -> None:
    """The decays of a chunk sum to thousands: a difference of such sums would be wrong in the fourth digit, or overflow."""
    x = inputs(channels=channels)
    out, state = run(x, implementation=implementation)
    expected_out, expected_state = recurrence(x)
    np.testing.assert_allclose(out, expected_out, atol=1e-6, rtol=0)
    np.testing.assert_allclose(state, expected_state, atol=2e-6, rtol=0)


@pytest.mark.parametrize("channels", [True, False])
def test_is_stable_where_all_keys_are_equal(channels: bool) -> None:
    """Powers of the system's matrix reach 10^18 here."""
    x = inputs(1, 64, channels=channels)
    x["k"][:] = x["k"][:, :1]
    x["g"][:], x["beta"][:] = 0, 1
    out, state = run(x)
    expected_out, expected_state = recurrence(x)
    np.testing.assert_allclose(out, expected_out, atol=5e-6)
    np.testing.assert_allclose(state, expected_state, atol=1e-5)


@pytest.mark.parametrize("channels", [True, False])
def test_a_row_depends_on_its_own_tokens_only(channels: bool) -> None:
    """Not on its companions, its place among them, what its padding holds or how long that is."""
    valid = [130, 0, 64, 1, 192]
    x = inputs(channels=channels)
    for row, count in enumerate(valid):
        for name in set(x) - {"state"}:
            x[name][row, count:] = np.nan
    out, state = run(x, valid)
    assert np.isfinite(out).all()
    order = [4, 2, 0, 1, 3]
    moved_out, moved_state = run(rows(x, order), [valid[i] for i in order])
    np.testing.assert_array_equal(moved_out, out[order])
    np.testing.assert_array_equal(moved_state, state[order])
    for row in (0, 2):
        short_out, short_state = run(tokens_of(rows(x, [row]), 0, valid[row]))
        np.testing.assert_array_equal(short_out, out[[row], : valid[row]])
        np.testing.assert_array_equal(short_state, state[[row]])


@pytest.mark.parametrize(("tokens", "implementation"), [(1, "recurrent"), (TOKENS, "recurrent"), (TOKENS, "chunkwise")])
def test_a_row_without_tokens_keeps_its_state_bit_for_bit(tokens: int, implementation: str) -> None:
    x = inputs(tokens=tokens)
    x["state"][0] = -0.0
    x["state"][0, 0, 0, :4] = [np.inf, np.nan, 1e-45, -1]
    for name in set(x) - {"state"}:
        x[name][0] = np.nan
    _, state = run(x, [0, *[tokens] * 4], implementation)
    assert state[0].tobytes() == x["state"][0].tobytes()
    assert not np.array_equal(state[1], x["state"][1])


@pytest.mark.parametrize("channels", [True, False])
def test_resuming_at_a_chunk_changes_no_bit(channels: bool) -> None:
    x = inputs(channels=channels)
    out, state = run(x)
    current, parts = x["state"][:1], []
    for first in range(0, TOKENS, 64):
        part, current = run(tokens_of(rows(x, [0]), first, first + 64, current))
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), out[:1])
    np.testing.assert_array_equal(current, state[:1])


@pytest.mark.parametrize("channels", [True, False])
def test_single_tokens_go_on_where_chunks_stopped(channels: bool) -> None:
    x = inputs(channels=channels)
    out, state = run(x)
    _, current = run(x, [TOKENS - 3] * ROWS)
    for t in range(TOKENS - 3, TOKENS):
        token = tokens_of(x, t, t + 1, current)
        step_out, current = run(token)
        np.testing.assert_allclose(step_out[:, 0], out[:, t], atol=2e-6)
        alone_out, alone = run(rows(token, [3]))
        np.testing.assert_array_equal(alone_out, step_out[[3]])
        np.testing.assert_array_equal(alone, current[[3]])
    np.testing.assert_allclose(current, state, atol=2e-6)


@pytest.mark.parametrize("channels", [True, False])
def test_both_forms_have_the_same_gradients(channels: bool) -> None:
    x = inputs(2, 100, heads=1, dk=8, dv=4, channels=channels)
    weights = np.random.default_rng(1).standard_normal((2, 100, 1, 4)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="implementation")
    def gradients(x: dict[str, jax.Array], implementation: str) -> dict[str, jax.Array]:
        def loss(x: dict[str, jax.Array]) -> jax.Array:
            out, state = delta_rule(**x, valid=jnp.asarray([100, 77]), implementation=implementation)
            return (out * weights).sum() + jnp.sin(state).sum()

        return jax.grad(loss)(x)

    chunkwise, recurrent = (gradients({n: jnp.asarray(a) for n, a in x.items()}, name) for name in ("chunkwise", "recurrent"))
    for name in x:
        assert np.abs(recurrent[name]).max() > 0
        scale = float(jnp.abs(recurrent[name]).max())
        np.testing.assert_allclose(chunkwise[name], recurrent[name], atol=2e-6 * max(scale, 1), err_msg=name)


def test_memory_does_not_hold_the_products_of_all_chunks() -> None:
    """Per token, a few vectors: far from a chunk's 64 decays per channel and token."""
    tokens = 8192
    x = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in inputs(1, tokens).items()}
    compiled = op.lower(**x, valid=jax.ShapeDtypeStruct((1,), jnp.int32), implementation="chunkwise").compile()
    vector = x["k"].size // tokens * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * tokens * vector


def test_takes_bfloat16_and_computes_in_float32() -> None:
    x = {n: a if n == "state" else np.asarray(a.astype(jnp.bfloat16)) for n, a in inputs(channels=False).items()}
    rounded = {n: a.astype(np.float32) for n, a in x.items()}
    for got, expected in zip(run(x), run(rounded), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_l2_normalize_treats_every_row_alike() -> None:
    """However many of them there are, which decides the order of XLA's reductions."""
    x = inputs()["state"] * np.geomspace(1e-3, 1e3, 32, dtype=np.float32)
    normalized = np.asarray(jax.jit(l2_normalize)(x))
    expected = x / np.sqrt(np.square(x, dtype=np.float64).sum(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normalized, expected, rtol=1e-6)
    for few in (1, 7):
        np.testing.assert_array_equal(jax.jit(l2_normalize)(x[0, 0, :few]), normalized[0, 0, :few])


@pytest.mark.parametrize(("change", "field"), [({"implementation": "magic"}, "implementation"), ({"g": np.zeros((1, 4, 2, 3))}, "g.shape")])
def test_names_what_is_wrong(change: dict, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        delta_rule(**{**inputs(1, 4), "valid": np.asarray([4]), **change})
    assert caught.value.field == field

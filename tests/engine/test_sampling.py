"""Sampling against numpy: masks, statistics, reproducibility, extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prfaas_jax.engine.api import SamplingParams
from prfaas_jax.engine.plan import SamplingRows
from prfaas_jax.engine.sampling import sample
from prfaas_jax.errors import InvalidInput

VOCAB = 64
draw = jax.jit(sample)


def rows_of(*params: SamplingParams) -> SamplingRows:
    rows = SamplingRows.greedy(len(params))
    for i, p in enumerate(params):
        rows.put(i, p)
    return rows


def many(logits: np.ndarray, params: SamplingParams, draws: int = 4096) -> np.ndarray:
    """`draws` tokens at successive positions from one distribution, in the batches of one compiled shape."""
    batch = 512
    rows = rows_of(*[params] * batch)
    wide = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (batch, logits.size))
    return np.concatenate([np.asarray(draw(wide, rows, jnp.arange(i, i + batch))[0]) for i in range(0, draws, batch)])


def random_logits(seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, VOCAB).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def kept_by(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The tokens that may be drawn, by the definition: the k likeliest, then the fewest of them whose mass reaches p."""
    order = np.argsort(-logits, kind="stable")[: params.top_k or logits.size]
    mass = softmax(logits[order] / params.temperature)
    count = int(np.searchsorted(np.cumsum(mass), params.top_p)) + 1
    return np.sort(order[:count])


def assert_distributed(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square over the outcomes that are expected at least five times; its mean is the degrees of freedom, its variance twice that."""
    counts = np.bincount(tokens, minlength=expected.size)
    assert counts[expected == 0].sum() == 0
    wanted = expected * tokens.size
    often = wanted >= 5
    chi2 = ((counts[often] - wanted[often]) ** 2 / wanted[often]).sum()
    freedom = often.sum() - 1
    assert chi2 <= freedom + 5 * np.sqrt(2 * freedom), (chi2, freedom)


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = np.stack([random_logits(i) for i in range(4)])
    logits[3, [5, 9]] = 50.0
    tokens, _ = draw(logits, rows_of(*[SamplingParams()] * 4), jnp.arange(4))
    np.testing.assert_array_equal(tokens, logits.argmax(1))
    assert tokens[3] == 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_gives_the_scaled_distribution(temperature: float) -> None:
    logits = random_logits(1)
    assert_distributed(many(logits, SamplingParams(temperature=temperature, seed=3)), softmax(logits / temperature))


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(5, 1.0, 1.0), (0, 0.8, 1.0), (10, 0.5, 1.5), (1, 1.0, 1.0), (0, 1e-6, 2.0), (3, 0.999, 0.7)]
)
def test_masks_are_exactly_those_of_the_definition(top_k: int, top_p: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
    for seed in range(3):
        logits = random_logits(seed, 1.5)
        kept = kept_by(logits, params)
        expected = np.zeros(VOCAB)
        expected[kept] = softmax(logits[kept] / temperature)
        tokens = many(logits, params)
        assert_distributed(tokens, expected)
        likely = kept[expected[kept] > 0.01]  # missed with a chance of 0.99**4096
        assert set(likely) <= set(tokens.tolist()) <= set(kept)


def test_a_seeded_sample_depends_on_seed_and_position_alone() -> None:
    logits, params = random_logits(5), SamplingParams(temperature=1.0, top_p=0.95, seed=42)
    rng = np.random.default_rng(0)
    seen = set()
    for row, companion in [(0, SamplingParams()), (3, SamplingParams(temperature=2.0, top_k=3, seed=9)), (7, params)]:
        batch = rng.normal(size=(8, VOCAB)).astype(np.float32)
        batch[row] = logits
        everyone = [companion] * 8
        everyone[row] = params
        positions = rng.integers(0, 100, 8).astype(np.int32)
        positions[row] = 17
        tokens, logprobs = draw(batch, rows_of(*everyone), positions)
        seen.add((int(tokens[row]), float(logprobs[row])))
    assert len(seen) == 1
    elsewhere = many(logits, params, 512)
    assert len(set(elsewhere.tolist())) > 10  # other positions draw other tokens
    assert (many(logits, SamplingParams(temperature=1.0, top_p=0.95, seed=43), 512) != elsewhere).any()


def test_greedy_rows_are_untouched_by_sampling_companions() -> None:
    logits = np.stack([random_logits(i) for i in range(4)])
    mixed = rows_of(SamplingParams(), SamplingParams(temperature=5.0, seed=1), SamplingParams(), SamplingParams(temperature=1.0, top_k=2))
    tokens, _ = draw(logits, mixed, jnp.arange(4))
    assert [int(tokens[i]) for i in (0, 2)] == [int(logits[i].argmax()) for i in (0, 2)]


def test_logprob_is_that_of_the_unmodified_distribution() -> None:
    logits = np.stack([random_logits(i, 4.0) for i in range(8)])
    params = [SamplingParams(temperature=t, top_k=k, seed=i) for i, (t, k) in enumerate([(0, 0), (1, 0), (3, 5), (0.1, 0)] * 2)]
    tokens, logprobs = draw(logits, rows_of(*params), jnp.arange(8))
    expected = np.array([np.log(softmax(row)[token]) for row, token in zip(logits, np.asarray(tokens), strict=True)])
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-6, seed=1),
        SamplingParams(temperature=1e-30, seed=1),
        SamplingParams(temperature=1e-40, seed=1),
        SamplingParams(temperature=100.0, top_k=1, seed=2),
        SamplingParams(temperature=1.0, top_p=1e-9, seed=3),
        SamplingParams(temperature=1.0, top_k=10_000, top_p=1e-9, seed=3),
    ],
)
def test_extremes_are_greedy(params: SamplingParams) -> None:
    logits = random_logits(7)
    assert set(many(logits, params, 512).tolist()) == {int(logits.argmax())}


def test_top_k_above_the_vocabulary_keeps_everything() -> None:
    logits = random_logits(8)
    everything = many(logits, SamplingParams(temperature=1.0, seed=4), 512)
    np.testing.assert_array_equal(many(logits, SamplingParams(temperature=1.0, top_k=10_000, seed=4), 512), everything)


def test_equals_at_the_border_are_all_kept() -> None:
    logits = np.full(VOCAB, -5.0, np.float32)
    logits[[3, 30, 60]] = 2.0
    assert set(many(logits, SamplingParams(temperature=1.0, top_k=2, seed=5), 1024).tolist()) == {3, 30, 60}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)),
        *(("seed", -1), ("max_new_tokens", 0)),
    ],
)
def test_bad_parameters_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]

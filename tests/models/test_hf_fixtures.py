"""Our model against float32 logits that transformers computed for the same files (tests/goldens/make_hf_fixtures.py)."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from prfaas_jax.models.hf import read_hf
from prfaas_jax.models.params import from_flat
from prfaas_jax.models.score import forward_logits, perplexity, score
from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh

FIXTURES = Path(__file__).parents[1] / "goldens" / "hf"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
NEW = 12
SINGLE = Sharder(make_mesh(MeshSpec(), jax.devices()[:1]), "prefill")


@pytest.mark.parametrize("name", NAMES)
def test_logits_match_transformers(name: str) -> None:
    """Prompts of 1 to 300 tokens, padded at the right into one batch: nothing may see the padding."""
    config, arrays = read_hf(FIXTURES / name)
    with np.load(FIXTURES / name / "expected.npz") as file:
        expected = dict(file)
    lengths = sorted(int(key.removeprefix("prompt_")) for key in expected if key.startswith("prompt_"))
    batch = np.zeros((len(lengths), max(lengths) + NEW), np.int32)
    for row, n in zip(batch, lengths, strict=True):
        row[: n + NEW] = np.concatenate([expected[f"prompt_{n}"], expected[f"tokens_{n}"]])
    logits = np.asarray(forward_logits(config, from_flat(config, arrays, SINGLE), batch, SINGLE))
    for row, n in zip(logits, lengths, strict=True):
        ours = row[n - 1 : n - 1 + NEW]
        np.testing.assert_allclose(ours, expected[f"logits_{n}"], atol=1e-4, rtol=0, err_msg=f"prompt of {n}")
        np.testing.assert_array_equal(ours.argmax(-1), expected[f"tokens_{n}"], err_msg=f"prompt of {n}")


# Compiling the hybrids for four devices takes minutes together.
ON_A_MESH = ["qwen3", "mimo_v2_flash", *(pytest.param(n, marks=pytest.mark.slow) for n in ("kimi_linear", "qwen3_next", "minimax"))]


@pytest.mark.parametrize("name", ON_A_MESH)
def test_logits_match_transformers_on_a_mesh(name: str) -> None:
    """Residual split along the sequence, heads, states and vocabulary split over "model", batch over "data"."""
    shard = Sharder(make_mesh(MeshSpec(data=2, model=2)), "prefill")
    config, arrays = read_hf(FIXTURES / name)
    params = from_flat(config, arrays, shard)
    with np.load(FIXTURES / name / "expected.npz") as expected:
        sequence = np.concatenate([expected["prompt_70"], expected["tokens_70"]])[None]
        logits = expected["logits_70"]
    ours = np.asarray(forward_logits(config, params, np.repeat(sequence, 2, axis=0), shard))
    for row in ours:
        np.testing.assert_allclose(row[69:-1], logits, atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32() -> None:
    config, arrays = read_hf(FIXTURES / "llama_rope_scaled", "bfloat16")
    assert config == dataclasses.replace(read_hf(FIXTURES / "llama_rope_scaled")[0], dtype="bfloat16")
    assert {a.dtype.name for a in arrays.values()} == {"bfloat16"}
    with np.load(FIXTURES / "llama_rope_scaled" / "expected.npz") as expected:
        prompt, logits = expected["prompt_17"], expected["logits_17"]
    ours = np.asarray(forward_logits(config, from_flat(config, arrays, SINGLE), prompt[None], SINGLE))[0, -1]
    error = np.abs(ours - logits[0]).max()
    assert 0 < error < 0.1, "bfloat16 rounding, neither absent nor larger than it should be"


def test_score_is_the_log_softmax_of_the_next_token() -> None:
    config, arrays = read_hf(FIXTURES / "llama_tied")
    params = from_flat(config, arrays, SINGLE)
    with np.load(FIXTURES / "llama_tied" / "expected.npz") as expected:
        prompt, tokens, logits = expected["prompt_17"], expected["tokens_17"], expected["logits_17"].astype(np.float64)
    logprobs = score(config, params, np.concatenate([prompt, tokens])[None], SINGLE)
    assert logprobs.shape == (1, 17 + 12 - 1)
    wanted = logits[np.arange(12), tokens] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(logprobs[0, 16:], wanted, atol=1e-4)
    assert perplexity(config, params, np.concatenate([prompt, tokens])[None], SINGLE) == pytest.approx(np.exp(-logprobs.mean()), rel=1e-5)

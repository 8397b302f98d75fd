"""The evaluation of codecs on toys: an exact cache costs nothing, a broken one is noticed, and the interval is the one in the books."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.params import init_random
from prfaas_jax.models.score import forward_logits
from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh
from prfaas_jax.testing import codec_quality, codec_rates
from prfaas_jax.testing.codec_quality import Quality, codecs_of, evaluate, paired_interval, run, through, windows

SINGLE = Sharder(make_mesh(MeshSpec(), jax.devices()[:1]), "prefill")
# Dense attention; latents and states; windows with sinks and narrower values.
TOYS = ("qwen3_toy", "kimi_linear_toy", "mimo_toy")


@functools.cache
def toy(name):
    config = load_model_config(name)
    return config, init_random(config, 0, SINGLE)


def ids(config, count):
    return np.random.default_rng(0).integers(0, config.vocab_size, count).astype(np.int32)


@pytest.mark.parametrize("name", TOYS)
def test_going_on_behind_a_prefix_is_running_the_whole(name):
    config, params = toy(name)
    tokens = ids(config, 40)[None]
    _, added = run(config, params, tokens[:, :24], SINGLE)
    got, _ = run(config, params, tokens[:, 24:], SINGLE, 24, added)
    np.testing.assert_allclose(got, forward_logits(config, params, tokens, SINGLE)[:, 24:], atol=1e-4)


@pytest.mark.parametrize("name", TOYS)
def test_every_codec_that_applies_costs_little_and_more_than_nothing(name):
    config, params = toy(name)
    codecs = codecs_of(cache_spec(config))
    rows = windows(ids(config, 73), 24, 16)
    found = [quality for window in evaluate(config, params, rows, 24, codecs, SINGLE) for quality in window]
    assert len(rows) == 3 and len(found) == 3 * len(codecs)
    for codec in codecs:
        over = Quality.over([q for q in found if q.codec == str(codec)])
        assert over.tokens == 48 and over.top1_agreement > 0.8
        assert 0 < over.max_logit_error < 0.2 and 0 < over.kl < 1e-2
        assert over.low <= over.perplexity_change <= over.high and abs(over.perplexity_change) < 0.02


def test_codecs_follow_the_kinds_that_a_cache_has():
    texts = {name: [str(c) for c in codecs_of(cache_spec(load_model_config(name)))] for name in TOYS}
    assert texts["qwen3_toy"] == ["paged=int8", "paged=fp8"]
    assert texts["kimi_linear_toy"] == ["paged=int8", "paged=fp8", "state=bf16", "paged=int8,state=bf16"]
    assert texts["mimo_toy"] == ["paged=int8,window=int8", "paged=fp8,window=fp8"]


def test_no_codec_changes_no_bit_of_the_cache_and_none_of_the_scores():
    config, params = toy("kimi_linear_toy")
    _, added = run(config, params, ids(config, 24)[None], SINGLE)
    same = through(CacheCodec(), cache_spec(config), added)
    jax.tree.map(np.testing.assert_array_equal, same, added)
    (window, _) = evaluate(config, params, windows(ids(config, 57), 24, 16), 24, [CacheCodec()], SINGLE)
    assert window[0].nll_change == window[0].kl == window[0].max_logit_error == 0 and window[0].agreed == 16


def test_a_codec_that_loses_the_prefix_is_noticed(monkeypatch):
    config, params = toy("qwen3_toy")
    monkeypatch.setattr(codec_quality, "through", lambda codec, spec, added: jax.tree.map(jnp.zeros_like, added))
    (found, _) = evaluate(config, params, windows(ids(config, 57), 24, 16), 24, [CacheCodec(paged="int8")], SINGLE)
    assert found[0].kl > 1e-4 and found[0].max_logit_error > 0.1


def test_divergence_is_that_of_float64_however_small():
    rng = np.random.default_rng(0)
    expected, targets = rng.normal(size=(16, 300)).astype(np.float32), np.zeros(16, np.int32)
    for scale in (1e-3, 1e-1):
        got = (expected + scale * rng.normal(size=expected.shape)).astype(np.float32)
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected.astype(np.float64), got.astype(np.float64)))
        nll, change, kl, error, _ = codec_quality._compare(expected, got, targets)
        assert float(kl) == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=0.01)
        assert float(nll) == pytest.approx(-p[:, 0].mean(), rel=1e-5) and float(change) == pytest.approx((p - q)[:, 0].mean(), rel=0.01)
        assert float(error) == pytest.approx(np.abs(expected - got).max())


def test_windows_score_every_token_behind_the_first_prefix_once():
    rows = windows(np.arange(100), 30, 20)
    assert [row[31:].tolist() for row in rows] == [list(range(31, 51)), list(range(51, 71)), list(range(71, 91))]
    with pytest.raises(InvalidInput, match="at least 71"):
        windows(np.arange(70), 30, 20)


def test_the_interval_is_students():
    """Four differences of mean 2.5 and deviation 1.291; t(0.975, 3) = 3.182."""
    mean, spread = paired_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and spread == pytest.approx(3.182 * 1.291 / 2, rel=1e-3)


def test_ratios_are_those_of_the_wire_and_zstd_counts_what_would_travel():
    config, params = toy("kimi_linear_toy")
    spec, codec = cache_spec(config), CacheCodec(paged="int8", state="bf16")
    _, added = run(config, params, ids(config, 24)[None], SINGLE)
    measured = codec_rates.device_codec(codec, spec, added)
    assert measured.rate.ratio == pytest.approx(spec.bytes(24) / codec.wire_spec(spec).bytes(24))
    assert measured.ratio_bf16 == pytest.approx(measured.rate.ratio / 2) and measured.rate.lossy
    zstd = codec_rates.host_zstd("zstd", added)
    assert zstd.rate.ratio >= 1 and not zstd.rate.lossy
    zeros = codec_rates.host_zstd("zstd", jax.tree.map(jnp.zeros_like, added))
    assert zeros.rate.ratio > 10
    assert dataclasses.replace(zeros.rate, ratio=1.0).break_even_bytes_per_s(overlapped=True) == 0

"""KV sizes against figures worked out elsewhere, by hand, from the published shapes."""

import dataclasses

import pytest

from configs.models import load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.sizes import MIB, check_lengths, dense_spec, is_dense, kv_sizes, size_rows, size_table
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.layer_config import AttentionConfig

LENGTHS = (1024, 8192, 32_768, 131_072)

# Model: fixed MiB, bytes per token, S(l) in MiB at LENGTHS, rounded as they were noted. bfloat16, states in float32.
GOLDEN = {
    "kimi_linear_48b": (41.406, 8064, (49.3, 104.4, 293.4, 1049.4)),
    "mimo_v2_flash": (24.375, 23_040, (46.9, 204.4, 744.4, 2904.4)),
    "qwen3_5_397b": (183.164, 30_720, (213.2, 423.2, 1143.2, 4023.2)),
    "ring_2_5_1t": (280.0, 11_520, (291.2, 370.0, 640.0, 1720.0)),
    "minimax_m2_5": (0.0, 253_952, (248.0, 1984.0, 7936.0, 31_744.0)),
    "qwen3_235b": (0.0, 192_512, (188.0, 1504.0, 6016.0, 24_064.0)),
    "qwen3_next_80b": (73.688, 24_576, (97.7, 265.7, 841.7, 3145.7)),
    "qwen3_5_0_8b": (18.633, 12_288, (30.6, 114.6, 402.6, 1554.6)),
    "qwen3_0_6b": (0.0, 114_688, (112.0, 896.0, 3584.0, 14_336.0)),
    "llama_3_1_8b": (0.0, 131_072, (128.0, 1024.0, 4096.0, 16_384.0)),
    "gemma3_270m": (7.5, 3072, (10.5, 31.5, 103.5, 391.5)),  # noted for windows of 512; a cache holds 511
    "smollm2_135m": (0.0, 23_040, (22.5, 180.0, 720.0, 2880.0)),
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_sizes_are_the_published_ones(name):
    fixed, per_token, sizes = GOLDEN[name]
    spec = cache_spec(load_model_config(name))
    assert spec.bytes_per_token == per_token
    assert spec.fixed_bytes / MIB == pytest.approx(fixed, rel=0.003)
    assert [spec.bytes(n) / MIB for n in LENGTHS] == pytest.approx(sizes, rel=0.003)


def test_the_papers_model_has_the_papers_sizes():
    """Table 5 of arXiv 2604.15039, whose 32K and 128K are round decimal numbers."""
    spec = cache_spec(load_model_config("paper_1t"))
    assert (spec.fixed_bytes, spec.bytes_per_token) == (182_353_920, 17_280)
    sizes = [spec.bytes(n) / MIB for n in (1024, 8192, 32_000, 130_000)]
    assert sizes == pytest.approx([190.8, 308.9, 701.3, 2316.3], abs=0.07)


def test_a_short_request_fills_no_window():
    spec = cache_spec(load_model_config("gemma3_270m"))
    per_layer = 2 * 256 * 2  # keys and values of one head of 256 in bfloat16
    assert spec.bytes(1) == 18 * per_layer
    assert spec.bytes(511) == 511 * 18 * per_layer
    assert spec.bytes(512) == (511 * 15 + 512 * 3) * per_layer == spec.fixed_bytes + 512 * spec.bytes_per_token


def test_a_state_is_there_from_the_first_token():
    spec = cache_spec(load_model_config("ring_2_5_1t"))
    assert spec.bytes(1) == spec.fixed_bytes + spec.bytes_per_token


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("qwen3_235b", True),
        ("qwen3_moe_toy", True),  # experts cache nothing
        ("deepseek_toy", False),  # a latent is no keys and values
        ("gemma3_270m", False),
        ("kimi_linear_toy", False),
        ("lightning_toy", False),
    ],
)
def test_who_is_dense(name, dense):
    assert is_dense(load_model_config(name)) == dense


def test_dense_counterpart():
    assert dense_spec(load_model_config("minimax_m2_5")) == cache_spec(load_model_config("minimax_m2_5"))
    kimi = dense_spec(load_model_config("kimi_linear_48b"))
    assert (kimi.fixed_bytes, kimi.bytes_per_token) == (0, 27 * 2 * 8 * 128 * 2)  # every layer, keys and values, bfloat16
    gemma = dense_spec(load_model_config("gemma3_270m"))
    assert gemma.bytes_per_token == 18 * 2 * 640 * 2  # narrower than 8 x 128
    toy = dense_spec(load_model_config("kimi_linear_toy"))
    assert toy.bytes_per_token == 8 * 2 * 64 * 4  # its own dtype, float32


def test_dense_counterpart_is_what_a_dense_model_of_that_shape_caches():
    model = load_model_config("qwen3_next_80b")
    twin = [dataclasses.replace(layer, mixer=AttentionConfig(16, 8, 128)) for layer in model.layers]
    assert cache_spec(dataclasses.replace(model, layers=tuple(twin))) == dense_spec(model)


def test_rows_and_table_agree():
    sizes = kv_sizes({name: load_model_config(name) for name in ("paper_1t", "qwen3_0_6b")})
    rows = size_rows(sizes, [1024, 32_000])
    assert [(row["model"], row["tokens"]) for row in rows] == [(m, n) for m in ("paper_1t", "qwen3_0_6b") for n in (1024, 32_000)]
    assert rows[1] == {
        "model": "paper_1t",
        "tokens": 32_000,
        "bytes": 735_313_920,
        "mib": 701.25,
        "dense_bytes": 32_000 * 57 * 4096,
        "ratio": 32_000 * 57 * 4096 / 735_313_920,
    }
    assert {row["ratio"] for row in rows[2:]} == {1.0}
    head, *lines = size_table(sizes, [1024, 32_000]).splitlines()
    assert len({len(line) for line in [head, *lines]}) == 1  # aligned
    assert lines[0].split() == ["paper_1t", "182,353,920", "17,280", "233,472", "190.78", "(1.2x)", "701.25", "(10.2x)"]
    assert lines[1].split() == ["qwen3_0_6b", "0", "114,688", "114,688", "112.00", "(1.0x)", "3,500.00", "(1.0x)"]


@pytest.mark.parametrize("lengths", [[], [0], [1024, -1], [8, 8]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(InvalidInput, match="lengths="):
        check_lengths(lengths)

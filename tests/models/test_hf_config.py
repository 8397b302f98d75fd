"""config.json of every architecture -> layers: what the published spellings mean, and what is refused by name."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.hf_config import ARCHITECTURES, read_hf_config, read_hf_eos_ids, read_json
from prfaas_jax.models.layer_config import (
    AttentionConfig,
    DenseConfig,
    GatedDeltaConfig,
    KdaConfig,
    LatentConfig,
    Layer,
    LightningConfig,
    MoeConfig,
    Rope,
    RopeScaling,
)

HF = Path(__file__).parents[1] / "goldens" / "hf"
FULL, LINEAR, SLIDING = "full_attention", "linear_attention", "sliding_attention"


def read(to: Path, fixture: str, *removed: str, **fields: Any) -> ModelConfig:
    """The config of a fixture whose config.json has other values, and lacks some."""
    config = {k: v for k, v in read_json(HF / fixture / "config.json").items() if k not in removed} | fields
    to.mkdir(exist_ok=True)
    (to / "config.json").write_text(json.dumps(config))
    return dataclasses.replace(read_hf_config(to), name=fixture)


def sigmoid_moe(experts: int, top_k: int, width: int, **fields: Any) -> MoeConfig:
    return MoeConfig(experts, top_k, width, scoring="sigmoid", correction_bias=True, **fields)


def kimi() -> dict[str, Any]:
    kda, mla, dense = KdaConfig(4, 16, 16, 16, 4), LatentConfig(4, 24, 16, 8, 12), DenseConfig(40)
    moe = sigmoid_moe(6, 2, 16, scale=2.446, shared_size=16)
    mixers = (kda, kda, mla, kda, mla, mla)
    return {"layers": tuple(Layer(mixer, moe if i else dense) for i, mixer in enumerate(mixers)), "rms_norm_eps": 1e-3}


def deepseek() -> dict[str, Any]:
    mla = LatentConfig(4, 24, 16, 8, 12, q_lora_rank=20, rope=Rope(1e4))
    moe = sigmoid_moe(8, 3, 20, num_groups=4, top_groups=2, scale=2.5, shared_size=40)
    return {"layers": (Layer(mla, DenseConfig(40)), *[Layer(mla, moe)] * 3), "rms_norm_eps": 1e-3}


def gated_delta(first: DenseConfig, other: DenseConfig | MoeConfig, kinds: str) -> tuple[Layer, ...]:
    full = AttentionConfig(4, 2, 24, rope=Rope(1e4, dims=6), qk_norm="head", output_gate=True)
    mixers = {"L": GatedDeltaConfig(2, 4, 12, 16, 4), "F": full}
    return tuple(Layer(mixers[kind], other if i else first) for i, kind in enumerate(kinds))


def qwen3_next() -> dict[str, Any]:
    layers = gated_delta(DenseConfig(40), MoeConfig(6, 2, 16, shared_size=12, shared_gate=True), "LLFLF")
    return {"layers": layers, "norm_offset": True, "rms_norm_eps": 1e-3}


def qwen3_5() -> dict[str, Any]:
    layers = gated_delta(DenseConfig(40), DenseConfig(40), "LFLFL")
    return {"layers": layers, "norm_offset": True, "rms_norm_eps": 1e-3, "tie_embeddings": True}


def qwen3_moe() -> dict[str, Any]:
    mixer, moe = AttentionConfig(4, 2, 24, rope=Rope(1e6), qk_norm="head"), MoeConfig(8, 3, 24, renormalize=False)
    return {"layers": (Layer(mixer, DenseConfig(40)), Layer(mixer, moe), Layer(mixer, moe)), "rms_norm_eps": 1e-6}


def gemma3() -> dict[str, Any]:
    full = AttentionConfig(4, 2, 16, rope=Rope(1e6, scaling=RopeScaling("linear", 8.0)), qk_norm="head", scale=20**-0.5)
    near = dataclasses.replace(full, rope=Rope(1e4), window=13)
    mlp = DenseConfig(40, "gelu_tanh")
    layers = tuple(Layer(mixer, mlp) for mixer in (near, near, full, near, near, full, near))
    flags = {"norm_offset": True, "post_norms": True, "tie_embeddings": True, "embed_scale": 32**0.5}
    return {"layers": layers, "rms_norm_eps": 1e-6, **flags}


def mimo() -> dict[str, Any]:
    full = AttentionConfig(8, 2, 24, 16, rope=Rope(5e6, dims=8), value_scale=0.707)
    near = dataclasses.replace(full, num_kv_heads=4, rope=Rope(1e4, dims=8), window=13, sinks=True)
    moe, mixers = sigmoid_moe(4, 2, 12), (full, near) * 3
    return {"layers": tuple(Layer(mixer, moe if i else DenseConfig(40)) for i, mixer in enumerate(mixers)), "rms_norm_eps": 1e-5}


def minimax() -> dict[str, Any]:
    moe = MoeConfig(4, 2, 24)
    linear = Layer(LightningConfig(4, 12), moe, (1.3, 1.1), (0.8, 1.2))
    full = Layer(AttentionConfig(4, 2, 12, rope=Rope(1e4)), moe, (1.7, 0.9), (0.8, 1.2))
    return {"layers": (linear, full, linear, full, linear), "normalized_residual": True, "rms_norm_eps": 1e-3}


EXPECTED = {
    "kimi_linear": kimi(),
    "deepseek_v3": deepseek(),
    "qwen3_next": qwen3_next(),
    "qwen3_5": qwen3_5(),
    "qwen3_moe": qwen3_moe(),
    "gemma3": gemma3(),
    "mimo_v2_flash": mimo(),
    "minimax": minimax(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_of_every_architecture(name: str) -> None:
    assert read_hf_config(HF / name) == ModelConfig(name=name, vocab_size=128, hidden_size=32, max_position=512, **EXPECTED[name])


def test_there_is_a_fixture_of_every_architecture() -> None:
    have = {read_json(path)["architectures"][0] for path in HF.glob("*/config.json")}
    assert have | {"Qwen3_5ForConditionalGeneration"} == set(ARCHITECTURES)


KIMI_PATTERN = {"full_attn_layers": [3, 5, 6], "kda_layers": [1, 2, 4], "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4}
MIMO_WINDOWS = {
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 24,
    "swa_v_head_dim": 16,
    "swa_rope_theta": 10_000,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
}


@pytest.mark.parametrize(
    ("fixture", "removed", "fields"),
    [
        (
            "kimi_linear",
            ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"),
            {"linear_attn_config": KIMI_PATTERN, "first_k_dense_replace": 1, "moe_layer_freq": 1, "head_dim": 72, "mla_use_nope": True}
            | {"moe_router_activation_func": "sigmoid", "num_nextn_predict_layers": 0, "rope_theta": 10_000.0, "rope_scaling": None},
        ),
        (
            "deepseek_v3",
            ("rope_parameters",),
            {"rope_theta": 10_000, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        ),
        ("qwen3_5", ("rope_parameters",), {"rope_theta": 1e4}),
        (
            "qwen3_5",
            (),
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.25,
                    "mrope_interleaved": True,
                    "mrope_section": [1, 1, 1],
                },
                "attn_output_gate": True,
            },
        ),
        ("qwen3_moe", ("num_local_experts", "rope_parameters", "norm_topk_prob"), {"num_experts": 8, "rope_theta": 1e6}),
        (
            "gemma3",
            ("rope_parameters", "tie_word_embeddings", "hidden_activation", "layer_types"),
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 3,
            },
        ),
        (
            "mimo_v2_flash",
            ("layer_types", "mlp_layer_types", "rope_parameters", "rms_norm_eps", "sliding_window", "routed_scaling_factor"),
            {
                "hybrid_layer_pattern": [0, 1, 0, 1, 0, 1],
                "moe_layer_freq": [0, 1, 1, 1, 1, 1],
                "rope_theta": 5_000_000,
                "partial_rotary_factor": 0.334,
                "layernorm_epsilon": 1e-5,
                "sliding_window_size": 13,
                "sliding_window": 13,
                "routed_scaling_factor": None,
                "n_shared_experts": None,
                **MIMO_WINDOWS,
            },
        ),
    ],
)
def test_published_spellings_mean_the_same(tmp_path: Path, fixture: str, removed: tuple[str, ...], fields: dict[str, Any]) -> None:
    assert read(tmp_path / "m", fixture, *removed, **fields) == read_hf_config(HF / fixture)


def test_partial_rotation_is_rounded_down_as_there(tmp_path: Path) -> None:
    """0.334 of the published 192 elements are 64."""
    config = read(tmp_path / "m", "mimo_v2_flash", head_dim=192)
    assert {layer.mixer.rope.dims for layer in config.layers if isinstance(layer.mixer, AttentionConfig) and layer.mixer.rope} == {64}


def test_full_attention_at_the_end_of_every_interval(tmp_path: Path) -> None:
    config = read(tmp_path / "m", "qwen3_next", "layer_types", full_attention_interval=2, decoder_sparse_step=2, mlp_only_layers=[])
    assert [layer.mixer.kind for layer in config.layers] == ["gated_delta", "attention"] * 2 + ["gated_delta"]
    assert [layer.mlp.kind for layer in config.layers] == ["dense", "moe"] * 2 + ["dense"]


def test_config_of_transformers_4_equals_that_of_5(tmp_path: Path) -> None:
    def rope(config: ModelConfig) -> Rope | None:
        mixer = config.layers[0].mixer
        assert isinstance(mixer, AttentionConfig)
        return mixer.rope

    assert rope(read_hf_config(HF / "llama_rope_scaled")) == Rope(500.0, scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    old = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
    fields = {"rope_theta": 500, "rope_scaling": old, "torch_dtype": "float32"}
    config = read(tmp_path / "old", "llama_rope_scaled", "rope_parameters", "dtype", **fields)
    assert config.fingerprint() == read_hf_config(HF / "llama_rope_scaled").fingerprint()
    linear = read(tmp_path / "linear", "qwen3", "rope_parameters", rope_theta=1e4, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert rope(linear) == Rope(1e4, scaling=RopeScaling("linear", 4.0))


def test_derived_fields(tmp_path: Path) -> None:
    config = read(tmp_path / "d", "llama_tied", "head_dim", "num_key_value_heads", "dtype")
    assert config.dtype == "float32"
    assert config.layers[0].mixer == AttentionConfig(8, 8, 8)


def test_short_form_of_dense_models() -> None:
    """Llama and Qwen3 directories are the very models that configs describe in the short form."""
    fields = {"vocab_size": 256, "hidden_size": 64, "max_position": 512, "rms_norm_eps": 1e-6, "num_layers": 2, "num_heads": 4}
    dense = ModelConfig.dense(name="q", num_kv_heads=2, head_dim=24, intermediate_size=96, rope_theta=1e6, qk_norm=True, **fields)
    assert dense.fingerprint() == read_hf_config(HF / "qwen3").fingerprint()


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("fixture", "fields", "named"),
    [
        ("llama_tied", {"architectures": ["MixtralForCausalLM"]}, r"architectures=\['MixtralForCausalLM'\].*LlamaForCausalLM.*KimiLinear"),
        ("llama_tied", {"architectures": None}, "architectures=None"),
        ("llama_tied", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama_tied", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama_tied", {"attention_bias": True}, "attention_bias=True"),
        ("llama_tied", {"sliding_window": 128}, "sliding_window=128"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": [FULL, SLIDING]}, "layer_types"),
        ("qwen3", {"head_dim": None}, "head_dim=None"),
        ("qwen3", {"rope_parameters": {**YARN}}, "rope_parameters.rope_type='yarn'"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "rope_parameters.factor=None"),
        ("qwen3", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama_tied", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama_tied", {"dtype": "float16"}, "dtype='float16'"),
        ("llama_tied", {"vocab_size": None}, "vocab_size=None"),
        ("llama_tied", {"num_key_value_heads": 3}, "num_kv_heads=3"),
        ("kimi_linear", {"layer_types": None}, "linear_attn_config"),
        ("kimi_linear", {"layer_types": None, "linear_attn_config": {**KIMI_PATTERN, "kda_layers": [0, 1, 3]}}, "linear_attn_config"),
        ("kimi_linear", {"layer_types": [FULL] * 5}, "a list of 6 entries"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope=False"),
        ("kimi_linear", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func='softmax'"),
        ("kimi_linear", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("kimi_linear", {"num_expert_group": None}, "n_group or num_expert_group"),
        ("deepseek_v3", {"rope_parameters": YARN}, "rope_type='yarn'"),
        ("deepseek_v3", {"rope_parameters": {"rope_theta": 1e4, "mscale_all_dim": 1.0}}, "rope_parameters.mscale_all_dim=1.0"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"n_group": 3}, "num_groups=3"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_next", {"layer_types": [SLIDING] * 5}, r"layer_types=\['sliding_attention'\]"),
        ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate=False"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.full_attention=None"),
        ("mimo_v2_flash", {"swa_num_key_value_heads": 2}, "swa_num_key_value_heads=2"),
        ("mimo_v2_flash", {"add_full_attention_sink_bias": True}, "add_full_attention_sink_bias=True"),
        ("mimo_v2_flash", {"layer_types": None}, "hybrid_layer_pattern"),
        ("mimo_v2_flash", {"head_dim": 21}, "rope.dims=7"),
        ("minimax", {"rotary_dim": 6}, "rotary_dim=6"),
        ("minimax", {"layer_types": None}, "layer_types=None"),
        ("minimax", {"full_attn_alpha_factor": None}, "full_attn_alpha_factor=None"),
        ("minimax", {"num_local_experts": 2.5}, "num_local_experts.*=2.5"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, fixture: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        read(tmp_path / "m", fixture, **fields)


def test_generation_config_decides_what_ends_a_text(tmp_path: Path) -> None:
    read(tmp_path / "m", "llama_tied", eos_token_id=7)
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_hf_eos_ids(tmp_path / "m") == (5, 6)
    (tmp_path / "m" / "generation_config.json").unlink()
    assert read_hf_eos_ids(tmp_path / "m") == (7,)


def test_a_shape_is_read_without_jax() -> None:
    script = (
        "import sys; from prfaas_jax.models.source import read_config; "
        f"read_config({str(HF / 'kimi_linear')!r}); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

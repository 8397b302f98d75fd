"""Hugging Face directories: both spellings of config.json, shards, and refusals by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import RopeScaling
from prfaas_jax.models.hf import read_hf
from prfaas_jax.models.hf_config import read_hf_config, read_hf_eos_ids

HF = Path(__file__).parents[1] / "goldens" / "hf"


def edited(fixture: str, to: Path, **fields: Any) -> Path:
    """A copy of a fixture whose config.json has other values; None removes the field."""
    shutil.copytree(HF / fixture, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return to


def test_config_of_transformers_4_equals_that_of_5(tmp_path: Path) -> None:
    rope = read_hf_config(HF / "llama_rope_scaled").rope_scaling
    assert rope == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    old = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
    path = edited(
        "llama_rope_scaled", tmp_path / "old", rope_parameters=None, rope_theta=500, rope_scaling=old, torch_dtype="float32", dtype=None
    )
    assert read_hf_config(path).fingerprint() == read_hf_config(HF / "llama_rope_scaled").fingerprint()
    linear = edited("qwen3", tmp_path / "linear", rope_parameters=None, rope_theta=1e4, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert read_hf_config(linear).rope_scaling == RopeScaling("linear", 4.0)


def test_derived_fields(tmp_path: Path) -> None:
    config = read_hf_config(edited("llama_tied", tmp_path / "d", head_dim=None, num_key_value_heads=None, dtype=None))
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (8, 8, "float32")
    assert read_hf_config(HF / "qwen3").qk_norm and not config.qk_norm


@pytest.mark.parametrize(
    ("fixture", "fields", "named"),
    [
        ("llama_tied", {"architectures": ["MixtralForCausalLM"]}, r"architectures=\['MixtralForCausalLM'\].*LlamaForCausalLM"),
        ("llama_tied", {"architectures": None}, "architectures=None"),
        ("llama_tied", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama_tied", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama_tied", {"attention_bias": True}, "attention_bias=True"),
        ("llama_tied", {"sliding_window": 128}, "sliding_window=128"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"head_dim": None}, "head_dim=None"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type='yarn'"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "rope_parameters.factor=None"),
        ("qwen3", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama_tied", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama_tied", {"dtype": "float16"}, "dtype='float16'"),
        ("llama_tied", {"vocab_size": None}, "vocab_size=None"),
        ("llama_tied", {"num_key_value_heads": 3}, "num_kv_heads=3"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, fixture: str, fields: dict, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        read_hf_config(edited(fixture, tmp_path / "m", **fields))


def test_float16_is_read_when_the_caller_names_a_dtype(tmp_path: Path) -> None:
    path = edited("llama_tied", tmp_path / "half", dtype="float16")
    halves = {n: t.astype(np.float16) for n, t in load_file(path / "model.safetensors").items()}
    save_file(halves, path / "model.safetensors")
    arrays = read_hf(path, "float32")[1]
    np.testing.assert_array_equal(arrays["embed"], halves["model.embed_tokens.weight"].astype(np.float32))


def test_shards_equal_one_file(tmp_path: Path) -> None:
    path = edited("qwen3", tmp_path / "sharded")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    arrays, wanted = read_hf(path)[1], read_hf(HF / "qwen3")[1]
    assert set(arrays) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(arrays[name], wanted[name])
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidInput, match="model-00002-of-00002"):
        read_hf(path)


def test_bfloat16_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = edited("llama_tied", tmp_path / "bf16", dtype="bfloat16")
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors")
    config, arrays = read_hf(path)
    assert config.dtype == "bfloat16"
    np.testing.assert_array_equal(arrays["embed"].view(np.uint16), tensors["model.embed_tokens.weight"].view(np.uint16))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "m" / "model.safetensors"
    edited("llama_tied", tmp_path / "m")
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"

    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(InvalidInput, match=rf"no {name}.*\(32, 64\)"):
        read_hf(file.parent)
    save_file(tensors | {name: tensors[name][:16].copy()}, file)
    with pytest.raises(InvalidInput, match=rf"{name} shape=\(16, 64\): expected \(32, 64\)"):
        read_hf(file.parent)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}, file)
    with pytest.raises(InvalidInput, match=r"q_proj\.bias"):
        read_hf(file.parent)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(InvalidInput, match=r"model\.safetensors"):
        read_hf(file.parent)
    file.unlink()
    with pytest.raises(InvalidInput, match=r"model\.safetensors\.index\.json"):
        read_hf(file.parent)


def test_a_tied_head_may_be_repeated_but_not_contradicted(tmp_path: Path) -> None:
    file = edited("llama_tied", tmp_path / "m") / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}, file)
    assert "lm_head" not in read_hf(file.parent)[1]
    head[3, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, file)
    with pytest.raises(InvalidInput, match="lm_head"):
        read_hf(file.parent)


def test_generation_config_decides_what_ends_a_text(tmp_path: Path) -> None:
    path = edited("llama_tied", tmp_path / "m", eos_token_id=7)
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_hf_eos_ids(path) == (5, 6)
    (path / "generation_config.json").unlink()
    assert read_hf_eos_ids(path) == (7,)


def test_a_shape_is_read_without_jax() -> None:
    script = (
        f"import sys; from prfaas_jax.models.source import read_config; read_config({str(HF / 'qwen3')!r}); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

"""Weights of Hugging Face directories: shards, dtypes, spellings, what is left out, and refusals by name before anything is read."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models import hf
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.hf import read_hf
from prfaas_jax.models.hf_names import half_rotation
from prfaas_jax.models.params import abstract, flat_names
from prfaas_jax.models.stacking import Part, Source, layer_place, stack

HF = Path(__file__).parents[1] / "goldens" / "hf"
NAMES = sorted(path.parent.name for path in HF.glob("*/config.json"))
Tensors = dict[str, np.ndarray]


def edited(fixture: str, to: Path, change: Callable[[Tensors], Tensors] | None = None, **fields: Any) -> Path:
    """A copy of a fixture with other fields in its config.json (None removes one) and other tensors."""
    shutil.copytree(HF / fixture, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if change:
        save_file(change(load_file(to / "model.safetensors")), to / "model.safetensors")
    return to


def assert_same(arrays: Tensors, wanted: Tensors) -> None:
    assert set(arrays) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_read_once_into_every_parameter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read = hf._Tensors.read

    def counted(self: hf._Tensors, tensor: str) -> np.ndarray:
        reads[tensor] += 1
        return read(self, tensor)

    monkeypatch.setattr(hf._Tensors, "read", counted)
    config, arrays = read_hf(HF / name)
    tensors = load_file(HF / name / "model.safetensors")
    held = {n: t for n, t in tensors.items() if not n.endswith(("_decay", "slope_rate"))}
    assert reads == dict.fromkeys(held, 1)
    leaves = flat_names(abstract(config)[1])
    assert {n: (a.shape, a.dtype.name) for n, a in arrays.items()} == {n: (p.shape, p.dtype.name) for n, p in leaves.items()}
    # Nothing is lost, doubled or left unset: the same values, wherever they went.
    ours, theirs = (np.sort(np.concatenate([t.ravel() for t in group.values()])) for group in (arrays, held))
    np.testing.assert_array_equal(ours, theirs)
    assert config.num_params() == ours.size


def test_layers_go_to_head_body_and_tail() -> None:
    """kimi_linear: one dense layer, twice (KDA, MLA), one more MLA."""
    config, arrays = read_hf(HF / "kimi_linear")
    assert [layer_place(config, i) for i in range(6)] == [
        ("head/0", ()), ("body/0", (0,)), ("body/1", (0,)), ("body/0", (1,)), ("body/1", (1,)), ("tail/0", ()),
    ]  # fmt: skip
    tensors = load_file(HF / "kimi_linear" / "model.safetensors")
    np.testing.assert_array_equal(arrays["head/0/mixer/b_proj/weight"], tensors["model.layers.0.self_attn.b_proj.weight"])
    np.testing.assert_array_equal(arrays["body/0/mixer/b_proj/weight"][1], tensors["model.layers.3.self_attn.b_proj.weight"])
    np.testing.assert_array_equal(
        arrays["body/1/mlp/experts/up_proj"][0, 4], tensors["model.layers.2.block_sparse_moe.experts.4.w3.weight"].T
    )
    # Per head 16 rows of keys, then 12 of values.
    kv_b = tensors["model.layers.5.self_attn.kv_b_proj.weight"]
    np.testing.assert_array_equal(arrays["tail/0/mixer/k_up"][2], kv_b[2 * 28 : 2 * 28 + 16])
    np.testing.assert_array_equal(arrays["tail/0/mixer/v_up"][2], kv_b[2 * 28 + 16 : 3 * 28])


def test_interleaved_pairs_become_halves() -> None:
    rows = np.arange(2 * 6.0)[:, None]
    assert half_rotation(rows, groups=2, rope_dim=4)[:, 0].tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]


def test_float16_is_read_when_the_caller_names_a_dtype(tmp_path: Path) -> None:
    path = edited("llama_tied", tmp_path, lambda t: {n: x.astype(np.float16) for n, x in t.items()}, dtype="float16")
    halves = load_file(path / "model.safetensors")
    np.testing.assert_array_equal(read_hf(path, "float32")[1]["embed"], halves["model.embed_tokens.weight"].astype(np.float32))


def test_bfloat16_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = edited("llama_tied", tmp_path, lambda t: {n: x.astype(ml_dtypes.bfloat16) for n, x in t.items()}, dtype="bfloat16")
    config, arrays = read_hf(path)
    assert config.dtype == "bfloat16"
    wanted = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(arrays["embed"].view(np.uint16), wanted.view(np.uint16))


def test_decay_rates_and_router_biases_keep_float32() -> None:
    arrays, exact = (read_hf(HF / "kimi_linear", dtype)[1] for dtype in ("bfloat16", "float32"))
    wide = {name for name, array in arrays.items() if array.dtype == np.float32}
    assert {name.rsplit("/", 1)[1] for name in wide} == {"a_log", "dt_bias", "correction_bias"}
    for name in wide:
        np.testing.assert_array_equal(arrays[name], exact[name], err_msg=name)


def test_shards_equal_one_file(tmp_path: Path) -> None:
    path = edited("qwen3", tmp_path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_hf(path)[1], read_hf(HF / "qwen3")[1])
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidInput, match="model-00002-of-00002"):
        read_hf(path)


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        for old, new in pairs:
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        return tensors

    return change


def with_flat_decay(tensors: Tensors) -> Tensors:
    return {name: tensor.reshape(-1) if name.endswith("A_log") else tensor for name, tensor in tensors.items()}


def with_extra(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: np.ones(3, np.float32) for name in names}


def without_buffers(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(("_decay", "slope_rate"))}


@pytest.mark.parametrize(
    ("fixture", "change", "fields"),
    [
        # The published Kimi Linear has its dense layer under mlp.
        ("kimi_linear", renamed(*((f".block_sparse_moe.{n}_proj", f".mlp.{n}_proj") for n in ("gate", "up", "down"))), {}),
        ("kimi_linear", renamed((".block_sparse_moe.", ".mlp.")), {}),
        ("kimi_linear", with_flat_decay, {}),
        ("minimax", without_buffers, {}),
        ("qwen3_next", with_extra("mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"), {}),
        ("mimo_v2_flash", with_extra("model.mtp.layers.0.eh_proj.weight"), {}),
        ("deepseek_v3", with_extra("model.layers.4.eh_proj.weight", "model.layers.4.mlp.gate.weight"), {"num_nextn_predict_layers": 1}),
        ("llama_tied", with_extra("model.layers.0.self_attn.rotary_emb.inv_freq"), {}),
    ],
)
def test_other_spellings_and_other_models_beside(tmp_path: Path, fixture: str, change: Any, fields: dict[str, Any]) -> None:
    assert_same(read_hf(edited(fixture, tmp_path, change, **fields))[1], read_hf(HF / fixture)[1])


def test_the_text_model_inside_a_multimodal_one(tmp_path: Path) -> None:
    text = json.loads((HF / "qwen3_5" / "config.json").read_text())
    tied = text.pop("tie_word_embeddings")
    inner = renamed(("model.", "model.language_model."))
    edited("qwen3_5", tmp_path, lambda tensors: with_extra("model.visual.patch_embed.proj.weight", "mtp.norm.weight")(inner(tensors)))
    outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text, "tie_word_embeddings": tied, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    config, arrays = read_hf(tmp_path)
    wanted_config, wanted = read_hf(HF / "qwen3_5")
    assert config.fingerprint() == wanted_config.fingerprint()
    assert_same(arrays, wanted)


KIMI_EXPERT = "model.layers.4.block_sparse_moe.experts.5.w2.weight"


@pytest.mark.parametrize(
    ("fixture", "change", "named"),
    [
        ("kimi_linear", lambda t: {n: x for n, x in t.items() if n != KIMI_EXPERT}, rf"no {KIMI_EXPERT}.*\(32, 16\)"),
        ("kimi_linear", lambda t: t | {KIMI_EXPERT: t[KIMI_EXPERT].T.copy()}, rf"{KIMI_EXPERT} shape=\(16, 32\): expected \(32, 16\)"),
        ("kimi_linear", lambda t: t | {"model.layers.0.mlp.up_proj.weight": np.ones((40, 32), np.float32)}, "layers.0.mlp.up_proj.weight"),
        ("kimi_linear", lambda t: t | {"model.layers.0.self_attn.A_log": np.ones((4, 1), np.float32)}, r"\(1, 1, 4, 1\) or \(4,\)"),
        ("kimi_linear", with_extra("model.layers.6.input_layernorm.weight"), "model.layers.6"),
        ("deepseek_v3", with_extra("model.layers.4.eh_proj.weight"), "model.layers.4.eh_proj"),
        ("mimo_v2_flash", with_extra("model.layers.0.self_attn.attention_sink_bias"), "layers.0.self_attn.attention_sink_bias"),
        ("gemma3", with_extra("model.layers.0.self_attn.q_proj.bias"), r"q_proj\.bias"),
        ("qwen3_next", renamed(("shared_expert_gate", "shared_gate")), "shared_gate"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_any_is_read(
    tmp_path: Path, fixture: str, change: Any, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edited(fixture, tmp_path, change)
    monkeypatch.setattr(hf._Tensors, "read", None)
    with pytest.raises(InvalidInput, match=named):
        read_hf(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    file = edited("llama_tied", tmp_path) / "model.safetensors"
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(InvalidInput, match=r"model\.safetensors"):
        read_hf(file.parent)
    file.unlink()
    with pytest.raises(InvalidInput, match=r"model\.safetensors\.index\.json"):
        read_hf(file.parent)


@pytest.mark.parametrize("fixture", ["llama_tied", "gemma3"])
def test_a_tied_head_may_be_repeated_but_not_contradicted(tmp_path: Path, fixture: str) -> None:
    def repeated(tensors: Tensors, by: float = 0.0) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + np.float32(by)}

    assert "lm_head" not in read_hf(edited(fixture, tmp_path, repeated))[1]
    with pytest.raises(InvalidInput, match="lm_head"):
        read_hf(edited(fixture, tmp_path, lambda tensors: repeated(tensors, 1.0)))


def test_a_parameter_without_a_source_is_no_garbage() -> None:
    config = ModelConfig.dense(
        name="m", vocab_size=8, hidden_size=8, max_position=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8
    )
    with pytest.raises(InvalidInput, match=r"checkpoint parameters.*final_norm/weight"):
        stack(config, [Source(("e",), (Part("embed"),))], {"e": (8, 8)}, lambda _: np.zeros((8, 8)))

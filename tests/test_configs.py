import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from configs import models
from configs.models import available_models, load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.config import ModelConfig, RopeScaling

# name: (published parameters in millions, tied embeddings once; KV bytes per token and fixed bytes at the config's own dtype)
PUBLISHED = {
    "smollm2_135m": (134.5, 23_040, 0),
    "qwen3_0_6b": (596, 114_688, 0),
    "qwen3_8b": (8190, 147_456, 0),
    "llama_3_1_8b": (8030, 131_072, 0),
    "qwen3_235b": (235_000, 192_512, 0),
    "minimax_m2_5": (230_000, 253_952, 0),
    # The card says 48 B: the published shapes make 49.1 B, 48.4 B of them outside the embedding and the output head.
    "kimi_linear_48b": (49_100, 8064, 43_417_600),
    "mimo_v2_flash": (309_000, 23_040, 25_559_040),
    "qwen3_5_397b": (397_000, 30_720, 192_061_440),
    "ring_2_5_1t": (1_000_000, 11_520, 293_601_280),
    "paper_1t": (1_000_000, 17_280, 182_353_920),
    "qwen3_next_80b": (80_000, 24_576, 77_266_944),
    # Text part only; the published 0.8 B count the vision tower.
    "qwen3_5_0_8b": (752, 12_288, 19_537_920),
    "gemma3_270m": (268, 3072, 7_848_960),
    "qwen3_bench": (70, 24_576, 0),
    "hybrid_bench": (60, 1536, 2_525_184),
    "qwen3_toy": (0.230080, 2048, 0),
    "llama_toy": (0.262720, 2048, 0),
    "qwen3_moe_toy": (0.363200, 2048, 0),
    "deepseek_toy": (0.439800, 800, 0),
    "kimi_linear_toy": (0.640636, 480, 32_000),
    "gated_delta_toy": (0.496960, 512, 67_584),
    "qwen3_next_toy": (0.788288, 1024, 67_584),
    "mimo_toy": (0.788528, 1920, 122_880),
    "gemma3_toy": (0.626112, 1024, 158_720),
    "lightning_toy": (0.759616, 1024, 49_152),
}

# Parameters that the classes of transformers 5.23 have at these shapes, router biases (their buffers) included.
TRANSFORMERS = {
    "kimi_linear_48b": 49_122_681_728,
    "mimo_v2_flash": 308_778_780_864,
    "qwen3_5_397b": 396_346_350_336,
    "minimax_m2_5": 228_689_764_864,
    "qwen3_235b": 235_093_634_560,
    "qwen3_next_80b": 79_674_391_296,
    "qwen3_5_0_8b": 752_393_024,
    "gemma3_270m": 268_098_176,
}

# Layers that are compiled one by one: head + period + tail. Compile time follows this, not the depth.
COMPILED = {
    "kimi_linear_48b": (1, 4, 2),
    "mimo_v2_flash": (1, 6, 5),
    "qwen3_5_397b": (0, 4, 0),
    "ring_2_5_1t": (4, 8, 4),
    "minimax_m2_5": (0, 1, 0),
    "paper_1t": (0, 4, 1),
    "gemma3_270m": (0, 6, 0),
    "kimi_linear_toy": (1, 3, 1),
    "deepseek_toy": (1, 1, 0),
    "mimo_toy": (1, 3, 0),
}


def raw(name: str) -> dict:
    """The fields as the file has them, in the short or the block form; blocks share no objects."""
    return json.loads(importlib.import_module(f"configs.models.{name}").get_config().to_json())


def test_every_model_has_published_figures():
    assert set(available_models()) == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_figures_match_what_is_published(name):
    config = load_model_config(name)
    assert config.name == name
    millions, kv_bytes, fixed = PUBLISHED[name]
    assert config.num_params() == pytest.approx(millions * 1e6, rel=0.02)
    spec = cache_spec(config)
    assert (spec.bytes_per_token, spec.fixed_bytes) == (kv_bytes, fixed)
    assert spec.bytes(1000) == fixed + 1000 * kv_bytes  # 1000 tokens fill every window


def test_parameters_are_those_of_transformers_to_the_last_one():
    assert {name: load_model_config(name).num_params() for name in TRANSFORMERS} == TRANSFORMERS


@pytest.mark.parametrize("name", sorted(COMPILED))
def test_depth_folds(name):
    pattern = load_model_config(name).pattern
    assert (pattern.head, pattern.period, pattern.tail) == COMPILED[name]


def test_the_papers_model_is_57_layers_of_two_kinds():
    config = load_model_config("paper_1t")
    kinds = [layer.mixer.kind for layer in config.layers]
    assert (len(kinds), kinds.count("kda"), kinds.count("mla")) == (57, 42, 15)
    assert {axis: size for axis, size in config.axis_sizes() if size % 64} == {}  # all of it divides over a pod of 64


def test_states_of_the_hybrid_that_is_measured_matter():
    spec = cache_spec(load_model_config("hybrid_bench"))
    assert spec.fixed_bytes / spec.bytes(2048) >= 0.4


@pytest.mark.parametrize("name", sorted(n for n in PUBLISHED if n.endswith("_toy")))
def test_toys_divide_over_four_devices(name):
    """All but the kv heads that are meant to be replicated."""
    config = load_model_config(name)
    odd = {axis: size for axis, size in config.axis_sizes() if size % 4}
    assert odd == ({"kv_heads": 2} if name == "gated_delta_toy" else {})
    assert config.dtype == "float32" and config.vocab_size == 512 and config.hidden_size == 64 and config.max_position == 4096


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_config_survives_json(name):
    config = load_model_config(name)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.fingerprint() == config.fingerprint()


def test_docstrings_hold_the_true_figures():
    """A config's docstring names its KV bytes per token and its fixed bytes; a toy's also its exact parameters."""
    for name, (_, kv_bytes, fixed) in PUBLISHED.items():
        text = importlib.import_module(f"configs.models.{name}").__doc__
        assert f"{kv_bytes:,} KV bytes per token" in text
        assert (f"{fixed:,} fixed bytes" in text) if fixed else ("fixed bytes" not in text)
        if name.endswith("_toy"):
            assert f"{load_model_config(name).num_params():,} parameters" in text


def test_short_and_block_form_make_the_same_model():
    short = load_model_config("qwen3_toy")
    assert "blocks" not in raw("qwen3_toy") and short.num_layers == 4
    block = {
        "mixer": {"kind": "attention", "num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "rope": {"theta": 1e6}, "qk_norm": "head"},
        "mlp": {"kind": "dense", "intermediate_size": 128},
    }
    shared = ("name", "vocab_size", "hidden_size", "max_position", "rms_norm_eps", "tie_embeddings", "dtype")
    fields = {key: raw("qwen3_toy")[key] for key in shared}
    long = ModelConfig.from_dict({**fields, "blocks": {"any name": block}, "layers": ["any name"] * 4})
    assert long == short and long.fingerprint() == short.fingerprint()


def test_nested_rope_scaling_becomes_its_class():
    scalings = {layer.mixer.rope.scaling for layer in load_model_config("llama_3_1_8b").layers}
    assert scalings == {RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)}
    gemma = [layer.mixer.rope.scaling for layer in load_model_config("gemma3_toy").layers]
    assert gemma == ([None] * 5 + [RopeScaling("linear", 8.0)]) * 2


def test_scales_of_a_branch_stay_with_their_block():
    lightning, attention = load_model_config("lightning_toy").layers[2:4]
    assert (lightning.mixer_scales, lightning.mlp_scales) == ((1.75, 1.25), (1.5, 0.875))
    assert (attention.mixer_scales, attention.mlp_scales) == ((2.0, 0.75), (1.5, 0.875))


def test_path_and_name_are_the_same(tmp_path, monkeypatch):
    by_name = load_model_config("qwen3_toy")
    assert load_model_config("configs/models/qwen3_toy.py") == by_name
    monkeypatch.chdir(tmp_path)  # the packaged file is found from anywhere
    assert load_model_config("configs/models/qwen3_toy.py") == by_name


@pytest.mark.parametrize(
    ("base", "line"), [("qwen3_toy", "config.num_layers = 2"), ("kimi_linear_toy", "config.layers = config.layers[:2]")]
)
def test_a_file_of_ones_own(tmp_path, base, line):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from configs.models.{base} import get_config as base\ndef get_config():\n    config = base()\n    {line}\n    return config\n"
    )
    whole = load_model_config(base)
    assert load_model_config(str(path)) == dataclasses.replace(whole, layers=whole.layers[:2])
    path.write_text("x = 1\n")
    with pytest.raises(InvalidInput, match="get_config"):
        load_model_config(str(path))


@pytest.mark.parametrize("name", ["qwen3_toys", "", "__init__", "configs/models/none.py", "elsewhere/qwen3_toy.py", "../models/qwen3_toy"])
def test_unknown_model_lists_what_exists(name):
    with pytest.raises(InvalidInput, match="llama_toy, mimo_toy"):
        load_model_config(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "model.attention.num_kv_heads=3"),
        ({"head_dim": 15}, "model.attention.rope.dims=15"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"dtype": "int8"}, "model.dtype='int8'"),
        ({"experts": 8}, "experts"),
        ({"blocks": {}}, "blocks"),
        ({"rope_scaling": {"kind": "yarn", "factor": 4.0}}, "model.rope.scaling.kind='yarn'"),
        ({"rope_scaling": {"kind": "linear"}}, "model.rope_scaling={'kind': 'linear'}: expected also the fields ['factor']"),
        ({"rope_scaling": 8.0}, "model.rope_scaling=8.0"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(InvalidInput) as error:
        ModelConfig.from_dict(raw("qwen3_toy") | change)
    assert message in str(error.value)


DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("layers", ["kda", "gqa"], "model.layers=['gqa']: expected only the blocks ['kda', 'kda_dense', 'mla']"),
        ("layers", [], "model.layers=()"),
        ("blocks", DELETE, "also the fields ['blocks']"),
        ("blocks", ["kda"], "model.blocks=['kda']"),
        ("hidden_size", DELETE, "also the fields ['hidden_size']"),
        ("num_heads", 8, "model=['num_heads']: expected only the fields"),
        ("blocks.kda", "kda", "model.blocks.kda='kda'"),
        ("blocks.kda.mlp", DELETE, "expected also ['mlp']"),
        ("blocks.kda.norm", {}, "model.blocks.kda=['norm']"),
        ("blocks.kda.mlp_scales", [1.0], "model.blocks.kda.mlp_scales=(1.0,)"),
        ("blocks.kda.mixer", 3, "model.blocks.kda.mixer=3"),
        ("blocks.kda.mixer.kind", "mamba", "model.blocks.kda.mixer.kind='mamba': expected one of ['attention', 'gated_delta', 'kda',"),
        ("blocks.kda.mixer.kind", DELETE, "model.blocks.kda.mixer.kind=None"),
        ("blocks.kda.mixer.gate_rank", DELETE, "model.blocks.kda.mixer="),
        ("blocks.kda.mixer.head_dim", 16, "model.blocks.kda.mixer=['head_dim']"),
        ("blocks.kda.mixer.num_heads", 0, "model.kda.num_heads=0"),
        ("blocks.kda.mixer.conv_width", 1, "model.kda.conv_width=1"),
        ("blocks.mla.mixer.rope", 10_000.0, "model.blocks.mla.mixer.rope=10000.0"),
        ("blocks.mla.mixer.rope", {"base": 1e4}, "model.blocks.mla.mixer.rope=['base']"),
        ("blocks.mla.mixer.rope", {"dims": 10}, "model.mla.rope.dims=10"),
        ("blocks.mla.mixer.rope", {"scaling": {"factor": 2.0}}, "model.blocks.mla.mixer.rope.scaling="),
        ("blocks.mla.mlp.kind", "mla", "model.blocks.mla.mlp.kind='mla': expected one of ['dense', 'moe']"),
        ("blocks.mla.mlp.top_k", 9, "model.moe.top_k=9"),
        ("blocks.mla.mlp.num_groups", 3, "model.moe.num_groups=3"),
        ("blocks.mla.mlp.top_groups", 2, "model.moe.top_groups=2"),
        ("blocks.mla.mlp.scoring", "tanh", "model.moe.scoring='tanh'"),
        ("blocks.mla.mlp.shared_size", -1, "model.moe.shared_size=-1"),
    ],
)
def test_impossible_blocks_are_refused(path, value, message):
    fields = raw("kimi_linear_toy")
    *parents, last = path.split(".")
    at = fields
    for key in parents:
        at = at[key]
    if value is DELETE:
        del at[last]
    else:
        at[last] = value
    with pytest.raises(InvalidInput) as error:
        ModelConfig.from_dict(fields)
    assert message in str(error.value)


def test_groups_limit_what_a_token_can_reach():
    fields = raw("deepseek_toy")  # 4 groups of 2 experts, of which a token sees 2 groups
    fields["blocks"]["mla"]["mlp"]["top_k"] = 5
    with pytest.raises(InvalidInput, match=r"model\.moe\.top_k=5: expected at most 4"):
        ModelConfig.from_dict(fields)


def test_fingerprint_ignores_the_name_only():
    config = load_model_config("qwen3_toy")
    assert dataclasses.replace(config, name="other").fingerprint() == config.fingerprint()
    others = [ModelConfig.from_dict(raw("qwen3_toy") | {"rope_theta": 1e4}), dataclasses.replace(config, layers=config.layers[:3])]
    hybrid = load_model_config("kimi_linear_toy")
    others += [hybrid, dataclasses.replace(hybrid, layers=hybrid.layers[::-1])]
    assert len({config.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_every_file_stands_on_its_own():
    """A reader finds the whole model in one file: no config imports another."""
    for name in PUBLISHED:
        text = (Path(models.__file__).parent / f"{name}.py").read_text()
        assert "from configs" not in text and "import configs" not in text

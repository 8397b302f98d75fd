import dataclasses
import json
from pathlib import Path

import pytest

from configs import models
from configs.models import available_models, load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.config import ModelConfig, RopeScaling

# name: (published parameters in millions, tied embeddings once; KV bytes per token at the config's own dtype)
PUBLISHED = {
    "smollm2_135m": (134.5, 23_040),
    "qwen3_0_6b": (596, 114_688),
    "qwen3_8b": (8190, 147_456),
    "llama_3_1_8b": (8030, 131_072),
    "qwen3_bench": (70, 24_576),
    "qwen3_toy": (0.230080, 2048),
    "llama_toy": (0.262720, 2048),
}


def test_every_model_has_published_figures():
    assert set(available_models()) == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_figures_match_what_is_published(name):
    config = load_model_config(name)
    assert config.name == name
    millions, kv_bytes = PUBLISHED[name]
    assert config.num_params() == pytest.approx(millions * 1e6, rel=0.02)
    assert cache_spec(config).bytes_per_token == kv_bytes
    assert cache_spec(config).bytes(1000) == 1000 * kv_bytes


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_config_survives_json(name):
    config = load_model_config(name)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.fingerprint() == config.fingerprint()


def test_docstrings_hold_the_true_figures():
    """A config's docstring names its KV bytes per token; a toy's also its exact parameters."""
    for name, (_, kv_bytes) in PUBLISHED.items():
        text = (Path(models.__file__).parent / f"{name}.py").read_text()
        assert f"{kv_bytes:,} KV bytes per token" in text
        if name.endswith("_toy"):
            assert f"{load_model_config(name).num_params():,} parameters" in text


def test_nested_rope_scaling_becomes_its_class():
    assert load_model_config("llama_3_1_8b").rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_path_and_name_are_the_same(tmp_path, monkeypatch):
    by_name = load_model_config("qwen3_toy")
    assert load_model_config("configs/models/qwen3_toy.py") == by_name
    monkeypatch.chdir(tmp_path)  # the packaged file is found from anywhere
    assert load_model_config("configs/models/qwen3_toy.py") == by_name


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs.models.qwen3_toy import get_config as base\n"
        "def get_config():\n    config = base()\n    config.num_layers = 2\n    return config\n"
    )
    assert load_model_config(str(path)) == dataclasses.replace(load_model_config("qwen3_toy"), num_layers=2)
    path.write_text("x = 1\n")
    with pytest.raises(InvalidInput, match="get_config"):
        load_model_config(str(path))


@pytest.mark.parametrize("name", ["qwen3_toys", "", "__init__", "configs/models/none.py", "elsewhere/qwen3_toy.py", "../models/qwen3_toy"])
def test_unknown_model_lists_what_exists(name):
    with pytest.raises(InvalidInput, match="llama_toy, qwen3_0_6b"):
        load_model_config(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "model.num_kv_heads=3"),
        ({"head_dim": 15}, "model.head_dim=15"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"dtype": "int8"}, "model.dtype='int8'"),
        ({"experts": 8}, "experts"),
    ],
)
def test_impossible_models_are_refused(change, message):
    fields = load_model_config("qwen3_toy").to_dict() | change
    with pytest.raises(InvalidInput) as error:
        ModelConfig.from_dict(fields)
    assert message in str(error.value)


def test_fingerprint_ignores_the_name_only():
    config = load_model_config("qwen3_toy")
    assert dataclasses.replace(config, name="other").fingerprint() == config.fingerprint()
    assert dataclasses.replace(config, rope_theta=1e4).fingerprint() != config.fingerprint()

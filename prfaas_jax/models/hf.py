"""Weights of a Hugging Face directory (hf_config.ARCHITECTURES), through the `safetensors` package."""

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, which safetensors then returns
import numpy as np
from safetensors import SafetensorError, safe_open

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.hf_config import read_hf_config, read_json, read_text_fields
from prfaas_jax.models.hf_names import EMBED, LM_HEAD, hf_skipped, hf_sources
from prfaas_jax.models.stacking import stack


def read_hf(path: Path | str, dtype: str | None = None) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Config and weights of a directory with config.json and model.safetensors (one file, or shards with an index).

    Args:
        path: the directory.
        dtype: dtype of the returned arrays; None keeps the one that config.json names. (What params.py keeps in float32, such as decay
            rates and router biases, stays so.)

    Returns:
        The config and the stacked arrays by parameter name, read once and cast on the way.

    Raises InvalidInput naming the field or tensor that does not fit, before any weight is read.
    """
    path = Path(path)
    config = read_hf_config(path, dtype)
    architecture, fields = read_text_fields(path)
    skipped = hf_skipped(config, fields)
    with _Tensors(path) as tensors:
        shapes = {name: shape for name, shape in tensors.shapes().items() if not skipped.fullmatch(name)}
        if config.tie_embeddings and LM_HEAD in shapes:
            _check_tied(tensors, shapes)
            del shapes[LM_HEAD]
        return config, stack(config, hf_sources(config, architecture), shapes, tensors.read)


class _Tensors:
    """All tensors of a directory, whatever file each is in; nothing is read until asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.files: dict[str, Any] = {}
        self.file_of: dict[str, str] = {}

    def __enter__(self) -> "_Tensors":
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").exists():
            self.file_of = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        elif index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InvalidInput("checkpoint", str(index), "an index with a weight_map")
            self.file_of = weight_map
            for file in sorted(set(weight_map.values())):
                held = set(self._open(file).keys())
                if missing := sorted(n for n, f in weight_map.items() if f == file and n not in held):
                    raise InvalidInput(f"checkpoint file {file}", f"no {missing[0]}", "every tensor that the index puts there")
        else:
            raise InvalidInput("checkpoint", str(self.path), "a directory with model.safetensors or model.safetensors.index.json")
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self.files.values():
            file.__exit__(None, None, None)

    def _open(self, name: str) -> Any:
        try:
            self.files[name] = safe_open(self.path / name, framework="numpy").__enter__()
        except (OSError, SafetensorError) as e:
            raise InvalidInput("checkpoint", str(self.path / name), f"a readable safetensors file ({e})") from e
        return self.files[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.files[file].get_slice(name).get_shape()) for name, file in self.file_of.items()}

    def read(self, name: str) -> np.ndarray:
        return self.files[self.file_of[name]].get_tensor(name)


def _check_tied(tensors: _Tensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """A tied model's file may repeat the embedding as lm_head, but not contradict it."""
    embed = next((name for name in EMBED if name in shapes), None)
    if embed is None or not np.array_equal(tensors.read(LM_HEAD), tensors.read(embed)):
        raise InvalidInput("checkpoint tensor lm_head.weight", "differs from the embedding", "the embedding itself (tie_word_embeddings)")

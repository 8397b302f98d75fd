"""One file per model: `get_config()` returns the fields of `prfaas_jax.models.config.ModelConfig`."""

import importlib.util
from pathlib import Path

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig

_HERE = Path(__file__).parent


def available_models() -> tuple[str, ...]:
    """Names of the models in this folder."""
    return tuple(sorted(p.stem for p in _HERE.glob("*.py") if p.stem != "__init__"))


def load_model_config(path_or_name: str) -> ModelConfig:
    """Reads a model config: a name ("qwen3_toy"), its path ("configs/models/qwen3_toy.py"), or any other file with a `get_config()`.

    Raises:
        InvalidInput: no such model or file, a file without `get_config()`, or fields that make no model.
    """
    path = Path(path_or_name)
    if path.suffix != ".py" or not path.is_file():
        path = _HERE / f"{path.stem}.py"
        if path_or_name not in (path.stem, f"configs/models/{path.name}") or path.stem not in available_models():
            raise InvalidInput("model", path_or_name, f"a file with get_config() or one of {', '.join(available_models())}")
    spec = importlib.util.spec_from_file_location(f"_model_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # path ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InvalidInput("model", path_or_name, "a file that defines get_config()")
    return ModelConfig.from_dict(module.get_config().to_dict())

"""`config.json` of a Hugging Face directory -> ModelConfig. No jax: reading a shape needs no accelerator stack.

What the model here does not compute is refused by name: an option that changes the mathematics is never ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import DTYPE_BYTES
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.hf_families import READERS, read_family
from prfaas_jax.models.hf_fields import Fields

# Multimodal classes of which only the text model is read: class -> the class of its text_config.
WRAPPERS = {"Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM"}
ARCHITECTURES = (*READERS, *WRAPPERS)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises InvalidInput when it is absent, malformed or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InvalidInput("checkpoint", str(path), f"a readable file ({e.strerror})") from e
    except ValueError as e:
        raise InvalidInput("checkpoint", str(path), f"a JSON file ({e})") from e
    if not isinstance(content, dict):
        raise InvalidInput("checkpoint", str(path), "a JSON object")
    return content


def read_hf_config(path: Path | str, dtype: str | None = None) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory.

    Args:
        path: directory with config.json.
        dtype: overrides the file's dtype (float32 when the file has none).

    Raises InvalidInput naming the field for any architecture or option that the model does not compute.
    """
    path = Path(path)
    architecture, values = read_text_fields(path)
    fields = Fields(values)
    common: dict[str, Any] = {
        "name": path.resolve().name,
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": fields.count("hidden_size"),
        "max_position": fields.count("max_position_embeddings", "model_max_length"),
        "rms_norm_eps": float(fields.need("rms_norm_eps", "layernorm_epsilon")),
        "tie_embeddings": bool(fields.get("tie_word_embeddings", default=False)),
        "dtype": dtype or _dtype(fields),
    }
    return ModelConfig(**common | read_family(architecture, fields))


def read_text_fields(path: Path) -> tuple[str, Mapping[str, Any]]:
    """Architecture of the text model of a directory, and the fields that describe it.

    Raises InvalidInput for an architecture that is not computed, naming those that are.
    """
    fields = read_json(path / "config.json")
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise Fields(fields).refusal("architectures", names, f"exactly one of {list(ARCHITECTURES)}")
    if names[0] not in WRAPPERS:
        return names[0], fields
    if not isinstance(fields.get("text_config"), Mapping):
        raise Fields(fields).refusal("text_config", fields.get("text_config"), "an object")
    # These are said of the whole model, sometimes only there.
    outer = {name: fields[name] for name in ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config") if name in fields}
    return WRAPPERS[names[0]], {**fields["text_config"], **outer}


def read_hf_eos_ids(path: Path | str) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json's where it names any, else config.json's; may be empty."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        content = read_json(file) if file.exists() else {}
        eos = content.get("eos_token_id", (content.get("text_config") or {}).get("eos_token_id"))
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ()


def _dtype(fields: Fields) -> str:
    dtype = fields.get("dtype", "torch_dtype", default="float32")
    if dtype not in DTYPE_BYTES:
        raise fields.refusal("dtype", dtype, f"one of {sorted(DTYPE_BYTES)}, or a dtype given by the caller to convert to")
    return dtype

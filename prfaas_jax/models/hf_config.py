"""`config.json` of a Hugging Face directory -> ModelConfig. No jax: reading a shape needs no accelerator stack.

What the model here does not compute is refused by name: an option that changes the mathematics is never ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import DTYPE_BYTES
from prfaas_jax.models.config import ModelConfig, RopeScaling

ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")

# Options that change the mathematics, and the only value of each that this model computes; absent means this value.
_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
}


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
    fields = read_json(path / "config.json")
    architecture = _architecture(fields)
    _refuse_unsupported(fields, architecture)
    theta, scaling = _rope(fields)
    heads = _get(fields, "num_attention_heads")
    head_dim = fields.get("head_dim")
    if head_dim is None:
        if architecture == "Qwen3ForCausalLM":
            raise InvalidInput("config.json head_dim", None, "a number (Qwen3 head sizes do not follow from hidden_size)")
        head_dim = _get(fields, "hidden_size") // heads
    return ModelConfig(
        name=path.resolve().name,
        vocab_size=_get(fields, "vocab_size"),
        hidden_size=_get(fields, "hidden_size"),
        num_layers=_get(fields, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if fields.get("num_key_value_heads") is None else fields["num_key_value_heads"],
        head_dim=head_dim,
        intermediate_size=_get(fields, "intermediate_size"),
        max_position=_get(fields, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        dtype=dtype or _dtype(fields),
    )


def read_hf_eos_ids(path: Path | str) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json's where it names any, else config.json's; may be empty."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        eos = read_json(file).get("eos_token_id") if file.exists() else None
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ()


def _get(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise InvalidInput(f"config.json {name}", None, "a value (the field is missing)")
    return fields[name]


def _architecture(fields: Mapping[str, Any]) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise InvalidInput("config.json architectures", names, f"exactly one of {list(ARCHITECTURES)}")
    return names[0]


def _refuse_unsupported(fields: Mapping[str, Any], architecture: str) -> None:
    for name, value in _REQUIRED_VALUES.items():
        if name in fields and fields[name] is not None and fields[name] != value:
            raise InvalidInput(f"config.json {name}", fields[name], f"{value!r} (nothing else is implemented)")
    # Qwen3 writes a window that takes effect only with use_sliding_window, which is refused above.
    if architecture != "Qwen3ForCausalLM" and fields.get("sliding_window") is not None:
        raise InvalidInput("config.json sliding_window", fields["sliding_window"], "None (window attention is not implemented)")
    if other := sorted(set(fields.get("layer_types") or ()) - {"full_attention"}):
        raise InvalidInput("config.json layer_types", other, "full_attention in every layer")


def _rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) spelling."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(name) or {}
    theta = float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0)))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InvalidInput(f"config.json {name}.partial_rotary_factor", rope["partial_rotary_factor"], "1.0 (every pair rotates)")

    def number(key: str) -> float:
        if not isinstance(rope.get(key), int | float):
            raise InvalidInput(f"config.json {name}.{key}", rope.get(key), "a number")
        return float(rope[key])

    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return theta, None
        case "linear":
            return theta, RopeScaling("linear", number("factor"))
        case "llama3":
            original = int(number("original_max_position_embeddings"))
            return theta, RopeScaling("llama3", number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
        case kind:
            raise InvalidInput(f"config.json {name}.rope_type", kind, "default, linear or llama3")


def _dtype(fields: Mapping[str, Any]) -> str:
    dtype = fields.get("dtype", fields.get("torch_dtype")) or "float32"
    if dtype not in DTYPE_BYTES:
        raise InvalidInput("config.json dtype", dtype, f"one of {sorted(DTYPE_BYTES)}, or a dtype given by the caller to convert to")
    return dtype

"""Model shape as plain data. No jax here: planner and simulator read it too."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import DTYPE_BYTES, LayerCache, TensorSpec


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings: "linear" divides by `factor`; "llama3" only the long wavelengths, smoothly."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer with grouped-query attention (Llama and Qwen3 families).

    `dtype` is that of weights, activations and cache; norms and softmax are computed in float32.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for field in (*sizes, "max_position"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"model.{field}", value, "a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise InvalidInput("model.num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise InvalidInput("model.head_dim", self.head_dim, "an even number (rotary embeddings rotate pairs)")
        if self.dtype not in DTYPE_BYTES:
            raise InvalidInput("model.dtype", self.dtype, f"one of {sorted(DTYPE_BYTES)}")

    def layer_caches(self) -> tuple[LayerCache, ...]:
        """Every layer keeps k and v of all tokens."""
        tensors = tuple(TensorSpec(name, self.num_kv_heads, self.head_dim, self.dtype) for name in ("k", "v"))
        return (LayerCache("paged", tensors),) * self.num_layers

    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the logical axes that a mesh may shard (sharding.TABLE)."""
        return {"heads": self.num_heads, "kv_heads": self.num_kv_heads, "mlp": self.intermediate_size, "vocab": self.vocab_size}

    def num_params(self) -> int:
        """Number of parameters, norms and biases included."""
        d, h = self.hidden_size, self.head_dim
        attention = d * h * 2 * (self.num_heads + self.num_kv_heads)
        attention += h * (self.num_heads + 2 * self.num_kv_heads) if self.attention_bias else 0
        per_layer = attention + 3 * d * self.intermediate_size + 2 * d + (2 * h if self.qk_norm else 0)
        return self.num_layers * per_layer + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Builds a config from a mapping; raises InvalidInput on unknown or missing fields."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise InvalidInput("model", unknown, f"only the fields {sorted(known)}")
        required = [n for n, f in known.items() if f.default is dataclasses.MISSING]
        if missing := [n for n in required if n not in fields]:
            raise InvalidInput("model", dict(fields), f"also the fields {missing}")
        values = dict(fields)
        if isinstance(values.get("rope_scaling"), Mapping):
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**values)

    def fingerprint(self) -> str:
        """Hex digest of everything but the name: part of the handshake between the two sides."""
        fields = self.to_dict()
        del fields["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]

"""Model shape as plain data. No jax here: planner and simulator read it too."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import DTYPE_BYTES, LayerCache
from prfaas_jax.models.layer_config import AttentionConfig, DenseConfig, Layer, Rope, RopeScaling
from prfaas_jax.models.layer_dict import layer_from_dict, layer_to_dict, rope_scaling_from_dict
from prfaas_jax.models.pattern import Pattern, fold, runs

# Fields of the short form of a config: every layer alike, grouped-query attention and a dense feed-forward (`ModelConfig.dense`).
_DENSE_FIELDS = (
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "rope_theta",
    "rope_scaling",
    "qk_norm",
    "attention_bias",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, layer by layer.

    Attributes:
        name: for people; not part of the fingerprint.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        max_position: tokens that a request may reach.
        layers: first layer first.
        rms_norm_eps: of every norm that has no other.
        tie_embeddings: the output head is the embedding.
        norm_offset: norms multiply by 1 + weight (Gemma, Qwen3-Next, Qwen3.5); gated norms inside mixers never do.
        post_norms: each branch is normed once more before it is added (Gemma 3).
        normalized_residual: the residual is what the norm in front of the branch gave (MiniMax-Text-01).
        embed_scale: factor on embeddings, rounded to `dtype` before it is applied.
        dtype: of weights, activations and cache; norms, softmax and recurrent states are float32.
    """

    name: str
    vocab_size: int
    hidden_size: int
    max_position: int
    layers: tuple[Layer, ...]
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    norm_offset: bool = False
    post_norms: bool = False
    normalized_residual: bool = False
    embed_scale: float = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "max_position"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"model.{field}", value, "a positive integer")
        if not self.layers:
            raise InvalidInput("model.layers", self.layers, "at least one layer")
        if self.dtype not in DTYPE_BYTES:
            raise InvalidInput("model.dtype", self.dtype, f"one of {sorted(DTYPE_BYTES)}")

    @classmethod
    def dense(
        cls,
        *,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        rope_theta: float = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        qk_norm: bool = False,
        attention_bias: bool = False,
        **fields: Any,
    ) -> "ModelConfig":
        """A model whose layers are all alike: grouped-query attention and a dense feed-forward (Llama, Qwen3)."""
        if not isinstance(num_layers, int) or num_layers < 1:
            raise InvalidInput("model.num_layers", num_layers, "a positive integer")
        rope = Rope(rope_theta, scaling=rope_scaling)
        mixer = AttentionConfig(num_heads, num_kv_heads, head_dim, rope=rope, qk_norm="head" if qk_norm else "none", bias=attention_bias)
        return cls(layers=(Layer(mixer, DenseConfig(intermediate_size)),) * num_layers, **fields)

    @property
    def num_layers(self) -> int:
        """Depth."""
        return len(self.layers)

    @property
    def pattern(self) -> Pattern:
        """How the layers fold into (head, body x repeats, tail)."""
        return fold(self.layers)

    @property
    def body_runs(self) -> tuple[range, ...]:
        """Runs of equal layers among the positions of the pattern's body."""
        pattern = self.pattern
        return runs(self.layers[pattern.head : pattern.head + pattern.period])

    def layer_caches(self) -> tuple[LayerCache, ...]:
        """What each layer keeps per request."""
        return tuple(layer.mixer.cache(self.dtype) for layer in self.layers)

    def axis_sizes(self) -> tuple[tuple[str, int], ...]:
        """(logical axis, size) of everything that a mesh may shard (sharding.TABLE), each pair once."""
        pairs: list[tuple[str, int]] = []
        for layer in dict.fromkeys(self.layers):
            pairs += [*layer.mixer.axis_sizes(), *layer.mlp.axis_sizes()]
        pairs.append(("vocab", self.vocab_size))
        return tuple(dict.fromkeys(pairs))

    def num_params(self) -> int:
        """Number of parameters, norms and biases included."""
        d = self.hidden_size
        norms = d * (4 if self.post_norms else 2)
        layers = sum(norms + layer.mixer.num_params(d) + layer.mlp.num_params(d) for layer in self.layers)
        return layers + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the different layers as "blocks", and their order; `from_dict` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "layers"}
        names: dict[Layer, str] = {}
        for layer in dict.fromkeys(self.layers):
            base = f"{layer.mixer.kind}_{layer.mlp.kind}"
            taken = sum(name.startswith(base) for name in names.values())
            names[layer] = f"{base}_{taken + 1}" if taken else base
        blocks = {name: layer_to_dict(layer) for layer, name in names.items()}
        return {**fields, "blocks": blocks, "layers": [names[layer] for layer in self.layers]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Builds a config from a mapping, in the form of `to_dict` or in the short form of `dense`.

        Raises InvalidInput on unknown or missing fields.
        """
        short = "layers" not in fields
        own = {f.name: f for f in dataclasses.fields(cls)}
        known = {*own, *(_DENSE_FIELDS if short else ("blocks",))} - ({"layers"} if short else set())
        if unknown := sorted(set(fields) - known):
            raise InvalidInput("model", unknown, f"only the fields {sorted(known)}")
        required = [n for n, f in own.items() if f.default is dataclasses.MISSING and n != "layers"]
        required += list(_DENSE_FIELDS[:5]) if short else ["layers", "blocks"]
        if missing := [n for n in required if n not in fields]:
            raise InvalidInput("model", dict(fields), f"also the fields {missing}")
        values = dict(fields)
        if short:
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = rope_scaling_from_dict("model.rope_scaling", values["rope_scaling"])
            return cls.dense(**values)
        if not isinstance(values["blocks"], Mapping):
            raise InvalidInput("model.blocks", values["blocks"], "a mapping of names to layers")
        blocks = {name: layer_from_dict(f"model.blocks.{name}", block) for name, block in values.pop("blocks").items()}
        if unknown := sorted(set(values["layers"]) - set(blocks)):
            raise InvalidInput("model.layers", unknown, f"only the blocks {sorted(blocks)}")
        values["layers"] = tuple(blocks[name] for name in values["layers"])
        return cls(**values)

    def fingerprint(self) -> str:
        """Hex digest of everything but the name: part of the handshake between the two sides."""
        fields = self.to_dict()
        del fields["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]

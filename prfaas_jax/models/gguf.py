"""llama-architecture GGUF files: shape, weights (dequantised) and the metadata that a tokenizer is built from.

The converter that makes these files reorders the rows of q and k for interleaved rotary embeddings; reading undoes it.
"""

import functools
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import AttentionConfig, RopeScaling
from prfaas_jax.models.stacking import Part, Source, layer_place, stack

_EMBED, _OUTPUT = "token_embd.weight", "output.weight"

# Of each layer, parameter name (params.py) -> tensor name in the file, both without the layer.
_LAYER = {
    "mixer_norm/weight": "attn_norm.weight",
    "mlp_norm/weight": "ffn_norm.weight",
    **{f"mixer/{p}_proj/weight": f"attn_{p}.weight" for p in "qkv"},
    "mixer/o_proj/weight": "attn_output.weight",
    **{f"mlp/{p}_proj/weight": f"ffn_{p}.weight" for p in ("gate", "up", "down")},
}

# Every llama.* key that is understood; any other may change the mathematics and is refused.
_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
}


class GgufFile:
    """An open file: its metadata are parsed (seconds for a large vocabulary), its tensors are memory-mapped.

    Raises InvalidInput for a file that is no GGUF or not of the llama architecture.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (OSError, ValueError, IndexError, KeyError, struct.error) as e:
            raise InvalidInput("checkpoint", str(path), f"a readable GGUF file ({e})") from e
        if (architecture := self.get("general.architecture")) != "llama":
            raise InvalidInput("GGUF general.architecture", architecture, "'llama'")

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value (number, string, bool or list), or `default` when the file has no such key."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def config(self, dtype: str | None = None) -> ModelConfig:
        """The model's shape; raises InvalidInput naming any key that the model does not compute."""
        if unknown := sorted(k for k in self._reader.fields if k.startswith("llama.") and k.removeprefix("llama.") not in _KEYS):
            raise InvalidInput("GGUF metadata", unknown, f"no llama.* keys but {sorted(_KEYS)}")
        hidden, heads = self._count("embedding_length"), self._count("attention.head_count")
        head_dim = self.get("llama.attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (value := self.get(f"llama.{key}", head_dim)) != head_dim:
                raise InvalidInput(f"GGUF llama.{key}", value, f"{head_dim}, the size of a whole head")
        shapes = self._shapes()
        return ModelConfig.dense(
            name=self.get("general.name", self.path.stem),
            vocab_size=self.get("llama.vocab_size") or shapes.get(_EMBED, (0,))[0],
            hidden_size=hidden,
            num_layers=self._count("block_count"),
            num_heads=heads,
            num_kv_heads=self._count("attention.head_count_kv") if "llama.attention.head_count_kv" in self._reader.fields else heads,
            head_dim=head_dim,
            intermediate_size=self._count("feed_forward_length"),
            max_position=self._count("context_length"),
            rope_theta=_shortest(self.get("llama.rope.freq_base", 10_000.0)),
            rope_scaling=self._rope_scaling(),
            rms_norm_eps=_shortest(self.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
            tie_embeddings=_OUTPUT not in shapes,
            dtype=dtype or "float32",
        )

    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a generation or a turn; may be empty."""
        ids = (self.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def weights(self, config: ModelConfig, progress: bool = True) -> dict[str, np.ndarray]:
        """All weights by parameter name, stacked, in `config.dtype`; raises InvalidInput naming a tensor that does not fit."""
        tensors = {t.name: t for t in self._reader.tensors}

        def read(name: str) -> np.ndarray:
            tensor = tensors[name]
            try:
                return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as e:
                raise InvalidInput(f"checkpoint tensor {name} type", tensor.tensor_type.name, "a type that `gguf` dequantises") from e

        return stack(config, _sources(config), self._shapes(), read, progress)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes as numpy orders them; GGUF writes the fastest axis first."""
        return {t.name: tuple(int(n) for n in reversed(t.shape)) for t in self._reader.tensors}

    def _count(self, key: str) -> int:
        value = self.get(f"llama.{key}")
        if not isinstance(value, int):
            raise InvalidInput(f"GGUF llama.{key}", value, "one integer, the same for all layers")
        return value

    def _rope_scaling(self) -> RopeScaling | None:
        match self.get("llama.rope.scaling.type", "none"):
            case "none":
                return None
            case "linear":
                return RopeScaling("linear", _shortest(self.get("llama.rope.scaling.factor", 1.0)))
            case kind:
                raise InvalidInput("GGUF llama.rope.scaling.type", kind, "none or linear")


def read_gguf(path: Path | str, dtype: str | None = None, progress: bool = True) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Config and dequantised weights of a llama-architecture GGUF file.

    Args:
        path: the file.
        dtype: dtype of the returned arrays; None means float32.
        progress: show a progress bar on stderr.

    Raises InvalidInput naming the key or tensor that does not fit.
    """
    file = GgufFile(path)
    config = file.config(dtype)
    return config, file.weights(config, progress)


def _sources(config: ModelConfig) -> list[Source]:
    """The tensors of a file; rows of q and k go back to the order of the original."""
    sources = [Source((_EMBED,), (Part("embed"),)), Source(("output_norm.weight",), (Part("final_norm/weight"),))]
    if not config.tie_embeddings:
        sources.append(Source((_OUTPUT,), (Part("lm_head"),)))
    for number, layer in enumerate(config.layers):
        assert isinstance(layer.mixer, AttentionConfig), "config() builds no other"
        heads = {"attn_q.weight": layer.mixer.num_heads, "attn_k.weight": layer.mixer.num_kv_heads}
        prefix, index = layer_place(config, number)
        for parameter, tensor in _LAYER.items():
            take = functools.partial(half_rotation_rows, heads=heads[tensor]) if tensor in heads else None
            sources.append(Source((f"blk.{number}.{tensor}",), (Part(f"{prefix}/{parameter}", index, take),)))
    return sources


def half_rotation_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows [heads * H, in] of each head from interleaved pairs (0, 1), (2, 3), .. to pairs (i, i + H/2)."""
    rows, inp = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, inp).swapaxes(1, 2).reshape(rows, inp)


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 for 9.999999747378752e-06, as the original config had it."""
    return float(str(np.float32(value)))

"""What a `--checkpoint` argument names, and the model's shape without its weights. No jax for Hugging Face and Orbax directories."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.hf_config import read_hf_config, read_json

if TYPE_CHECKING:
    from prfaas_jax.models.gguf import GgufFile

# Written last by checkpoint.save: a directory without it is not a checkpoint.
MANIFEST = "prfaas_checkpoint.json"

# Grows when parameter names or the form of the config change; older saves must be converted again.
FORMAT = 3

# Resolves the <config> of "random:<config>"; configs lie above models in the house, so the caller brings it.
RandomConfig = Callable[[str], ModelConfig]

_ACCEPTED = "an Orbax checkpoint saved by this package, a Hugging Face directory, a .gguf file, or random:<model config>[@seed]"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights come from. `location` is a path, or the model config's name when random."""

    kind: Literal["orbax", "hf", "gguf", "random"]
    location: str
    seed: int = 0

    @property
    def path(self) -> Path:
        """The location as a path."""
        return Path(self.location)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a saved directory says about itself, beside its parameters."""

    config: ModelConfig
    weights_digest: str
    eos_ids: tuple[int, ...]

    def to_json(self) -> str:
        """Text of the manifest file; `read_manifest` reads it back."""
        fields = {"format": FORMAT, "model": self.config.to_dict(), "weights_digest": self.weights_digest, "eos_ids": list(self.eos_ids)}
        return json.dumps(fields, indent=2) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a saved directory; raises InvalidInput when it is damaged."""
    fields = read_json(directory / MANIFEST)
    if (found := fields.get("format", 1)) != FORMAT:
        raise InvalidInput("checkpoint format", found, f"{FORMAT}: {directory} was saved by another version, convert it again")
    try:
        return Manifest(ModelConfig.from_dict(fields["model"]), fields["weights_digest"], tuple(fields["eos_ids"]))
    except (KeyError, TypeError) as e:
        raise InvalidInput("checkpoint", str(directory / MANIFEST), f"a manifest with model, weights_digest and eos_ids ({e!r})") from e


def resolve(text: str | Path) -> Source:
    """Tells what `text` names; raises InvalidInput saying what is accepted when it is none of it."""
    text = str(text)
    if text.startswith("random:"):
        return _random(text)
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / MANIFEST).exists():
            return Source("orbax", str(path))
        if (path / "config.json").exists():
            return Source("hf", str(path))
        if (path / "params").exists():
            raise InvalidInput("checkpoint", text, f"a finished save ({MANIFEST} is missing, so this one was interrupted)")
        raise InvalidInput("checkpoint", text, f"{_ACCEPTED}; this directory has neither {MANIFEST} nor config.json")
    if not path.exists():
        raise InvalidInput("checkpoint", text, f"{_ACCEPTED}; nothing is there")
    if path.suffix != ".gguf":
        raise InvalidInput("checkpoint", text, _ACCEPTED)
    return Source("gguf", str(path))


def read_config(text: str | Path, dtype: str | None = None, random_config: RandomConfig | None = None) -> ModelConfig:
    """The shape of a checkpoint's model, without its weights.

    Args:
        text: as for `resolve`.
        dtype: overrides the dtype in which the weights would be loaded.
        random_config: resolver of "random:<config>".
    """
    source = resolve(text)
    match source.kind:
        case "hf":
            return read_hf_config(source.path, dtype)
        case "orbax":
            config = read_manifest(source.path).config
        case "gguf":
            return open_gguf(source.path).config(dtype)
        case "random":
            if random_config is None:
                raise InvalidInput("checkpoint", str(text), "real weights: random ones are not offered here")
            config = random_config(source.location)
    return dataclasses.replace(config, dtype=dtype) if dtype else config


def open_gguf(path: Path) -> "GgufFile":
    """Opens a GGUF file; the package that reads it is an optional dependency, so it is imported only here."""
    from prfaas_jax.models.gguf import GgufFile

    return GgufFile(path)


def _random(text: str) -> Source:
    location, at, seed = text.removeprefix("random:").rpartition("@")
    if not at:
        location, seed = seed, "0"
    if not location or not seed.isdecimal() or int(seed) >= 2**31:
        raise InvalidInput("checkpoint", text, "random:<model config> or random:<model config>@<seed>, with a seed in [0, 2**31)")
    return Source("random", location, int(seed))

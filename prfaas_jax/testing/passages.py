"""Public-domain text for demos and perplexity checks."""

from pathlib import Path

from prfaas_jax.errors import InvalidInput

TEXTS = Path(__file__).resolve().parents[2] / "third_party" / "texts"


def hamlet() -> str:
    """The opening of Hamlet: 9.8 kB of ASCII, 2,918 SmolLM2 tokens. InvalidInput when the source tree is incomplete."""
    return _read("hamlet_excerpt.txt")


def persuasion() -> str:
    """Eight chapters of Persuasion: 129 kB of ASCII, 32,001 SmolLM2 tokens. InvalidInput as `hamlet`."""
    return _read("persuasion_excerpt.txt")


def _read(name: str) -> str:
    path = TEXTS / name
    try:
        return path.read_text("ascii")
    except FileNotFoundError as error:
        raise InvalidInput("passage", str(path), "the file as it stands in the repository (run from a source tree)") from error

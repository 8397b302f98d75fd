"""Public-domain text for demos and perplexity checks."""

from pathlib import Path

from prfaas_jax.errors import InvalidInput

TEXTS = Path(__file__).resolve().parents[2] / "third_party" / "texts"


def hamlet() -> str:
    """The opening of Hamlet: 9.8 kB of ASCII, 2,918 SmolLM2 tokens. InvalidInput when the source tree is incomplete."""
    path = TEXTS / "hamlet_excerpt.txt"
    try:
        return path.read_text("ascii")
    except FileNotFoundError as error:
        raise InvalidInput("passage", str(path), "the file as it stands in the repository (run from a source tree)") from error

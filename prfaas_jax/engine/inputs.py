"""Prompts from files."""

import json
import pathlib

from prfaas_jax.errors import InvalidInput


def read_prompts(path: str, field: str = "prompt_tokens") -> list[list[int]]:
    """Reads a JSON file with a list of token-id lists.

    Raises InvalidInput naming `field`, the file and what is wrong in it: no such file, no JSON, another shape, an empty prompt.
    """
    try:
        data = json.loads(pathlib.Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInput(field, path, f"a readable JSON file with a list of token-id lists ({error})") from error
    if not isinstance(data, list) or not data or not all(isinstance(p, list) for p in data):
        raise InvalidInput(field, path, "a JSON file with a non-empty list of token-id lists, such as [[1, 2, 3]]")
    for i, prompt in enumerate(data):
        if not prompt or not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
            raise InvalidInput(f"{field}[{i}]", prompt, "a non-empty list of integer token ids")
    return data

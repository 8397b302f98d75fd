"""Text <-> token ids, whole and as a stream: byte-level BPE from tokenizer.json or GGUF metadata, chat, stop strings."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.chat_template import ChatTemplate
from prfaas_jax.models.gguf import GgufFile
from prfaas_jax.models.hf_config import read_hf_eos_ids, read_json

# Our own companion of tokenizer.json: what that file has no place for.
_CHAT_FILE = "chat.json"

# GGUF token types.
_CONTROL, _USER_DEFINED = 3, 4

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A `tokenizers.Tokenizer` with the chat template and end tokens of its model.

    Attributes:
        backend: the wrapped tokenizer.
        eos_ids: token ids that end a generation; may be empty.
    """

    def __init__(self, backend: tokenizers.Tokenizer, template: ChatTemplate | None = None, eos_ids: Sequence[int] = ()):
        self.backend = backend
        self.eos_ids = tuple(eos_ids)
        self._template = template

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Reads a directory with tokenizer.json (ours or Hugging Face's) or a GGUF file; raises InvalidInput when there is none."""
        path = Path(path)
        if path.suffix == ".gguf":
            return cls.from_gguf(GgufFile(path))
        file = path / "tokenizer.json"
        if not file.exists():
            raise InvalidInput("tokenizer", str(path), "a directory with tokenizer.json, or a .gguf file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the binding raises bare Exception
            raise InvalidInput("tokenizer", str(file), f"a readable tokenizer.json ({e})") from e
        if (path / _CHAT_FILE).exists():
            chat = read_json(path / _CHAT_FILE)
            template = ChatTemplate(chat["template"], chat["bos_token"], chat["eos_token"]) if chat["template"] else None
            return cls(backend, template, chat["eos_ids"])
        return cls(backend, _hf_template(path), read_hf_eos_ids(path))

    @classmethod
    def from_gguf(cls, file: GgufFile) -> "Tokenizer":
        """Rebuilds the byte-level BPE from an open GGUF file's metadata; raises InvalidInput for other tokenizers, by name."""
        for key, supported in (("model", "gpt2"), ("pre", "smollm")):
            if (value := file.get(f"tokenizer.ggml.{key}")) != supported:
                raise InvalidInput(f"GGUF tokenizer.ggml.{key}", value, f"{supported!r} (take other models' tokenizer.json instead)")
        tokens, types, merges = (file.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
        if not (tokens and types and merges):
            raise InvalidInput("GGUF tokenizer.ggml", "incomplete", "tokens, token_type and merges")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges]))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
        backend.add_tokens([tokenizers.AddedToken(t, special=kind == _CONTROL, normalized=False) for t, kind in added])
        special = {}
        for name in ("bos", "eos"):
            token_id = file.get(f"tokenizer.ggml.{name}_token_id")
            special[f"{name}_token"] = "" if token_id is None else tokens[token_id]
        if file.get("tokenizer.ggml.add_bos_token", False):
            bos = special["bos_token"]
            backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
        source = file.get("tokenizer.chat_template")
        return cls(backend, ChatTemplate(source, **special) if source else None, file.eos_ids())

    def save(self, directory: Path | str) -> None:
        """Writes tokenizer.json and chat.json into an existing directory."""
        self.backend.save(str(Path(directory) / "tokenizer.json"))
        template = self._template or ChatTemplate("")
        chat = {"template": template.source, "bos_token": template.bos_token, "eos_token": template.eos_token, "eos_ids": self.eos_ids}
        (Path(directory) / _CHAT_FILE).write_text(json.dumps(chat, indent=2) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with whatever tokens the model's tokenizer adds around it."""
        return self.backend.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role", "content"} messages), ready for the assistant's answer.

        Raises InvalidInput when the tokenizer has no chat template, or the template does not take these messages.
        """
        if self._template is None:
            raise InvalidInput("chat template", None, "a model whose tokenizer brings one; use a plain prompt with this one")
        # The template writes all special tokens itself.
        return self.backend.encode(self._template.render(messages), add_special_tokens=False).ids

    def stream(self) -> "StreamDetokenizer":
        """A new incremental decoder."""
        return StreamDetokenizer(self)


class StreamDetokenizer:
    """Decodes one token at a time; all that it returns, joined, is `Tokenizer.decode` of all tokens.

    Text is returned as soon as no later token can change it, so a character is never cut in two.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # The tokens still decoded: `_known` for context (decoders may treat the first token differently), then the open ones.
        self._tokens: list[int] = []
        self._known = 0
        # Characters of the window's text that have been returned.
        self._sent = 0

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now certain, possibly empty."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # An unfinished character shows as U+FFFD at the end, one to three of them as the decoder likes.
        certain = len(text) - min(3, len(text) - len(text.rstrip(_REPLACEMENT)))
        new = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if certain == len(text) and new:
            # A clean edge: what was open becomes context, the old context goes.
            del self._tokens[: self._known]
            self._known = len(self._tokens)
            self._sent = len(self._tokenizer.decode(self._tokens))
        return new

    def finish(self) -> str:
        """No more tokens: what was held back, unfinished characters as U+FFFD."""
        rest = self._tokenizer.decode(self._tokens)[self._sent :]
        self._sent += len(rest)
        return rest


class StopStrings:
    """Watches a stream of text for stop strings and cuts it before the first one to be completed.

    How the text is cut into pieces changes neither what is emitted in total nor where it stops.
    """

    def __init__(self, stops: Sequence[str]):
        if bad := [s for s in stops if not isinstance(s, str) or not s]:
            raise InvalidInput("stop", bad[0], "non-empty strings")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Adds text; returns what may be shown and whether a stop string was completed (nothing is emitted after that)."""
        if self._stopped:
            return "", True
        text = self._held + text
        matches = [(start + len(s), start) for s in self._stops if (start := text.find(s)) >= 0]
        if matches:
            self._stopped, self._held = True, ""
            return text[: min(matches)[1]], True
        # Hold back the longest tail that may yet become a stop string.
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        keep = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """No more text: a partial match that was held back."""
        held, self._held = self._held, ""
        return held


def _hf_template(path: Path) -> ChatTemplate | None:
    """The chat template of a Hugging Face directory: chat_template.jinja, or the one in tokenizer_config.json."""
    config: dict[str, Any] = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    source = config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if (path / "chat_template.jinja").exists():
        source = (path / "chat_template.jinja").read_text(encoding="utf-8")
    if not source:
        return None
    tokens = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name) or ""
        tokens[name] = token["content"] if isinstance(token, dict) else token
    return ChatTemplate(source, **tokens)

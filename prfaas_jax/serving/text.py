"""Between text and token ids, for servers that have a tokenizer and for those that have none."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.proto import generation_pb2


class TokenStream(Protocol):
    """Turns tokens into text as they come."""

    def push(self, token: int) -> str:
        """Text that became final; may be empty, e.g. within a character."""
        ...

    def finish(self) -> str:
        """What is left at the end."""
        ...


class TextCodec(Protocol):
    """What serving needs of a tokenizer; models.tokenizer.Tokenizer is one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins."""
        ...

    def stream(self) -> TokenStream:
        """A fresh stream."""
        ...


def encode_prompt(request: generation_pb2.GenerateRequest, tokenizer: TextCodec | None) -> tuple[int, ...]:
    """Token ids of whichever form the prompt came in; raises InvalidInput when it is absent or needs a tokenizer that is not there."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidInput("prompt", None, "one of token_ids, text, chat")
    if kind == "token_ids":
        return tuple(request.token_ids.ids)
    if tokenizer is None:
        raise InvalidInput("prompt", kind, "token_ids: this server has no tokenizer")
    if kind == "text":
        return tuple(tokenizer.encode(request.text))
    if not request.chat.messages:
        raise InvalidInput("chat.messages", [], "at least one message")
    return tuple(tokenizer.chat([{"role": m.role, "content": m.content} for m in request.chat.messages]))


class TextStream:
    """Text of a generation as its tokens come, ending before the first stop string. Empty text throughout without a tokenizer."""

    def __init__(self, tokenizer: TextCodec | None, stop_strings: Sequence[str]):
        """Raises InvalidInput for an empty stop string, or any without a tokenizer."""
        if tokenizer is None:
            if stop_strings:
                raise InvalidInput("number of stop_strings", len(stop_strings), "none: this server has no tokenizer")
            self._stream = None
            return
        # Only here: it needs the optional `tokenizers` package, as this server's tokenizer did.
        from prfaas_jax.models.tokenizer import StopStrings

        self._stream = tokenizer.stream()
        self._stops = StopStrings(stop_strings)

    def add(self, token: int) -> tuple[str, bool]:
        """Text that this token makes final, and whether a stop string is complete."""
        if self._stream is None:
            return "", False
        return self._stops.push(self._stream.push(token))

    def finish(self) -> tuple[str, bool]:
        """Text held back so far, after the last token, and whether a stop string completes in it."""
        if self._stream is None:
            return "", False
        text, stopped = self._stops.push(self._stream.finish())
        return text + self._stops.finish(), stopped

"""What the demo asks a cluster, and what must hold of the answers for them to count."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import grpc

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.tokenizer import Tokenizer
from prfaas_jax.serving.pair import GenerateFailed
from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS
from prfaas_jax.transfer.security import NONE, Security, open_channel


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished request. `first_at` is when its first token came, in monotonic seconds of the client."""

    text: str
    usage: generation_pb2.Usage
    first_at: float

    @property
    def arrived_at(self) -> float:
        """About when it reached the decode server, in monotonic seconds: off by one way from there to the client."""
        return self.first_at - self.usage.ttft_s + self.usage.parts.route


def chat(question: str, max_new_tokens: int) -> generation_pb2.GenerateRequest:
    """One chat message, to be answered greedily."""
    request = generation_pb2.GenerateRequest(max_new_tokens=max_new_tokens)
    request.chat.messages.add(role="user", content=question)
    return request


def token_prompt(ids: Sequence[int], max_new_tokens: int) -> generation_pb2.GenerateRequest:
    """A prompt of token ids, to be continued greedily, past any end-of-text token."""
    ids_message = generation_pb2.TokenIds(ids=ids)
    return generation_pb2.GenerateRequest(token_ids=ids_message, max_new_tokens=max_new_tokens, ignore_eos=True)


def ask(
    address: str,
    request: generation_pb2.GenerateRequest,
    on_text: Callable[[str], None],
    timeout_s: float = 600.0,
    security: Security = NONE,
) -> Answer:
    """Sends a request to a Generation service; `on_text` gets every piece of the answer as it comes, which may be empty.

    The answer to token ids are token ids. A failed remote prefill is an error here, not a fallback. Raises GenerateFailed.
    """
    pieces, first_at, usage = [], None, generation_pb2.Usage()
    with open_channel(address, FRONT_CHANNEL_OPTIONS, security) as channel:
        try:
            for event in generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=timeout_s):
                if event.HasField("usage"):
                    usage = event.usage
                    continue
                first_at = first_at or time.monotonic()
                pieces.append(f"{event.token.token.id} " if request.HasField("token_ids") else event.token.text)
                on_text(pieces[-1])
        except grpc.RpcError as error:
            raise GenerateFailed(error) from error
    assert first_at is not None  # an OK status without a token would break the service's contract
    return Answer("".join(pieces), usage, first_at)


def question_about(text: str, instruction: str, tokens: int, tokenizer: Tokenizer) -> str:
    """The beginning of `text`, cut at a line's end, and the instruction, in at most `tokens` tokens of chat prompt.

    Raises InvalidInput when not even one line fits, or when the whole text would leave more than a tenth of `tokens` unused.
    """

    def question(lines: Sequence[str]) -> str:
        return f"{''.join(lines)}\n{instruction}"

    def length(lines: Sequence[str]) -> int:
        return len(tokenizer.chat([{"role": "user", "content": question(lines)}]))

    lines = text.splitlines(keepends=True)
    # The most lines that fit: more lines never make fewer tokens.
    low, high = 0, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(lines[:middle]) <= tokens else (low, middle - 1)
    if low == 0 or length(lines[:low]) < 0.9 * tokens:
        raise InvalidInput("tokens", tokens, f"a length that this text of {length(lines)} tokens can fill with whole lines")
    return question(lines[:low])


def violations(
    local: generation_pb2.Usage, remote: generation_pb2.Usage, expected: int, prefilled_by_decode: int, passed_link: int
) -> list[str]:
    """What is wrong with the run; empty when it is valid.

    Args:
        local: usage of the short prompt.
        remote: usage of the long one.
        expected: canonical KV bytes of the long prompt, computed by the caller and not taken from the servers.
        prefilled_by_decode: prompt tokens that the decode server's engine has computed since it started.
        passed_link: bytes that have come down the link.
    """
    rules = {
        f"the short prompt was prefilled {local.placement}ly": local.placement == "local",
        f"the long prompt was prefilled {remote.placement}ly": remote.placement == "remote",
        f"the account expects {remote.kv_bytes_expected} bytes of KV, the model has {expected}": remote.kv_bytes_expected == expected,
        f"{remote.kv_bytes_moved} bytes of KV moved, {expected} expected": remote.kv_bytes_moved == expected,
        f"only {passed_link} bytes passed the link": passed_link >= expected,
        f"{remote.tokens_recomputed} tokens were recomputed": remote.tokens_recomputed == 0,
        f"the decode server prefilled {prefilled_by_decode} tokens, {local.prompt_tokens} were its own": (
            prefilled_by_decode == local.prompt_tokens
        ),
        f"{local.fallbacks + remote.fallbacks} fallbacks": local.fallbacks + remote.fallbacks == 0,
    }
    return [broken for broken, holds in rules.items() if not holds]

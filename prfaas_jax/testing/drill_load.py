"""The load of a fault drill: greedy requests whose tokens are known, sent steadily, and what came of each."""

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import grpc

from prfaas_jax.serving.client import Answer, Client, retry_after_s
from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.transfer.security import NONE, Security

# After its deadline a request has this long to say so.
HUNG_S = 3.0
_STOP_S = 10.0

T = TypeVar("T")
Kind = Literal["load", "probe", "cancelled", "deadline", "burst"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked: token ids, and how many new ones are wanted."""

    number: int
    ids: tuple[int, ...]
    new_tokens: int

    def request(self) -> generation_pb2.GenerateRequest:
        """Greedy, the model's end tokens ignored; a remote prefill that fails everywhere may become a local one."""
        message = generation_pb2.GenerateRequest(max_new_tokens=self.new_tokens, ignore_eos=True, allow_fallback=True)
        message.token_ids.ids[:] = self.ids
        message.sampling.temperature = 0.0
        return message


@dataclasses.dataclass(frozen=True)
class Reference:
    """A prompt's answer without any fault: its tokens, seconds to the first one, and to the last."""

    tokens: tuple[int, ...]
    ttft_s: float
    total_s: float


@dataclasses.dataclass(eq=False)
class Asked:
    """One request; times are monotonic seconds. Filled while it runs, by the load's thread.

    Attributes:
        error: what it ended with, if that was not an answer.
        ended_s: None while it runs.
        hung: it had not ended long after its deadline, and was cut.
    """

    prompt: Prompt
    kind: Kind
    sent_s: float
    deadline_s: float
    answer: Answer = dataclasses.field(default_factory=Answer)
    error: grpc.RpcError | None = None
    ended_s: float | None = None
    hung: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Seconds from sending to the first token."""
        return None if self.answer.first_s is None else self.answer.first_s - self.sent_s

    @property
    def total_s(self) -> float | None:
        """Seconds from sending to the last token so far."""
        return None if self.answer.last_s is None else self.answer.last_s - self.sent_s

    @property
    def retry_after_s(self) -> float | None:
        """What a server that was full advised."""
        return retry_after_s(self.error) if self.error is not None else None

    def outcome(self) -> str:
        """What became of it: as planned, resumed, retried elsewhere, local, restarted, came back, cancelled, hung, or the error's code."""
        if self.hung:
            return "hung"
        if self.error is not None:
            return self.error.code().name
        usage = self.answer.usage
        if usage is None:
            return "cancelled" if self.ended_s is not None else "running"
        if usage.attempts > 1:
            return "restarted"
        if usage.fallbacks or (usage.failures and usage.placement == "local"):
            return "local"
        if usage.failures:
            return "resumed" if any(failure.phase in ("transfer", "completion") for failure in usage.failures) else "retried elsewhere"
        if self.answer.returns:
            return "came back"
        return "as planned"


def make_prompts(count: int, vocab: int, short: tuple[int, int], long: tuple[int, int], new_tokens: int, seed: int) -> tuple[Prompt, ...]:
    """`count` prompts of random tokens, alternately long and short; lengths are uniform in the closed ranges."""
    rng = random.Random(seed)
    prompts = []
    for number in range(count):
        length = rng.randint(*(short if number % 2 else long))
        prompts.append(Prompt(number, tuple(rng.randrange(1, vocab) for _ in range(length)), new_tokens))
    return tuple(prompts)


def judge(asked: Asked, reference: Reference, kv_bytes: Callable[[int], int]) -> list[str]:
    """What is wrong with a request that is over, besides its outcome: tokens, the account, an end that never came.

    `kv_bytes` has the bytes of the KV of so many tokens.
    """
    found = []
    tokens, usage = tuple(asked.answer.tokens), asked.answer.usage
    if tokens != reference.tokens[: len(tokens)] or (usage is not None and len(tokens) != len(reference.tokens)):
        at = next(
            (i for i, (a, b) in enumerate(zip(tokens, reference.tokens, strict=False)) if a != b), min(len(tokens), len(reference.tokens))
        )
        found.append(f"wrong tokens from {at} on, of {len(tokens)}")
    if asked.hung:
        found.append(f"hung, {HUNG_S:g} s after its deadline")
    elif usage is None and asked.error is None and asked.kind != "cancelled":
        found.append("ended without an answer or an error")
    if usage is not None:
        found += _account(usage, len(asked.prompt.ids), len(tokens), kv_bytes)
    return found


def _account(usage: generation_pb2.Usage, prompt_tokens: int, tokens: int, kv_bytes: Callable[[int], int]) -> list[str]:
    """The four counters of a usage against each other and what was asked for."""
    found = []
    expected = kv_bytes(prompt_tokens) if usage.placement == "remote" else 0
    moved = usage.kv_bytes_moved + usage.kv_bytes_skipped
    if (usage.kv_bytes_expected, moved) != (expected, expected):
        found.append(f"{expected} bytes of KV were due, {usage.kv_bytes_expected} are said to be, {moved} were moved or skipped")
    once, again, wire = usage.kv_bytes_moved, usage.kv_bytes_resent, usage.kv_bytes_wire
    # What was lost or damaged on the way was sent again, but has come once.
    if usage.codec == "none" and not once <= wire <= once + again:
        found.append(f"{once} bytes moved and {again} again, but {wire} crossed the link")
    if usage.tokens_recomputed and not usage.failures:
        found.append(f"{usage.tokens_recomputed} tokens recomputed without any failure")
    if (usage.prompt_tokens, usage.output_tokens) != (prompt_tokens, tokens):
        found.append(f"{usage.prompt_tokens} + {usage.output_tokens} tokens in the account, {prompt_tokens} + {tokens} in fact")
    return found


class Load:
    """Sends requests to one router, on a thread of its own, while the block runs; every method is thread safe."""

    def __init__(self, router: str, prompts: Sequence[Prompt], timeout_s: float, seed: int, security: Security = NONE):
        """`timeout_s` is the deadline of a request, in seconds from its sending; the seed orders prompts and gaps."""
        self._router, self._prompts, self._timeout_s, self._security = router, prompts, timeout_s, security
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="drill load", daemon=True)
        self._tasks: dict[Asked, asyncio.Task[None]] = {}
        self._steady: asyncio.Task[None] | None = None
        self.asked: list[Asked] = []

    def __enter__(self) -> Self:
        self._thread.start()
        self._client = self._call(self._connect())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)

    def ask(self, prompt: Prompt, kind: Kind = "probe", timeout_s: float | None = None) -> Asked:
        """Sends a request and does not wait for it."""
        now = time.monotonic()
        asked = Asked(prompt, kind, now, now + (timeout_s or self._timeout_s))
        self.asked.append(asked)
        self._loop.call_soon_threadsafe(self._begin, asked)
        return asked

    def cancel(self, asked: Asked) -> None:
        """As a client that gives up; it is over once that has been said everywhere."""

        def act() -> None:
            if (task := self._tasks.get(asked)) is not None:
                task.cancel()

        self._loop.call_soon_threadsafe(act)

    def steady(self, per_s: float) -> None:
        """From now on so many requests per second, at random times; 0 ends it."""

        async def change() -> None:
            if self._steady is not None:
                self._steady.cancel()
                await asyncio.gather(self._steady, return_exceptions=True)
            self._steady = asyncio.create_task(self._send(per_s)) if per_s else None

        self._call(change())

    def running(self) -> list[Asked]:
        """Requests that are not over."""
        return [asked for asked in list(self.asked) if asked.ended_s is None]

    def drain(self) -> None:
        """Returns once all requests are over, which is at most a little after the last one's deadline."""
        while self.running():
            time.sleep(0.01)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_STOP_S)

    async def _connect(self) -> Client:
        return Client([self._router], self._security)

    def _begin(self, asked: Asked) -> None:
        task = self._loop.create_task(self._run(asked))
        self._tasks[asked] = task
        task.add_done_callback(lambda _: self._tasks.pop(asked))

    async def _run(self, asked: Asked) -> None:
        left = asked.deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(left + HUNG_S):
                async for _ in self._client.stream(asked.prompt.request(), left, asked.answer):
                    pass
        except TimeoutError:
            asked.hung = True
        except grpc.RpcError as error:
            asked.error = error
        finally:
            asked.ended_s = time.monotonic()

    async def _send(self, per_s: float) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(per_s))
            self.ask(self._rng.choice(self._prompts), "load")

    async def _end(self) -> None:
        tasks = [*self._tasks.values(), *([self._steady] if self._steady is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

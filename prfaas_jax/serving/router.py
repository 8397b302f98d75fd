"""The router: one policy decides where each request's prompt is prefilled; its decode server is told, and is held to it."""

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.view import Placement, Policy, Request, Servers
from prfaas_jax.serving.backends import Backends
from prfaas_jax.serving.front import FrontOptions, GenerationFront
from prfaas_jax.serving.generation import Progress, Write
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc
from prfaas_jax.serving.text import TextCodec, encode_prompt
from prfaas_jax.serving.usage import InvalidRun

# Servers that a request may be moved to; each costs it the time that the one before took to fail.
_MAX_ALTERNATIVES = 2


@dataclasses.dataclass(frozen=True)
class RouterOptions(FrontOptions):
    """What stands behind a router, besides the options of every front.

    Attributes:
        decode: addresses of decode servers, comma separated; at least one.
        prefill: addresses of prefill servers, comma separated; may be empty.
        poll_s: how often each server is asked for its status; one that does not answer within twice that, or a second, is unhealthy.
    """

    decode: str = ""
    prefill: str = ""
    poll_s: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.poll_s > 0:
            raise InvalidInput("poll_s", self.poll_s, "a positive number")


class Router(GenerationFront):
    """Serves Generate by forwarding it. `start` and `stop` run on the event loop that serves."""

    def __init__(self, policy: Policy, tokenizer: TextCodec | None, options: RouterOptions):
        """With a tokenizer, text is turned into token ids here, once; without one, prompts must come as token ids.

        Raises InvalidInput for malformed or repeated addresses, or no decode server.
        """
        super().__init__(options)
        self._policy, self._tokenizer, self._margin_s = policy, tokenizer, options.deadline_margin_s
        self._backends = Backends(_addresses(options.prefill), _addresses(options.decode), options.poll_s, options)

    async def start(self) -> None:
        """Asks every server once, binds and serves; raises InvalidInput naming an address that cannot be bound."""
        await self._backends.start()
        try:
            await super().start()
        except BaseException:
            await self._backends.stop()
            raise

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING at once; running requests get `grace_s` seconds, then they are cut."""
        await super().stop(grace_s)
        await self._backends.stop()

    async def Status(self, request: common_pb2.StatusRequest, context: Any) -> generation_pb2.GenerationStatus:
        """See generation.proto."""
        status = await super().Status(request, context)
        status.has_tokenizer = self._tokenizer is not None
        status.backends.extend(self._backends.report())
        return status

    async def _generate(
        self, request: generation_pb2.GenerateRequest, write: Write, arrived: float, deadline: float, progress: Progress
    ) -> generation_pb2.Usage:
        placement = await self._place(request, arrived)
        progress.phase = f"generation by {placement.decode}"
        usage = await self._forward(request, placement, write, deadline)
        self._check(placement, request.placement.alternatives, usage)
        self._fallbacks += usage.fallbacks
        return usage

    def _label(self, usage: generation_pb2.Usage) -> str:
        # Reasons of one kind differ in their numbers only: "threshold: 700 > 512 tokens".
        return f"{usage.placement}: {usage.reason.partition(':')[0]}"

    # --- one request -----------------------------------------------------------------------------------------------------------

    async def _place(self, request: generation_pb2.GenerateRequest, arrived: float) -> Placement:
        """Decides, and rewrites `request` in place: token ids, placement, and how long it all took."""
        # Not on the event loop: a long text takes a while, and other requests' tokens are waiting.
        prompt = await asyncio.to_thread(encode_prompt, request, self._tokenizer)
        if not prompt:
            raise InvalidInput("prompt", (), "at least one token id")
        view = self._backends.view()
        placement = self._policy.place(Request(len(prompt), max(1, request.max_new_tokens)), view, time.monotonic())
        if request.WhichOneof("prompt") != "token_ids":
            request.token_ids.ids[:] = prompt
        request.placement.prefill_address = placement.prefill or ""
        request.placement.reason = placement.reason
        request.placement.alternatives[:] = _alternatives(view.prefill, placement.prefill)
        request.placement.route_s = time.monotonic() - arrived
        return placement

    async def _forward(
        self, request: generation_pb2.GenerateRequest, placement: Placement, write: Write, deadline: float
    ) -> generation_pb2.Usage:
        """Streams the decode server's tokens to the client and returns its usage; cancelling this cancels the call to it."""
        used = [self._backends.get("decode", placement.decode)]
        if placement.prefill is not None:
            used.append(self._backends.get("prefill", placement.prefill))
        stub: Any = generation_pb2_grpc.GenerationStub(used[0].channel)
        call = stub.Generate(request, timeout=max(0.0, deadline - time.monotonic() - self._margin_s))
        for backend in used:
            backend.forwarded += 1
        usage: generation_pb2.Usage | None = None
        try:
            async for event in call:  # to its end: cancelled behind the usage, it would count as failed there
                if event.WhichOneof("event") == "usage":
                    usage = event.usage
                else:
                    await write(event)
            if usage is None:
                raise InvalidRun(f"decode server {placement.decode} ended the stream without usage")
            return usage
        finally:
            call.cancel()
            for backend in used:
                backend.forwarded -= 1

    def _check(self, placement: Placement, alternatives: Sequence[str], usage: generation_pb2.Usage) -> None:
        """Refuses an account that is not what was decided: a fallback is said, never silent, and so is another server that went on."""
        decided = ("remote", placement.prefill) if placement.prefill is not None else ("local", "")
        done = (usage.placement, usage.prefill_address)
        resumed = usage.resumes and usage.placement == "remote" and usage.prefill_address in alternatives
        if not usage.fallbacks and not resumed and done != decided:
            raise InvalidRun(f"INVALID: the router decided {decided}, the usage says {done} and no fallback")


def _alternatives(prefill: Servers, chosen: str | None) -> list[str]:
    """Who may go on when the chosen prefill server fails: the other healthy ones, least busy first."""
    if chosen is None:
        return []
    rows = [row for row in prefill.queue.argsort(kind="stable") if prefill.healthy[row] and prefill.names[row] != chosen]
    return [prefill.names[row] for row in rows[:_MAX_ALTERNATIVES]]


def _addresses(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())

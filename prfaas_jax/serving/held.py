"""Requests that outlive their streams: a caller whose connection broke, or whose router was restarted, comes back and misses nothing."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.serving.generation import Write
from prfaas_jax.serving.proto import generation_pb2

# Runs a generation, its events through the `Write` that it is given, and returns its usage.
Run = Callable[[Write], Awaitable[generation_pb2.Usage]]


class UnknownRequest(PrfaasError):
    """A request that a caller wants to come back to is not held here, or not any more; maps to NOT_FOUND."""


class RequestCancelled(PrfaasError):
    """Somebody has ended the request by its id; maps to CANCELLED, with metadata that says so."""


class CutShort(PrfaasError):
    """The server ends before the request has; maps to CANCELLED."""


class TakenOver(PrfaasError):
    """Another call has come for the same request; this one gets nothing more. Maps to ABORTED."""


class _Held:
    """One request: what it has said so far, and its end."""

    def __init__(self, whose: tuple[str, bytes], placement: generation_pb2.Placement) -> None:
        self.whose = whose
        self.placement = placement
        self.told = False
        self.by_id = False  # cancelled by somebody who named it
        self.said: list[generation_pb2.GenerateEvent] = []
        self.changed = asyncio.Event()
        self.readers = 0  # calls that have come for it so far
        self.task: asyncio.Task[generation_pb2.Usage] | None = None
        self.timer: asyncio.TimerHandle | None = None

    async def emit(self, event: generation_pb2.GenerateEvent) -> None:
        """Never waits for a reader: a request says no more than its new tokens."""
        self.said.append(event)
        self.changed.set()


class HeldRequests:
    """Requests by id, each run once, however many calls come for it, one after the other. On one event loop only.

    A request without a reader for `keep_s` seconds is cancelled, and one that is over is remembered for as long.
    """

    def __init__(self, keep_s: float):
        self._keep_s = keep_s
        self._all: dict[str, _Held] = {}
        self._cancelled: dict[str, float] = {}  # id -> monotonic second until which who comes back to it is told so

    def __len__(self) -> int:
        return len(self._all)

    async def attend(self, request: generation_pb2.GenerateRequest, write: Write, run: Run) -> generation_pb2.Usage:
        """Runs the request, or finds the run that there is, and writes what it says from the caller's `events_received` on.

        With `held_by` it is only found, and where it was placed is written first. Returns its usage, unsent; raises UnknownRequest,
        TakenOver, RequestCancelled, CutShort, or what the run raised.
        """
        if request.want_logits:
            raise InvalidInput("want_logits", True, "false for a request with an id: logits are not kept for a caller to come back to")
        held, whose = self._all.get(request.request_id), (request.tenant, _digest(request))
        if held is None:
            returns = bool(request.held_by or request.events_received or request.placement.again)
            if returns and self._cancelled.get(request.request_id, 0.0) > time.monotonic():
                raise RequestCancelled(f"request {request.request_id} was cancelled")
            if request.held_by:
                raise UnknownRequest(f"request {request.request_id} is not held here, or not any more")
            held = self._all[request.request_id] = _Held(whose, request.placement)
            held.task = asyncio.create_task(self._run(held, run))
        if held.whose != whose:
            raise InvalidInput("request_id", request.request_id, "an id of its own: another request has it")
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None
        held.readers += 1
        turn, at = held.readers, request.events_received
        held.changed.set()  # whoever read before sees that it is over for him
        try:
            if request.held_by:
                await write(generation_pb2.GenerateEvent(placed=_placed(held.placement)))
            while True:
                held.changed.clear()
                for event in held.said[at:]:
                    await write(event)
                    at += 1
                    if held.readers != turn:
                        raise TakenOver(f"another call has come for request {request.request_id}")
                assert held.task is not None
                if held.task.done() and at >= len(held.said):
                    if held.task.cancelled():
                        if held.by_id:
                            raise RequestCancelled(f"request {request.request_id} was cancelled")
                        raise CutShort("the server has ended")
                    return held.task.result()
                await held.changed.wait()
                if held.readers != turn:
                    raise TakenOver(f"another call has come for request {request.request_id}")
        finally:
            failed = held.task is not None and held.task.done() and (held.task.cancelled() or held.task.exception() is not None)
            if self._all.get(request.request_id) is not held:
                pass  # ended by its id: whoever has that id now is another one
            elif failed:
                self._drop(request.request_id)  # whoever asks again asks for another try
            elif held.readers == turn:
                held.timer = asyncio.get_running_loop().call_later(self._keep_s, self._drop, request.request_id)

    def first_told(self, request_id: str) -> bool:
        """Whether the usage of a request that is over is told for the first time, by whoever asks."""
        held = self._all.get(request_id)
        if held is None:
            return True
        first, held.told = not held.told, True
        return first

    def cancel(self, request_id: str) -> None:
        """Ends a request at once. Whoever comes back to it, also from another server, hears of that for as long as requests are kept."""
        now = time.monotonic()
        # By age: whoever is new comes last.
        while self._cancelled and (oldest := next(iter(self._cancelled.items())))[1] <= now:
            del self._cancelled[oldest[0]]
        self._cancelled.pop(request_id, None)
        self._cancelled[request_id] = now + self._keep_s
        if (held := self._all.get(request_id)) is not None:
            held.by_id = True
        self._drop(request_id)

    async def close(self) -> None:
        """Ends all of them."""
        tasks = [held.task for held in self._all.values() if held.task is not None]
        for request_id in list(self._all):
            self._drop(request_id)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, held: _Held, run: Run) -> generation_pb2.Usage:
        try:
            return await run(held.emit)
        finally:
            # Once the task is done, which it is not before this returns.
            asyncio.get_running_loop().call_soon(held.changed.set)

    def _drop(self, request_id: str) -> None:
        held = self._all.pop(request_id, None)
        if held is None:
            return
        if held.timer is not None:
            held.timer.cancel()
        assert held.task is not None
        held.task.cancel()
        # Nobody may ever ask for the result of a request that failed while nobody read.
        held.task.add_done_callback(lambda task: task.cancelled() or task.exception())


def _placed(placement: generation_pb2.Placement) -> generation_pb2.Placed:
    """What a router that has not placed it itself cannot know."""
    return generation_pb2.Placed(prefill_cluster=placement.prefill_cluster if placement.prefill_address else "", reason=placement.reason)


def _digest(request: generation_pb2.GenerateRequest) -> bytes:
    """Of what makes it this request and no other: prompt and sampling, not where it is placed or what its caller has."""
    mine = generation_pb2.GenerateRequest(
        token_ids=request.token_ids, sampling=request.sampling, max_new_tokens=request.max_new_tokens, stop_strings=request.stop_strings
    )
    if request.WhichOneof("prompt") == "text":
        mine.text = request.text
    elif request.WhichOneof("prompt") == "chat":
        mine.chat.CopyFrom(request.chat)
    return hashlib.sha256(mine.SerializeToString(deterministic=True)).digest()

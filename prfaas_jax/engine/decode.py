"""The decode engine: continuous batching over a paged cache, fed by received KV or by its own prefill.

A request lives in one of these phases, and in no batch before it is running:

    waiting -> reserved -> (prefilling | receiving) -> ready -> running -> gone
"""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Literal

import numpy as np

from prfaas_jax.engine.api import (
    Admitted,
    Committed,
    EngineStatus,
    Failed,
    Finished,
    Job,
    PrefillDone,
    PrefillProgress,
    Sink,
    Token,
    check_job,
    check_transfer,
)
from prfaas_jax.engine.plan import DecodeInput, plan_decode
from prfaas_jax.engine.prefill import DispatchedStep, Pace, Prompt, dispatch_prefill, new_pages, read_token
from prfaas_jax.engine.received import Received
from prfaas_jax.engine.runner import Runner
from prfaas_jax.engine.thread import EngineThread
from prfaas_jax.errors import Exhausted, InvalidInput, PrfaasError
from prfaas_jax.kvcache.pages import Reservation, SlotAllocator
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.scheduling.batching import decode_bucket

Phase = Literal["waiting", "reserved", "prefilling", "receiving", "ready", "running"]


@dataclasses.dataclass
class Request:
    """One request in the decode engine; `length` tokens are in the cache and `token` is the next to compute, in decode row `row`."""

    job: Job
    sink: Sink
    arrival: int
    phase: Phase = "waiting"
    reservation: Reservation | None = None
    first: Token | None = None
    ready_at: float = 0.0
    row: int = -1
    length: int = 0
    token: int = 0
    generated: int = 0

    @property
    def held(self) -> Reservation:
        """The reservation of a request past "waiting"."""
        assert self.reservation is not None
        return self.reservation


class DecodeWorker(EngineThread):
    """`DecodeEngine` over a Runner; see engine/api.py for the protocol."""

    def __init__(self, runner: Runner):
        super().__init__("decode-engine")
        self.spec, self.fingerprint, self.codecs = runner.spec, runner.fingerprint, runner.options.codec_names
        self.codec_rates = runner.codec_rates
        self._runner = runner
        self._options = runner.options
        self._requests: dict[str, Request] = {}
        self._waiting: collections.deque[Request] = collections.deque()
        self._ready: collections.deque[Request] = collections.deque()
        self._prompts: dict[str, Prompt] = {}
        self._pending_prefill: DispatchedStep | None = None
        self._running: dict[str, Request] = {}
        self._received = Received(runner)
        self._lock = threading.Lock()  # guards what reserve changes from other threads
        self._queued = 0
        self._arrivals = 0
        self._steps = 0
        self._local_prefills = 0
        self._prefilled = 0
        self._decoded = 0
        self._pace = Pace()
        self._new_allocators()

    def _new_allocators(self) -> None:
        self._pages = new_pages(self._runner)
        self._rows = SlotAllocator(max(self._runner.decode_buckets), self._runner.shards)

    # --- the edge ------------------------------------------------------------------------------------------------------------

    def reserve(self, job: Job, sink: Sink) -> None:
        """See DecodeEngine.reserve."""
        check_job(job, self._runner.config.vocab_size, min(self._options.max_length, self._pages.max_tokens))
        check_transfer(job, self.spec, self.codecs)
        with self._lock:
            if self._queued >= self._options.max_queue:
                raise Exhausted(f"decode queue is full: {self._queued} requests wait (max_queue={self._options.max_queue})")
            self._queued += 1
            self._arrivals += 1
            request = Request(job, sink, self._arrivals)
        self._post(functools.partial(self._enqueue, request))

    def prefill_local(self, ticket: str) -> None:
        """See DecodeEngine.prefill_local."""
        self._post(functools.partial(self._start_prefill, ticket))

    def ingest(self, ticket: str, key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
        """See DecodeEngine.ingest. Raises InvalidInput for a block that belongs in no cache here."""
        if request := self._requests.get(ticket):  # gone meanwhile: nobody reads the block
            self._received.check(key, block, request.job.codec, self._options.max_length)
        self._post(functools.partial(self._queue_block, ticket, key, block, done))

    def commit(self, ticket: str, first: Token) -> None:
        """See DecodeEngine.commit."""
        self._post(functools.partial(self._commit, ticket, first, time.monotonic()))

    def abort(self, ticket: str, reason: str = "cancelled") -> None:
        """See DecodeEngine.abort."""
        self._post_unless_closed(functools.partial(self._end, ticket, Finished(reason)))

    def status(self) -> EngineStatus:
        """See DecodeEngine.status."""
        self._check_alive()
        return EngineStatus(
            running=len(self._running),
            waiting=self._queued,
            pages_free=self._pages.pages_free,
            pages_total=self._pages.pages_total,
            compiles_after_warmup=self._runner.compiles_after_warmup(),
            local_prefills=self._local_prefills,
            tokens_prefilled=self._prefilled,
            tokens_decoded=self._decoded,
            state_slots_free=self._pages.states.free,
            state_slots_total=self._pages.states.total,
            instances=(self._pace.load(list(self._prompts.values())),),
            decode_slots=self._options.max_rows,
            decode_waiting=len(self._ready),
        )

    # --- commands, on the engine thread --------------------------------------------------------------------------------------

    def _enqueue(self, request: Request) -> None:
        ticket = request.job.ticket
        if ticket in self._requests:
            with self._lock:
                self._queued -= 1
            request.sink(Failed(InvalidInput("ticket", ticket, "a ticket that is not in use")))
            return
        self._requests[ticket] = request
        self._waiting.append(request)

    def _in_phase(self, ticket: str, *phases: Phase) -> Request | None:
        """The request if it is in one of `phases`; None if it is gone; any other phase is the caller's error and ends it."""
        request = self._requests.get(ticket)
        if request is not None and request.phase not in phases:
            self._end(ticket, Failed(InvalidInput("phase", request.phase, f"one of {phases}")))
            return None
        return request

    def _start_prefill(self, ticket: str) -> None:
        if request := self._in_phase(ticket, "reserved"):
            request.phase = "prefilling"
            self._prompts[ticket] = Prompt(request.job, request.sink, request.arrival, time.monotonic(), request.reservation)
            self._local_prefills += 1

    def _queue_block(self, ticket: str, key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
        request = self._in_phase(ticket, "reserved", "receiving")
        if request is None:
            done()
            return
        try:
            key.check(self.spec, len(request.job.prompt))
        except InvalidInput as error:
            self._end(ticket, Failed(error))
            done()
            return
        request.phase = "receiving"
        self._received.push(request.held, key, block, request.job.codec, done)

    def _commit(self, ticket: str, first: Token, at: float) -> None:
        if request := self._in_phase(ticket, "reserved", "receiving"):
            request.first, request.ready_at = first, at
            if not self._received.pending(ticket):
                self._make_ready(request)

    def _make_ready(self, request: Request) -> None:
        request.phase = "ready"
        self._ready.append(request)

    def _end(self, ticket: str, outcome: Finished | Failed) -> None:
        """Drops a request in any phase. Its pages and slot may be handed out at once: what is dispatched later runs later."""
        request = self._requests.pop(ticket, None)
        if request is None:
            return
        match request.phase:
            case "waiting":
                self._waiting.remove(request)
                with self._lock:
                    self._queued -= 1
            case "prefilling":
                del self._prompts[ticket]
            case "receiving":
                self._received.drop(ticket)
            case "ready":
                self._ready.remove(request)
            case "running":
                del self._running[ticket]
                self._rows.free(ticket)
        if request.reservation is not None:
            self._pages.free(ticket)
        request.sink(outcome)

    # --- one round -----------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        self._admit()
        self._received.release(wait=False)
        self._ingest()
        self._prefill()
        self._publish()
        self._decode()
        self._admit()  # what ended in this round may have been all that was running: nothing else would wake those who wait
        idle = not (self._running or self._prompts or self._pending_prefill or self._received.waiting or self._ready)
        if idle:
            self._received.release(wait=True)
        return not idle

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            total = len(request.job.prompt) + request.job.sampling.max_new_tokens
            try:
                request.reservation = self._pages.reserve(request.job.ticket, total)
            except Exhausted:
                return  # first come, first served
            self._waiting.popleft()
            with self._lock:
                self._queued -= 1
            request.phase = "reserved"
            request.sink(Admitted())

    def _ingest(self) -> None:
        """Scatters received blocks; while others decode, no more per round than the budget."""
        for ticket in self._received.scatter(self._options.ingest_bytes_per_step if self._running else None):
            request = self._requests[ticket]
            if request.first is not None:
                self._make_ready(request)

    def _prefill(self) -> None:
        """One chunk step of local prefill, if any; running rows decode in between."""
        previous, self._pending_prefill = self._pending_prefill, None
        open_prompts = {t: p for t, p in self._prompts.items() if p.done < len(p.job.prompt)}
        if open_prompts:
            self._pending_prefill = dispatch_prefill(self._runner, open_prompts, self._steps, export=False)
            self._steps += 1
        if previous is None:
            return
        np.asarray(previous.drawn.token)  # at most one step ahead, so that an abort takes effect within one chunk
        self._pace.step(sum(row.valid for _, row in previous.rows), self._pending_prefill is not None)
        for prompt, row in previous.rows:
            ticket, stop = prompt.job.ticket, row.start + row.valid
            if self._prompts.get(ticket) is not prompt:
                continue  # ended meanwhile
            self._prefilled += row.valid
            prompt.sink(PrefillProgress(stop))
            if stop == len(prompt.job.prompt):
                del self._prompts[ticket]
                request = self._requests[ticket]
                request.first = read_token(previous.drawn, row.row, prompt.job.sampling.return_logits)
                request.ready_at = time.monotonic()
                prompt.sink(PrefillDone(request.first, prompt.started - prompt.submitted, request.ready_at - prompt.started))
                self._make_ready(request)

    def _publish(self) -> None:
        """Gives ready requests a decode row; their block-table rows are in every plan from now on."""
        for request in list(self._ready):
            ticket = request.job.ticket
            try:
                request.row = self._rows.reserve(ticket, request.held.shard)
            except Exhausted:
                continue  # this shard's rows are taken; another shard may have one
            self._ready.remove(request)
            request.phase = "running"
            request.length = len(request.job.prompt)
            self._running[ticket] = request
            assert request.first is not None
            request.sink(Committed(time.monotonic() - request.ready_at))
            self._emit(request, request.first)

    def _emit(self, request: Request, token: Token) -> None:
        request.token = token.token
        request.generated += 1
        request.sink(token)
        sampling = request.job.sampling
        if token.token in sampling.stop_token_ids:
            self._end(request.job.ticket, Finished("stop"))
        elif request.generated == sampling.max_new_tokens:
            self._end(request.job.ticket, Finished("length"))

    def _decode(self) -> None:
        if not self._running:
            return
        requests = list(self._running.values())
        rows = decode_bucket(self._rows.rows_needed(), self._runner.decode_buckets)
        inputs = [
            DecodeInput(self._rows.bucket_row(r.row, rows), r.token, r.length, r.held.pages, r.job.sampling, r.held.slot) for r in requests
        ]
        drawn = self._runner.decode(plan_decode(inputs, rows, self._runner.geometry.width))
        tokens, logprobs = np.asarray(drawn.token), np.asarray(drawn.logprob)
        logits = np.asarray(drawn.logits) if any(r.job.sampling.return_logits for r in requests) else None
        self._decoded += len(requests)
        for request, i in zip(requests, inputs, strict=True):
            request.length += 1
            wanted = logits is not None and request.job.sampling.return_logits
            self._emit(request, Token(int(tokens[i.row]), float(logprobs[i.row]), logits[i.row] if logits is not None and wanted else None))

    def _fail_all(self, error: PrfaasError) -> None:
        outstanding = list(self._requests.values())
        with self._lock:
            self._queued -= len(self._waiting)  # others are still in the inbox
        for container in (self._requests, self._waiting, self._ready, self._prompts, self._running):
            container.clear()
        self._pending_prefill = None
        self._new_allocators()
        for request in outstanding:
            request.sink(Failed(error))
        self._received.clear()

    def _reset(self) -> None:
        self._runner.reset_pools()

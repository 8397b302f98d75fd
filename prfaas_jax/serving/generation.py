"""One Generate call from arrival to usage: reserve, prefill somewhere, commit, stream."""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

import grpc
from absl import logging

from prfaas_jax.engine import api
from prfaas_jax.errors import EngineFailed, TransferError
from prfaas_jax.kvcache.codecs import AS_CACHED, CacheCodec
from prfaas_jax.serving import messages
from prfaas_jax.serving.codec_policy import AUTO, CodecPolicy, Travel
from prfaas_jax.serving.events import EventQueue
from prfaas_jax.serving.peers import PrefillPeers, link_to_proto
from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.serving.remote_prefill import RemotePrefill, RemotePrefillFailed, RemoteResult
from prfaas_jax.serving.text import TextCodec, TextStream, encode_prompt
from prfaas_jax.serving.usage import InvalidRun, Marks, progress_spans, span, ttft_parts
from prfaas_jax.transfer.counters import Counters

Write = Callable[[generation_pb2.GenerateEvent], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Site:
    """What all requests of a decode server share; see DecodeServerOptions for the fields named alike."""

    engine: api.DecodeEngine
    tokenizer: TextCodec | None
    eos_ids: tuple[int, ...]
    peers: PrefillPeers
    executor: Executor
    idle_s: float
    max_staging_bytes: int
    max_unread_bytes: int
    codecs: CodecPolicy
    accepted: Callable[[str], None]
    site: str


@dataclasses.dataclass
class Progress:
    """How far a request has come, for the error that ends it early."""

    phase: str = "input"


def _weigh(event: api.Event) -> int:
    return event.logits.nbytes if isinstance(event, api.Token) and event.logits is not None else 0


class Generation:
    """A request's life; `progress` is kept up to date for whoever cuts it short."""

    def __init__(
        self, site: Site, request: generation_pb2.GenerateRequest, arrived: float, deadline: float, write: Write, progress: Progress
    ):
        """`arrived` and `deadline` are monotonic seconds."""
        self._site, self._request, self._deadline, self._write = site, request, deadline, write
        self._progress = progress
        self.marks = Marks(arrived)
        self.fallback: RemotePrefillFailed | None = None
        self._job: api.Job | None = None
        self._events: EventQueue[api.Event] = EventQueue(site.max_unread_bytes, _weigh)
        self._over = False
        self._attempt: RemotePrefill | None = None
        self._remote: RemoteResult | None = None
        self._resumes, self._recomputed_there = 0, 0
        self._failures: list[generation_pb2.Failure] = []
        self._held_tokens = 0
        self._travel = Travel(AS_CACHED, False, "nothing travels")
        self._counters = Counters()
        self._computed_here: list[tuple[int, float]] = []
        self._local: api.PrefillDone | None = None
        self._itl: list[float] = []
        self._spans: list[generation_pb2.Span] = []
        self._finish_reason = ""

    async def run(self) -> generation_pb2.Usage:
        """Streams tokens through `write` and returns the usage, unsent. However it ends, nothing stays behind in the engine.

        Raises InvalidInput, Exhausted, EngineFailed, RemotePrefillFailed (when no fallback is allowed) or InvalidRun.
        """
        request = self._request
        # Not on the event loop: a long text takes a while, and other requests' tokens are waiting.
        prompt = await asyncio.get_running_loop().run_in_executor(self._site.executor, encode_prompt, request, self._site.tokenizer)
        sampling = messages.sampling_from_proto(request.sampling, request.max_new_tokens, request.want_logits)
        if not request.ignore_eos:
            sampling = dataclasses.replace(sampling, stop_token_ids=sampling.stop_token_ids + self._site.eos_ids)
        text = TextStream(self._site.tokenizer, tuple(request.stop_strings))
        try:
            await self._choose_codec()
            with self._expecting(prompt):
                await self._reserve(prompt, sampling, self._travel.codec)
                self.marks.reserved = time.monotonic()
                if request.placement.prefill_address:
                    await self._prefill_remotely()
            if self.fallback is not None:
                # Blocks of the failed attempt may still be queued for its ticket's pages: a fresh reservation cannot meet them.
                self._abort()
                await self._reserve(prompt, sampling)
            if self._remote is None:
                await self._prefill_locally()
            await self._decode(text)
            return self._usage()
        finally:
            self._abort()

    # --- phases --------------------------------------------------------------------------------------------------------------

    async def _choose_codec(self) -> None:
        """How the cache of a remote prefill is to travel: before pages are reserved, as the engine must know what comes."""
        address, site = self._request.placement.prefill_address, self._site
        if not address:
            return
        theirs = await site.peers.codecs(address) if site.codecs.wanted == AUTO else ()
        self._travel = site.codecs.decide(site.engine.spec, site.engine.codecs, theirs, site.peers.link(address), site.engine.codec_rates)

    def _expecting(self, prompt: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
        """Whoever looks at the links knows of what is to come, from when the request is counted as accepted."""
        address = self._request.placement.prefill_address
        if not address:
            return contextlib.nullcontext()
        whole = self._travel.codec.wire_spec(self._site.engine.spec).bytes(len(prompt))
        return self._site.peers.expecting(lambda: self._attempt.coming if self._attempt is not None else (address, whole))

    async def _reserve(self, prompt: tuple[int, ...], sampling: api.SamplingParams, codec: CacheCodec = AS_CACHED) -> None:
        """A fresh ticket with pages of its own."""
        self._progress.phase = "queue"
        self._events = EventQueue(self._site.max_unread_bytes, _weigh)
        job = api.Job(uuid.uuid4().hex, prompt, sampling, codec)
        self._site.engine.reserve(job, self._events.push)
        self._site.accepted(self._request.placement.account)
        self._job, self._over = job, False
        event, _ = await self._next()
        if not isinstance(event, api.Admitted):
            raise EngineFailed(f"the engine said {type(event).__name__} where Admitted was due")
        self._held_tokens = event.held_tokens

    async def _prefill_remotely(self) -> None:
        """Leaves the result in `_remote`; when that fails and a fallback is allowed, the failure in `fallback` instead."""
        self._progress.phase = "remote prefill"
        job = self._reserved()
        self._attempt = attempt = RemotePrefill(
            self._site.engine,
            job,
            (self._request.placement.prefill_address, *self._request.placement.alternatives),
            self._site.peers,
            self._site.executor,
            deadline=self._deadline,
            idle_s=self._site.idle_s,
            max_staging_bytes=self._site.max_staging_bytes,
            prefix=self._held_tokens,
            compressed=self._travel.compressed,
            site=self._site.site,
            account=self._request.placement.account,
        )
        try:
            self._remote = result = await self._watched(attempt)
        except RemotePrefillFailed as failure:
            self._failures = _failures(attempt)
            if not self._request.allow_fallback or failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            logging.warning("falling back to a local prefill: %s", failure)
            self.fallback = failure
            self.marks.remote_failed = time.monotonic()
            self._spans += span("failed remote prefill", self.marks, attempt.timeline.started, self.marks.remote_failed)
            return
        self._resumes, self._recomputed_there, self._failures = attempt.resumes, attempt.recomputed, _failures(attempt)
        timeline = result.timeline
        assert timeline.verified is not None
        self.marks.prefilled = timeline.verified
        self._counters = result.counters
        self._spans += result.site.spans(self.marks.arrived, len(job.prompt), result.queue_s, result.prefill_s)
        self._spans += span("transfer", self.marks, timeline.first_block, timeline.last_block)
        self._progress.phase = "admit"
        self._site.engine.commit(job.ticket, result.first)

    async def _watched(self, attempt: RemotePrefill) -> RemoteResult:
        """Runs the attempt while listening to the engine: a request that the engine gives up is not worth waiting for."""
        running = asyncio.create_task(attempt.run())
        try:
            while True:
                event = asyncio.create_task(self._next())
                try:
                    await asyncio.wait({running, event}, return_when=asyncio.FIRST_COMPLETED)
                    if not event.done():
                        return await running
                    self._note(*event.result())
                finally:
                    event.cancel()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _prefill_locally(self) -> None:
        self._progress.phase = "local prefill"
        begun = at = time.monotonic()
        self._site.engine.prefill_local(self._reserved().ticket)
        while self._local is None:
            event, at = await self._next()
            self._note(event, at)
        self.marks.prefilled = at
        self._spans += progress_spans(self.marks, begun, self._computed_here)
        self._progress.phase = "admit"

    async def _decode(self, text: TextStream) -> None:
        """From commit to the last token."""
        stopped = False
        while not self._over:
            event, at = await self._next()
            match event:
                case api.Committed():
                    self.marks.committed = at
                    self._progress.phase = "decode"
                    self._check_counters()
                case api.Token() if not stopped:
                    piece, stopped = text.add(event.token)
                    await self._send(generation_pb2.TokenOut(token=messages.token_to_proto(event), text=piece))
                    if stopped:
                        self._site.engine.abort(self._reserved().ticket, "stop")
                case api.Finished(reason):
                    self._finish_reason = "stop" if stopped else reason
                case _:
                    self._note(event, at)
        self._check_counters()
        if not stopped:
            tail, stopped = text.finish()
            self._finish_reason = "stop" if stopped else self._finish_reason
            if tail:
                await self._write(generation_pb2.GenerateEvent(token=generation_pb2.TokenOut(text=tail)))

    # --- steps of the phases ---------------------------------------------------------------------------------------------------

    async def _next(self) -> tuple[api.Event, float]:
        """The engine's next word on this request; raises what it failed with, or when it ended before its time."""
        event, at = await self._events.get()
        match event:
            case api.Failed(error):
                self._over = True
                raise error
            case api.Finished(reason):
                self._over = True
                if reason == "cancelled" or self._progress.phase != "decode":
                    raise EngineFailed(f"the engine gave the request up during {self._progress.phase}")
        return event, at

    def _note(self, event: api.Event, at: float) -> None:
        """Word of a prefill in this engine: expected when local, and the mark of a silent re-prefill when not."""
        match event:
            case api.PrefillProgress(tokens):
                self._computed_here.append((tokens, at))
            case api.PrefillDone():
                self._local = event
                self._computed_here.append((len(self._reserved().prompt), at))
            case api.Token() | api.Committed():
                pass  # tokens after a stop string, which the engine drew before it heard of it

    def _check_counters(self) -> None:
        """Every byte came from the other side and no token was computed here, or the run is invalid."""
        if self._remote is None:
            return
        recomputed = max((tokens for tokens, _ in self._computed_here), default=0)
        self._counters = dataclasses.replace(self._counters, recomputed_tokens=recomputed)
        try:
            self._counters.check(self._site.engine.spec, len(self._reserved().prompt))
        except TransferError as error:
            raise InvalidRun(f"INVALID: {error}") from error

    async def _send(self, token: generation_pb2.TokenOut) -> None:
        now = time.monotonic()
        if self.marks.first:
            self._itl.append(now - self.marks.last)
        else:
            self.marks.first = now
            address = self._remote.address if self._remote is not None else ""
            account = self._request.placement.account
            token.prefilled.CopyFrom(generation_pb2.Prefilled(prefill_address=address, failures=self._failures, account=account))
        self.marks.last = now
        await self._write(generation_pb2.GenerateEvent(token=token))

    def _reserved(self) -> api.Job:
        assert self._job is not None
        return self._job

    def _abort(self) -> None:
        if self._job is not None and not self._over:
            self._site.engine.abort(self._job.ticket)
            self._over = True

    # --- the account -----------------------------------------------------------------------------------------------------------

    def _usage(self) -> generation_pb2.Usage:
        marks, placement = self.marks, self._request.placement
        prompt_tokens = len(self._reserved().prompt)
        remote, local = self._remote, self._local
        if remote is not None:
            queue_s, prefill_s = remote.queue_s, remote.prefill_s
        else:
            assert local is not None
            queue_s, prefill_s = local.queue_s, local.compute_s
        parts = ttft_parts(marks, placement.route_s, remote is not None, queue_s, prefill_s)
        spans = [*span("queue", marks, marks.arrived, marks.reserved), *self._spans]
        spans += span("admit", marks, marks.prefilled, marks.committed)
        spans += span("first step", marks, marks.committed, marks.first)
        spans += span("tokens", marks, marks.first, marks.last)
        why = f"fallback: {self.fallback}" if self.fallback else ""
        return generation_pb2.Usage(
            placement="local" if remote is None else "remote",
            prefill_address="" if remote is None else remote.address,
            reason=why or placement.reason or "no placement was asked for",
            prompt_tokens=prompt_tokens,
            output_tokens=len(self._itl) + 1,
            finish_reason=self._finish_reason,
            fallbacks=1 if self.fallback else 0,
            fallback_reason=str(self.fallback or ""),
            kv_bytes_moved=self._counters.moved,
            kv_bytes_skipped=self._counters.skipped,
            kv_bytes_resent=self._counters.resent,
            kv_bytes_expected=0 if remote is None else self._site.engine.spec.bytes(prompt_tokens),
            tokens_recomputed=self.fallback.tokens if self.fallback else self._counters.recomputed_tokens + self._recomputed_there,
            resumes=self._resumes,
            failures=self._failures,
            events_before=self._request.events_received,
            account=placement.account,
            prefill_cluster=placement.prefill_cluster if remote is not None else placement.decode_cluster,
            decode_cluster=placement.decode_cluster,
            kv_bytes_wire=self._counters.wire,
            codec=self._travel.name if remote else "",
            exposed_bound_s=(remote.exposed_bound_s or 0.0) if remote else 0.0,
            link=link_to_proto(remote.address, remote.link) if remote else None,
            parts=parts,
            ttft_s=placement.route_s + marks.first - marks.arrived,
            itl_s=self._itl,
            spans=spans,
            clock_error_s=remote.site.clock.error_s if remote and remote.site.clock else 0.0,
        )


def _failures(attempt: RemotePrefill) -> list[generation_pb2.Failure]:
    return [generation_pb2.Failure(address=f.address, phase=f.phase, code=f.code.name) for f in attempt.failures]

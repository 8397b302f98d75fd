"""A DecodeEngine without a model: the other half of the profiled prefill engine, whose every byte it checks."""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from prfaas_jax.engine import api
from prfaas_jax.engine.thread import EngineThread
from prfaas_jax.errors import Exhausted, InvalidInput, PrfaasError, TransferError
from prfaas_jax.kvcache.codecs import CODEC_NAMES
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.testing.profiled import digest_block, digest_token, prompt_digest
from prfaas_jax.transfer.coverage import Coverage


@dataclasses.dataclass(frozen=True)
class FakeDecodeOptions:
    """Sizes and times of a fake decode engine; times are real seconds that its thread sleeps.

    `seed` is the profiled engine's. `held_tokens` is the length of a prefix whose cache it says to hold of every prompt that has one.
    """

    vocab_size: int
    max_length: int = 4096
    page_size: int = 16
    pages: int = 1024
    max_queue: int = 64
    chunk: int = 64
    prefill_s_per_token: float = 0.0
    step_s: float = 0.0
    seed: int = 0
    held_tokens: int = 0


def next_token(ids: Sequence[int], vocab_size: int, with_logits: bool = False) -> api.Token:
    """The token that follows `ids`: after a whole prompt, the one that the profiled prefill engine draws."""
    return digest_token(prompt_digest(ids), vocab_size, with_logits)


@dataclasses.dataclass
class _Request:
    job: api.Job
    sink: api.Sink
    pages: int
    coverage: Coverage
    held: int
    phase: str = "waiting"
    prefilled: int = 0
    begun: float = 0.0
    asked: float = 0.0
    first: api.Token | None = None
    ready_at: float = 0.0
    digest: int = 0  # of the prompt, then of all ids so far
    count: int = 0


class FakeDecodeEngine(EngineThread):
    """Implements DecodeEngine; a wrong, missing or repeated byte fails the request with TransferError."""

    def __init__(self, spec: CacheSpec, fingerprint: str, options: FakeDecodeOptions):
        super().__init__("fake-decode")
        self.spec, self.fingerprint, self.codecs = spec, fingerprint, CODEC_NAMES
        self.codec_rates: dict[str, tuple[float, float]] = dict.fromkeys(CODEC_NAMES, (1e9, 1e9))
        self._options = options
        self._lock = threading.Lock()
        self._queued = 0
        self._pages_free = options.pages
        self._local_prefills = self._prefilled = self._decoded = 0
        self._requests: dict[str, _Request] = {}
        self._waiting: collections.deque[_Request] = collections.deque()

    # --- the edge ------------------------------------------------------------------------------------------------------------

    def reserve(self, job: api.Job, sink: api.Sink) -> None:
        """See DecodeEngine.reserve."""
        options = self._options
        api.check_job(job, options.vocab_size, min(options.max_length, options.pages * options.page_size))
        with self._lock:
            if self._queued >= options.max_queue:
                raise Exhausted(f"decode queue is full: {self._queued} requests wait (max_queue={options.max_queue})")
            self._queued += 1
        pages = -(-(len(job.prompt) + job.sampling.max_new_tokens) // options.page_size)
        api.check_transfer(job, self.spec, self.codecs)
        held = min(options.held_tokens, len(job.prompt))
        request = _Request(job, sink, pages, self._held_coverage(len(job.prompt), held), held, digest=prompt_digest(job.prompt))
        self._post(functools.partial(self._enqueue, request))

    def _held_coverage(self, length: int, held: int) -> Coverage:
        """What of a prompt's cache is here before anything arrives."""
        coverage = Coverage(self.spec, length)
        for g, group in enumerate(self.spec.groups):
            tokens = group.cache.kept(length)[0], group.cache.kept(length, held)[0]
            if tokens[0] < tokens[1]:
                for t, tensor in enumerate(group.cache.tensors):
                    coverage.claim(SegmentKey(g, t, (0, len(group.layers)), tokens, (0, tensor.heads)))
        return coverage

    def prefill_local(self, ticket: str) -> None:
        """See DecodeEngine.prefill_local."""
        self._post(functools.partial(self._prefill_local, ticket))

    def ingest(self, ticket: str, key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
        """See DecodeEngine.ingest."""
        self._post(functools.partial(self._ingest, ticket, key, block, done))

    def commit(self, ticket: str, first: api.Token) -> None:
        """See DecodeEngine.commit."""
        self._post(functools.partial(self._commit, ticket, first))

    def abort(self, ticket: str, reason: str = "cancelled") -> None:
        """See DecodeEngine.abort."""
        self._post_unless_closed(functools.partial(self._end, ticket, api.Finished(reason)))

    def status(self) -> api.EngineStatus:
        """See DecodeEngine.status."""
        self._check_alive()
        phases = [r.phase for r in list(self._requests.values())]
        counts = (self._local_prefills, self._prefilled, self._decoded)
        # Whoever has pages decodes: there is no other limit.
        pages, load = self._options.pages, (api.InstanceLoad(0.0, phases.count("prefilling"), 0),)
        running = phases.count("running")
        return api.EngineStatus(running, self._queued, self._pages_free, pages, 0, *counts, instances=load, decode_slots=pages)

    # --- the engine thread ---------------------------------------------------------------------------------------------------

    def _enqueue(self, request: _Request) -> None:
        self._requests[request.job.ticket] = request
        self._waiting.append(request)

    def _prefill_local(self, ticket: str) -> None:
        if request := self._requests.get(ticket):
            assert request.phase == "reserved", request.phase
            request.phase, request.asked = "prefilling", time.monotonic()
            self._local_prefills += 1

    def _ingest(self, ticket: str, key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
        request = self._requests.get(ticket)
        if request is not None:
            assert request.phase == "reserved", request.phase
            try:
                self._check_block(request, key, block)
            except PrfaasError as error:
                self._end(ticket, api.Failed(error))
        done()

    def _check_block(self, request: _Request, key: SegmentKey, block: np.ndarray) -> None:
        """Raises unless the block is a whole-headed part of what the prompt leaves behind, has the right bytes, and is new."""
        prompt, spec = request.job.prompt, request.job.codec.wire_spec(self.spec)
        key.check(spec, len(prompt))
        heads = key.tensor_spec(self.spec).heads
        if key.heads != (0, heads):
            raise InvalidInput("segment.heads", key.heads, f"all {heads}")
        if not np.array_equal(block, digest_block(spec, key, request.digest, self._options.seed)):
            raise TransferError(f"wrong bytes in {key}")
        request.coverage.claim(key)

    def _commit(self, ticket: str, first: api.Token) -> None:
        if request := self._requests.get(ticket):
            if gap := request.coverage.gap():
                self._end(ticket, api.Failed(TransferError(f"committed without {gap}")))
                return
            request.phase, request.first, request.ready_at = "ready", first, time.monotonic()

    def _end(self, ticket: str, outcome: api.Finished | api.Failed) -> None:
        request = self._requests.pop(ticket, None)
        if request is None:
            return
        if request.phase == "waiting":
            self._waiting.remove(request)
            with self._lock:
                self._queued -= 1
        else:
            self._pages_free += request.pages
        request.sink(outcome)

    def _step(self) -> bool:
        while self._waiting and self._waiting[0].pages <= self._pages_free:
            request = self._waiting.popleft()
            with self._lock:
                self._queued -= 1
            self._pages_free -= request.pages
            request.phase = "reserved"
            request.sink(api.Admitted(request.held))
        active = [r for r in self._requests.values() if r.phase in ("prefilling", "ready", "running")]
        for request in active:
            getattr(self, f"_advance_{request.phase}")(request)
        if any(r.phase == "running" for r in active):
            time.sleep(self._options.step_s)
        return bool(active)

    def _advance_prefilling(self, request: _Request) -> None:
        prompt = request.job.prompt
        request.begun = request.begun or time.monotonic()
        count = min(self._options.chunk, len(prompt) - request.prefilled)
        time.sleep(count * self._options.prefill_s_per_token)
        request.prefilled += count
        self._prefilled += count
        request.sink(api.PrefillProgress(request.prefilled))
        if request.prefilled == len(prompt):
            request.first = self._next(request)
            request.phase, request.ready_at = "ready", time.monotonic()
            request.sink(api.PrefillDone(request.first, request.begun - request.asked, request.ready_at - request.begun))

    def _advance_ready(self, request: _Request) -> None:
        assert request.first is not None
        request.phase = "running"
        request.sink(api.Committed(time.monotonic() - request.ready_at))
        self._emit(request, request.first)

    def _advance_running(self, request: _Request) -> None:
        self._decoded += 1
        self._emit(request, self._next(request))

    def _next(self, request: _Request) -> api.Token:
        return digest_token(request.digest, self._options.vocab_size, request.job.sampling.return_logits)

    def _emit(self, request: _Request, token: api.Token) -> None:
        request.digest, request.count = prompt_digest((token.token,), request.digest), request.count + 1
        request.sink(token)
        sampling = request.job.sampling
        if token.token in sampling.stop_token_ids:
            self._end(request.job.ticket, api.Finished("stop"))
        elif request.count == sampling.max_new_tokens:
            self._end(request.job.ticket, api.Finished("length"))

    def _fail_all(self, error: PrfaasError) -> None:
        outstanding = list(self._requests.values())
        with self._lock:
            self._queued -= len(self._waiting)  # others are still in the inbox
        self._requests.clear()
        self._waiting.clear()
        self._pages_free = self._options.pages
        for request in outstanding:
            request.sink(api.Failed(error))

    def _reset(self) -> None:
        """Nothing here outlives a step."""

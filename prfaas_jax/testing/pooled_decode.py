"""A DecodeEngine of many instances: batches and their pace are the simulator's, tokens and received bytes are real and checked."""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from prfaas_jax.engine import api
from prfaas_jax.errors import Exhausted, InvalidInput, PrfaasError, TransferError
from prfaas_jax.kvcache.codecs import CODEC_NAMES
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.simulation.decode import DecodeInstance, DecodeTask
from prfaas_jax.simulation.pools import DecodePool, PrefillPool
from prfaas_jax.simulation.prefill import PrefillTask
from prfaas_jax.testing.live_tokens import LiveTokens
from prfaas_jax.testing.pooled import Played, PooledEngine, PooledRequest, loads
from prfaas_jax.testing.profiled import digest_block, digest_token, prompt_digest
from prfaas_jax.testing.realtime import RealTimeKernel
from prfaas_jax.transfer.coverage import Coverage

# Its memory is told in pages of so many bytes of the model's own cache, as a status counts in 32 bits.
_PAGE_BYTES = 1 << 20
_MOST_PAGES = 2**31 - 1


@dataclasses.dataclass(eq=False)
class _Request(PooledRequest):
    """`kv_bytes` of the model's own cache are reserved for it; `coverage` is what of the live cache has come."""

    kv_bytes: float = 0.0
    coverage: Coverage | None = None
    ready: float = 0.0  # when its cache was complete
    first: api.Token | None = None
    decode: DecodeTask | None = None
    count: int = 0  # live tokens said


class PooledDecodeEngine(PooledEngine[_Request]):
    """Implements DecodeEngine over a `DecodePool`, with the cluster's prefill instances for local prompts.

    One live token stands for `token_scale` tokens of the model: n of them take token_scale * (n - 1) steps, the first being prefill's.
    A request holds its memory from `reserve` on, and joins a batch after `commit`.
    """

    def __init__(
        self,
        kernel: RealTimeKernel,
        played: Played,
        close: Callable[[], None],
        pool: DecodePool,
        prefill: PrefillPool,
        *,
        token_scale: int,
        byte_scale: float,
        verify: bool,
    ):
        """`pool` must call `done` and `joined` of this engine; the rest is as for `ProfiledCluster`."""
        super().__init__(kernel, played, close)
        self.codec_rates: dict[str, tuple[float, float]] = dict.fromkeys(CODEC_NAMES, (1e9, 1e9))
        self._pool, self._prefill = pool, prefill
        self._token_scale, self._byte_scale, self._verify = token_scale, byte_scale, verify
        self._batches: dict[DecodeInstance, LiveTokens[_Request]] = {}
        self._held_bytes = 0.0
        self._held_pages = 0
        self._local_prefills = self._prefilled = self._decoded = 0

    # --- the edge ------------------------------------------------------------------------------------------------------------

    def reserve(self, job: api.Job, sink: api.Sink) -> None:
        """See DecodeEngine.reserve: admitted at once, or Exhausted while memory or queue are full."""
        self._check(job)
        steps = self._token_scale * (job.sampling.max_new_tokens - 1)
        kv_bytes = self.spec.bytes(len(job.prompt) + steps + 1) / self._byte_scale
        memory = self._pool.instance.kv_memory_bytes
        if kv_bytes > memory:
            raise InvalidInput("request KV", kv_bytes, f"at most {memory:.0f} bytes, the decode memory of {self._pool.instance.name}")
        self._register(_Request(job, sink, prompt_digest(job.prompt), kv_bytes=kv_bytes, coverage=Coverage(self.spec, len(job.prompt))))

    def prefill_local(self, ticket: str) -> None:
        """See DecodeEngine.prefill_local; a request fails where the cluster has no instance that takes prompts."""
        self._post_for(ticket, self._begin_prefill)

    def ingest(self, ticket: str, key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
        """See DecodeEngine.ingest; a block that is out of place, repeated or, with `verify`, wrong fails its request."""

        def ingest() -> None:
            request = self._find(ticket)
            if request is not None:
                try:
                    self._check_block(request, key, block)
                except PrfaasError as error:
                    self._end(request, api.Failed(error))
            done()

        self._kernel.post(ingest)

    def commit(self, ticket: str, first: api.Token) -> None:
        """See DecodeEngine.commit; Committed comes with the request's place in a batch."""
        self._post_for(ticket, functools.partial(self._commit, first=first))

    def abort(self, ticket: str, reason: str = "cancelled") -> None:
        """See DecodeEngine.abort."""

        def abort() -> None:
            if (request := self._find(ticket)) is not None:
                self._end(request, api.Finished(reason))

        self._post_unless_closed(abort)

    def status(self) -> api.EngineStatus:
        """See DecodeEngine.status; a page is a MiB of the model's own cache."""
        self._kernel.check_alive()
        taking = [i for i in [*self._pool.instances] if not i.draining]
        running = sum(i.running for i in [*self._pool.instances])
        with self._lock:
            outside = max(0, len(self._requests) - running)
            total = int(min(self._memory() / _PAGE_BYTES, _MOST_PAGES))
            free = max(0, total - self._held_pages)
        return api.EngineStatus(
            running,
            outside,
            free,
            total,
            0,
            self._local_prefills,
            self._prefilled,
            self._decoded,
            instances=loads(self._prefill, self._kernel),
            decode_slots=len(taking) * self._pool.instance.max_batch,
            decode_waiting=len(self._pool.waiting),
        )

    # --- room ----------------------------------------------------------------------------------------------------------------

    def _memory(self) -> float:
        return self._pool.instance.kv_memory_bytes * len(self._pool.instances)

    def _check_room(self, request: _Request) -> None:
        outside = len(self._requests) - sum(i.running for i in [*self._pool.instances])
        if outside >= self._played.max_queue:
            raise Exhausted(f"{outside} requests wait for their cache or a batch (max_queue={self._played.max_queue})")
        if self._held_bytes + request.kv_bytes > (memory := self._memory()):
            raise Exhausted(f"{self._held_bytes:.0f} of {memory:.0f} bytes for caches are taken, {request.kv_bytes:.0f} are asked for")
        self._held_bytes += request.kv_bytes
        self._held_pages += math.ceil(request.kv_bytes / _PAGE_BYTES)

    def _forgotten(self, request: _Request) -> None:
        self._held_pages -= math.ceil(request.kv_bytes / _PAGE_BYTES)
        # No rounding adds up.
        self._held_bytes = self._held_bytes - request.kv_bytes if self._requests else 0.0

    # --- the kernel's thread: a request's cache ------------------------------------------------------------------------------

    def _post_for(self, ticket: str, handle: Callable[[_Request], None]) -> None:
        def command() -> None:
            if (request := self._find(ticket)) is not None:
                handle(request)

        self._kernel.post(command)

    def _begin(self, request: _Request) -> None:
        self._say(request, api.Admitted())

    def _begin_prefill(self, request: _Request) -> None:
        try:
            self._prefill.submit(request.begin_prefill(self._kernel, self._prefill, self._computed))
        except PrfaasError as error:
            request.prefill = None
            self._end(request, api.Failed(error))
        else:
            self._local_prefills += 1

    def _computed(self, task: PrefillTask) -> None:
        request: _Request = task.owner
        self._prefilled += task.length
        first = digest_token(request.digest, self._played.vocab_size, request.job.sampling.return_logits)
        done = request.end_prefill(self._kernel, self._prefill, first)
        if self._say(request, api.PrefillProgress(task.length)) and self._say(request, done):
            request.coverage = None
            self._commit(request, first)

    def _check_block(self, request: _Request, key: SegmentKey, block: np.ndarray) -> None:
        """Raises unless the block is a whole-headed part of what the prompt leaves behind, and new; with `verify` also its bytes count."""
        wire = request.job.codec.wire_spec(self.spec)
        key.check(wire, len(request.job.prompt))
        heads = key.tensor_spec(self.spec).heads
        if key.heads != (0, heads):
            raise InvalidInput("segment.heads", key.heads, f"all {heads}")
        if self._verify and not np.array_equal(block, digest_block(wire, key, request.digest, self._played.seed)):
            raise TransferError(f"wrong bytes in {key}")
        if request.coverage is None or request.first is not None:
            raise TransferError(f"{key} came after the cache was complete")
        request.coverage.claim(key)

    # --- the kernel's thread: tokens -----------------------------------------------------------------------------------------

    def _commit(self, request: _Request, first: api.Token) -> None:
        if request.coverage is not None and (gap := request.coverage.gap()):
            self._end(request, api.Failed(TransferError(f"committed without {gap}")))
            return
        request.ready, request.first = self._kernel.now, first
        length, steps = len(request.job.prompt), self._token_scale * (request.job.sampling.max_new_tokens - 1)
        task = DecodeTask(request, length, steps, request.kv_bytes)
        if not steps:
            self._greet(request)
            return
        request.decode = task
        self._pool.submit(task)

    def joined(self, task: DecodeTask) -> None:
        """A request has its place in a batch."""
        instance = task.instance
        assert instance is not None  # the pool says so
        batch = self._batches.get(instance)
        if batch is None:
            batch = self._batches[instance] = LiveTokens(self._kernel, instance, self._token_scale, self._next_token)
        batch.add(task)
        self._greet(task.owner)

    def done(self, task: DecodeTask) -> None:
        """A request's last step is over, and it has left its batch."""
        request: _Request = task.owner
        self._leave(task)
        request.decode = None
        while not request.over:  # those of the same moment
            self._next_token(request)

    def _greet(self, request: _Request) -> None:
        """Committed and the first token."""
        assert request.first is not None  # _commit
        if self._say(request, api.Committed((self._kernel.now - request.ready) / self._kernel.time_scale)):
            self._say_token(request, request.first)

    def _next_token(self, request: _Request) -> None:
        self._decoded += 1
        self._say_token(request, digest_token(request.digest, self._played.vocab_size, request.job.sampling.return_logits))

    def _say_token(self, request: _Request, token: api.Token) -> None:
        request.count += 1
        request.digest = prompt_digest((token.token,), request.digest)
        sampling = request.job.sampling
        if not self._say(request, token):
            return
        if token.token in sampling.stop_token_ids:
            self._end(request, api.Finished("stop"))
        elif request.count == sampling.max_new_tokens:
            self._end(request, api.Finished("length"))

    def _withdraw(self, request: _Request) -> None:
        request.withdraw_prefill(self._prefill)
        task, request.decode = request.decode, None
        if task is None:
            return
        if task.running:
            assert task.instance is not None  # it runs there
            task.instance.cancel(task)
            self._leave(task)
        else:
            self._pool.waiting.remove(task)
        self._pool.pump()

    def _leave(self, task: DecodeTask) -> None:
        assert task.instance is not None  # it ran there
        batch = self._batches[task.instance]
        batch.remove(task)
        if not batch.tasks:
            del self._batches[task.instance]

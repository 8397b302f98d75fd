"""A PrefillEngine of many instances: queueing, batching and times are the simulator's, the bytes are real."""

import dataclasses
from collections.abc import Callable

from prfaas_jax.engine import api
from prfaas_jax.errors import EngineFailed, Exhausted, InvalidInput
from prfaas_jax.kvcache.segments import Segment
from prfaas_jax.simulation.pools import PrefillPool
from prfaas_jax.simulation.prefill import PrefillTask
from prfaas_jax.testing.pooled import Played, PooledEngine, PooledRequest, loads
from prfaas_jax.testing.profiled import digest_block, digest_token, prompt_digest, segment_keys
from prfaas_jax.testing.realtime import RealTimeKernel


@dataclasses.dataclass(eq=False)
class _Request(PooledRequest):
    handed_out: int = 0  # tokens whose cache has left


class PooledPrefillEngine(PooledEngine[_Request]):
    """Implements PrefillEngine over a `PrefillPool` that other work may share; segments leave chunk by chunk, states with the last one."""

    def __init__(self, kernel: RealTimeKernel, played: Played, close: Callable[[], None], pool: PrefillPool, chunk: int):
        super().__init__(kernel, played, close)
        self._pool, self._chunk = pool, chunk
        self._prefilled = 0

    def submit(self, job: api.Job, sink: api.Sink) -> None:
        """See PrefillEngine.submit; EngineFailed while no instance takes prompts."""
        self._check(job)
        longest = self._pool.instance.prefill.max_tokens
        if len(job.prompt) > longest:
            raise InvalidInput("prompt length", len(job.prompt), f"at most {longest} tokens, where the profile ends")
        if not self._pool.alive:
            raise EngineFailed(f"{self._pool.name} has no prefill instance that takes prompts")
        self._register(_Request(job, sink, prompt_digest(job.prompt)))

    def cancel(self, ticket: str) -> None:
        """See PrefillEngine.cancel: the step that computes the prompt now goes on, nothing of it leaves."""

        def cancel() -> None:
            if (request := self._find(ticket)) is not None:
                self._end(request, api.Finished("cancelled"))

        self._post_unless_closed(cancel)

    def status(self) -> api.EngineStatus:
        """See PrefillEngine.status; there are no pages."""
        self._kernel.check_alive()
        requests = self._all()
        waiting = sum(map(_waits, requests))
        load = loads(self._pool, self._kernel)
        return api.EngineStatus(len(requests) - waiting, waiting, 0, 0, 0, tokens_prefilled=self._prefilled, instances=load)

    # --- the kernel's thread -------------------------------------------------------------------------------------------------

    def _check_room(self, request: _Request) -> None:
        waiting = sum(map(_waits, self._requests.values()))
        if waiting >= self._played.max_queue:
            raise Exhausted(f"{waiting} prompts are waiting (max_queue={self._played.max_queue})")

    def _forgotten(self, request: _Request) -> None:
        """Nothing but the entry counts it."""

    def _begin(self, request: _Request) -> None:
        if not self._say(request, api.Admitted()):
            return
        try:
            task = request.begin_prefill(self._kernel, self._pool, self._computed)
        except EngineFailed as error:
            self._end(request, api.Failed(error))
            return
        if task.length > self._chunk:
            task.on_chunk = self._chunk_done
        self._pool.submit(task)

    def _withdraw(self, request: _Request) -> None:
        request.withdraw_prefill(self._pool)

    def _chunk_done(self, task: PrefillTask) -> None:
        if task.start < task.length:
            self._hand_out(task.owner, task.start)

    def _computed(self, task: PrefillTask) -> None:
        request: _Request = task.owner
        first = digest_token(request.digest, self._played.vocab_size, request.job.sampling.return_logits)
        done = request.end_prefill(self._kernel, self._pool, first)
        self._hand_out(request, task.length)
        self._end(request, done)

    def _hand_out(self, request: _Request, computed: int) -> None:
        """What the tokens up to `computed` leave behind, as far as it has not left yet."""
        job, tokens = request.job, (request.handed_out, computed)
        wire = job.codec.wire_spec(self.spec)
        for key in segment_keys(self.spec, job, tokens):
            block = digest_block(wire, key, request.digest, self._played.seed)
            if not self._say(request, api.SegmentReady(Segment(key, block.data))):
                return
        request.handed_out = computed
        self._prefilled += computed - tokens[0]
        self._say(request, api.PrefillProgress(computed))


def _waits(request: _Request) -> bool:
    return request.prefill is None or request.prefill.last_step < 0

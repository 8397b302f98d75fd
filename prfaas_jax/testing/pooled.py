"""What the two engines of a profiled cluster share: tickets that any thread registers and the cluster's thread ends."""

import abc
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from absl import logging

from prfaas_jax.engine import api
from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.kvcache.codecs import CODEC_NAMES
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.simulation.pools import PrefillPool
from prfaas_jax.simulation.prefill import PrefillTask
from prfaas_jax.testing.profiled import deliver
from prfaas_jax.testing.realtime import RealTimeKernel


@dataclasses.dataclass(frozen=True)
class Played:
    """What is played, and what bounds it.

    Attributes:
        spec: what the cache looks like.
        fingerprint: of the model.
        vocab_size: ids are below it.
        max_length: prompt + max_new_tokens at most.
        max_queue: requests that wait before more are refused.
        seed: of the cache's bytes.
    """

    spec: CacheSpec
    fingerprint: str
    vocab_size: int
    max_length: int
    max_queue: int
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("vocab_size", "max_length", "max_queue"):
            if getattr(self, field) < 1:
                raise InvalidInput(field, getattr(self, field), "an integer >= 1")


@dataclasses.dataclass(eq=False)
class PooledRequest:
    """A request of either engine; times are those of the kernel. `prefill` is None before and after its prompt is computed."""

    job: api.Job
    sink: api.Sink
    digest: int
    asked: float = 0.0
    prefill: PrefillTask | None = None
    over: bool = False

    def begin_prefill(self, kernel: RealTimeKernel, pool: PrefillPool, done: Callable[[PrefillTask], None]) -> PrefillTask:
        """The task that computes its prompt, yet to be submitted; raises EngineFailed where nothing takes prompts."""
        if not pool.alive:
            raise EngineFailed(f"{pool.name} has no prefill instance that takes prompts")
        self.asked = kernel.now
        self.prefill = PrefillTask(self, 0, len(self.job.prompt), done)
        return self.prefill

    def end_prefill(self, kernel: RealTimeKernel, pool: PrefillPool, first: api.Token) -> api.PrefillDone:
        """Due when the last token is computed; times are of the model's clock, in wall seconds."""
        assert self.prefill is not None  # it has been computed
        begun, self.prefill = self.prefill.begun_s, None
        pool.note()
        return api.PrefillDone(first, (begun - self.asked) / kernel.time_scale, (kernel.now - begun) / kernel.time_scale)

    def withdraw_prefill(self, pool: PrefillPool) -> None:
        """Takes its prompt, if it is waiting or being computed, out of the pool."""
        if self.prefill is not None and self.prefill.instance is not None:
            self.prefill.instance.cancel(self.prefill)
            pool.note()
        self.prefill = None


R = TypeVar("R", bound=PooledRequest)


class PooledEngine(abc.ABC, Generic[R]):
    """Base of the two: requests by ticket. Subclasses give `_check_room`, `_begin` and `_withdraw`."""

    def __init__(self, kernel: RealTimeKernel, played: Played, close: Callable[[], None]):
        self.spec, self.fingerprint, self.codecs = played.spec, played.fingerprint, CODEC_NAMES
        self._kernel, self._played, self._close = kernel, played, close
        self._lock = threading.Lock()
        self._requests: dict[str, R] = {}

    def close(self) -> None:
        """Closes the cluster, with the other engine."""
        self._close()

    def fail_all(self, error: EngineFailed) -> None:
        """Ends every request; on the kernel's thread, when nothing will run any more."""
        with self._lock:
            requests = [*self._requests.values()]
        for request in requests:
            self._end(request, api.Failed(error))

    def _check(self, job: api.Job) -> None:
        api.check_job(job, self._played.vocab_size, self._played.max_length)
        api.check_transfer(job, self.spec, self.codecs)

    def _register(self, request: R) -> None:
        """Takes a request, whose life begins on the kernel's thread; raises InvalidInput, Exhausted, or EngineFailed after `close`."""
        ticket = request.job.ticket
        with self._lock:
            if ticket in self._requests:
                raise InvalidInput("job.ticket", ticket, "a ticket that is not in use")
            self._check_room(request)
            self._requests[ticket] = request
        try:
            self._kernel.post(functools.partial(self._begin, request))
        except EngineFailed:
            with self._lock:
                if self._requests.pop(ticket, None) is not None:
                    self._forgotten(request)
            raise

    def _post_unless_closed(self, command: Callable[[], None]) -> None:
        """For requests that have failed already when the cluster is closed."""
        with contextlib.suppress(EngineFailed):
            self._kernel.post(command)

    def _find(self, ticket: str) -> R | None:
        with self._lock:
            return self._requests.get(ticket)

    def _all(self) -> list[R]:
        with self._lock:
            return [*self._requests.values()]

    def _say(self, request: R, event: api.Event) -> bool:
        """Hands out an event; a sink that raises ends its own request. Whether the request goes on."""
        if not request.over:
            try:
                request.sink(event)
            except Exception as error:
                logging.exception("sink raised on %s", type(event).__name__)
                self._end(request, api.Failed(EngineFailed(f"{type(error).__name__}: {error}")))
        return not request.over

    def _end(self, request: R, event: api.PrefillDone | api.Finished | api.Failed) -> None:
        """Gives back what the request holds, then says its last event."""
        if request.over:
            return
        request.over = True
        self._withdraw(request)
        with self._lock:
            if self._requests.pop(request.job.ticket, None) is not None:
                self._forgotten(request)
        deliver(request.sink, event)

    @abc.abstractmethod
    def _check_room(self, request: R) -> None:
        """Raises Exhausted when it cannot be taken now, or counts it; under the lock."""

    @abc.abstractmethod
    def _forgotten(self, request: R) -> None:
        """It is counted no more; under the lock."""

    @abc.abstractmethod
    def _begin(self, request: R) -> None:
        """On the kernel's thread, at the moment at which it was submitted."""

    @abc.abstractmethod
    def _withdraw(self, request: R) -> None:
        """Takes it out of whatever pool has it."""


def loads(pool: PrefillPool, kernel: RealTimeKernel) -> tuple[api.InstanceLoad, ...]:
    """What the instances that take prompts have to do, in wall seconds; from any thread."""
    now = kernel.present
    taking = [i for i in [*pool.instances] if not i.draining]
    return tuple(api.InstanceLoad(max(0.0, i.free_at - now) / kernel.time_scale, i.jobs, len(i.fresh)) for i in taking)

"""Decode instances with continuous batching, fluid between joins and leaves: every request of a batch advances at the batch's pace."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.simulation.kernel import Kernel


class DecodeTask:
    """`tokens` to generate after a context of `context` tokens; `kv_bytes` are reserved from join to leave. `owner` is the caller's."""

    __slots__ = ("context", "ends", "generated", "instance", "joined_at", "kv_bytes", "owner", "running", "tokens")

    def __init__(self, owner: Any, context: int, tokens: int, kv_bytes: float):
        self.owner, self.context, self.tokens, self.kv_bytes = owner, context, tokens, kv_bytes
        self.ends = 0.0
        self.joined_at = 0.0
        self.running = False
        self.generated = 0  # whole tokens at the moment its instance failed
        self.instance: DecodeInstance | None = None


class DecodeInstance:
    """At most `max_batch` requests within the memory for caches. The pace is 1 / step time of the batch as it stands.

    Contexts grow while a batch runs: the pace is that of the middle of the time until the next leave, at most `REFRESH` tokens away.
    `drained()` comes once, when an instance that is `draining` and up has nothing left to do.
    """

    REFRESH = 256.0

    __slots__ = (
        *(
            "_contexts",
            "_done",
            "_grows",
            "_heap",
            "_kernel",
            "_order",
            "_pace",
            "_planned",
            "_since",
            "_step_s",
            "_version",
            "draining",
            "drained",
        ),
        *("free_bytes", "generated", "index", "instance", "max_batch", "progress", "region", "running", "slot_s", "up"),
    )

    def __init__(self, kernel: Kernel, instance: Instance, done: Callable[[DecodeTask], None], region: Any = None, index: int = 0):
        if instance.decode is None:
            raise InvalidInput(f"instance {instance.name}.decode", None, "decode times")
        self._kernel, self.instance, self._done = kernel, instance, done
        self._step_s, self.max_batch = instance.decode.step_s, instance.max_batch
        self._grows = self._step_s(1, 0.0) != self._step_s(1, 1e9)  # whether steps take longer as contexts grow
        self.region, self.index = region, index
        self._heap: list[tuple[float, int, DecodeTask]] = []
        self._order = itertools.count()
        self._since = 0.0
        self._pace = 0.0
        self._planned = -1.0  # progress at the event to come; below 0 where there is none
        self._contexts = 0.0
        self._version = 0
        self.progress = 0.0  # tokens that each request running since the batch began would have
        self.running = 0
        self.free_bytes = instance.kv_memory_bytes
        self.generated = 0.0
        self.slot_s = 0.0  # slots in use, integrated over time
        self.up = True
        self.draining = False
        self.drained: Callable[[DecodeInstance], None] | None = None

    def fits(self, task: DecodeTask) -> bool:
        """Whether the request could join now."""
        return self.running < self.max_batch and task.kv_bytes <= self.free_bytes and self.up and not self.draining

    def join(self, task: DecodeTask) -> None:
        """Adds a request, which must fit, to the batch."""
        if not self.fits(task):
            raise InvalidInput("decode task", task.kv_bytes, f"one that fits: {self.running} running, {self.free_bytes} bytes free")
        self.take(task)

    def take(self, task: DecodeTask) -> None:
        """Adds a request that is known to fit."""
        self.advance()
        self.running += 1
        self.free_bytes -= task.kv_bytes
        self._contexts += task.context
        task.running, task.instance, task.joined_at = True, self, self.progress
        task.ends = self.progress + task.tokens
        heapq.heappush(self._heap, (task.ends, next(self._order), task))
        self._plan()

    def generated_of(self, task: DecodeTask) -> int:
        """Whole tokens that a running request has so far; it has its last one when it leaves, not before."""
        self.advance()
        return min(task.tokens - 1, int(self.progress - task.joined_at + 1e-6))

    def cancel(self, task: DecodeTask) -> None:
        """Takes a running request out; `generated` of it says how far it got."""
        task.generated = self.generated_of(task)
        self._leave(task)
        self._plan()

    def fail(self) -> list[DecodeTask]:
        """Stops at once and hands back every request that ran, in order of joining."""
        self.advance()
        tasks = [task for _, _, task in sorted(self._heap, key=lambda entry: entry[1]) if task.running]
        for task in tasks:
            task.generated = self.generated_of(task)
            self._leave(task)
        self.up = False
        self._plan()
        return tasks

    def recover(self) -> None:
        """Takes requests again."""
        self.up = True
        self._plan()

    def advance(self) -> None:
        """Brings progress and counters to now."""
        now = self._kernel.now
        elapsed = now - self._since
        self._since = now
        if elapsed > 0 and self.running:
            tokens = elapsed * self._pace
            self.progress += tokens
            tokens *= self.running
            self.generated += tokens
            self._contexts += tokens
            self.slot_s += elapsed * self.running

    def _leave(self, task: DecodeTask) -> None:
        task.running = False
        self.running -= 1
        self.free_bytes += task.kv_bytes
        self._contexts -= task.context + (self.progress - task.joined_at)
        if not self.running:
            # No rounding adds up.
            self._contexts, self.progress, self.free_bytes = 0.0, 0.0, self.instance.kv_memory_bytes
            self._heap.clear()

    def _plan(self) -> None:
        """Schedules the next leave or refresh, unless it is scheduled already."""
        heap, running, contexts = self._heap, self.running, self._contexts
        if not running:
            self._version += 1
            self._planned = -1.0
            if self.draining and self.up and self.drained is not None:
                self.drained(self)
            return
        while not heap[0][2].running:
            heapq.heappop(heap)
        target = heap[0][0]
        step_s = self._step_s(running, contexts)
        if self._grows:
            target = min(target, self.progress + self.REFRESH)
            # A step sees the tokens of the steps before it, not its own.
            grown = max(0.0, target - self.progress - 1.0)
            step_s = self._step_s(running, contexts + 0.5 * running * grown)
        pace = 1.0 / step_s
        if pace == self._pace and target == self._planned:
            return
        self._version += 1
        self._pace, self._planned = pace, target
        self._kernel.at(self._kernel.now + max(0.0, target - self.progress) / pace, self._event, self._version)

    def _event(self, version: int) -> None:
        if version != self._version:
            return
        self.advance()
        self._planned = -1.0
        heap, reached = self._heap, self.progress + 1e-6
        ended: list[DecodeTask] = []
        while heap and (heap[0][0] <= reached or not heap[0][2].running):
            task = heapq.heappop(heap)[2]
            if task.running:
                self._leave(task)
                ended.append(task)
        self._plan()
        for task in ended:
            self._done(task)

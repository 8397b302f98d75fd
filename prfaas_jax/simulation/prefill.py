"""Prefill instances: one step after the other, rows chosen by the very function that the engine uses, times from a profile."""

import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.batching import PATIENCE, choose_prefill, prefill_buckets
from prfaas_jax.scheduling.profiles import PrefillTime
from prfaas_jax.simulation.kernel import Kernel

# Most prompts that one step looks at, in order of urgency: beyond that many a step has no row for them anyway.
LOOKAHEAD = 32


class PrefillTask:
    """One prompt on one instance; to `choose_prefill` it is a `PrefillItem`.

    Tokens [start, length) are still to be computed; it began over a prefix of `cached` tokens. `on_chunk(task)` comes after every step that
    served it, where it is given; `on_done(task)` after the last one. `instance` is the one that has it, None otherwise. `owner` is the
    caller's.
    """

    __slots__ = (
        *("arrival", "begun_s", "cached", "grown_s", "instance", "last_step", "length", "on_chunk", "on_done", "owner", "start", "work_s"),
    )

    def __init__(self, owner: Any, start: int, length: int, on_done: Callable[["PrefillTask"], None]):
        if not 0 <= start < length:
            raise InvalidInput("prefill start", start, f"0..{length - 1}")
        self.owner = owner
        self.cached, self.start, self.length = start, start, length
        self.on_done = on_done
        self.on_chunk: Callable[[PrefillTask], None] | None = None
        self.instance: PrefillInstance | None = None
        self.arrival = 0
        self.last_step = -1
        self.begun_s = math.nan
        self.work_s = 0.0  # all of it, on the instance that has it
        self.grown_s = 0.0  # growth of the prompt up to the end of the step that runs, or of the last one

    @property
    def ticket(self) -> str:
        """Unique on its instance."""
        return str(self.arrival)

    @property
    def shard(self) -> int:
        """An instance is one data shard."""
        return 0


class PrefillInstance:
    """A prompt alone runs through in one event, unless someone asks for its chunks; the first that joins it cuts in at the next chunk.

    `free_at` is exact: an instance is never idle while it has work, and its work is known. `drained()` comes once, when an instance that
    is `draining` and up has nothing left to do.
    """

    __slots__ = (
        *("_base", "_buckets", "_chunk", "_kernel", "_rows", "_running", "_started", "_step", "_tasks", "_version"),
        *("busy_s", "cluster", "drained", "draining", "fresh", "free_at", "index", "time", "up"),
    )

    def __init__(self, kernel: Kernel, time: PrefillTime, chunk: int, rows: int, cluster: Any = None, index: int = 0):
        self._kernel, self.time, self._chunk, self._rows = kernel, time, chunk, rows
        self._buckets = prefill_buckets(chunk, rows)
        self.cluster, self.index = cluster, index
        self.fresh: deque[PrefillTask] = deque()  # never served, by arrival
        self._started: dict[PrefillTask, None] = {}  # least recently served first
        self._running: tuple[tuple[PrefillTask, int], ...] = ()
        self._base: float | None = None  # of a lone prompt that runs through: when its first token would have begun
        self._step = self._version = 0
        self._tasks = 0
        self.free_at = 0.0
        self.busy_s = 0.0  # work done or under way
        self.up = True
        self.draining = False
        self.drained: Callable[[PrefillInstance], None] | None = None

    @property
    def jobs(self) -> int:
        """Prompts waiting or running."""
        return len(self.fresh) + len(self._started)

    def submit(self, task: PrefillTask) -> None:
        """Takes the prompt; raises InvalidInput for one beyond the profile, or while the instance is down."""
        time, now = self.time, self._kernel.now
        if task.length > time.max_tokens:
            raise InvalidInput("prompt", task.length, f"at most {time.max_tokens} tokens, where the profile ends")
        if not self.up:
            raise InvalidInput("prefill instance", self.index, "one that is up")
        task.instance = self
        task.grown_s = time.growth(task.start)
        task.work_s = time.start_s + time.growth(task.length) - task.grown_s
        self._tasks += 1
        task.arrival = self._tasks
        self.free_at = max(now, self.free_at) + task.work_s
        self.busy_s += task.work_s
        self.fresh.append(task)
        if not self._running:
            self._next()
        elif self._base is not None:
            self._cut_in()

    def fail(self) -> list[PrefillTask]:
        """Stops at once and hands back every prompt, each as far as it had got lost."""
        tasks = [*self._started, *self.fresh]
        self.busy_s -= max(0.0, self.free_at - self._kernel.now)
        self.fresh.clear()
        self._started.clear()
        self._running, self._base = (), None
        self._version += 1
        self.up, self.free_at = False, self._kernel.now
        for task in tasks:
            task.instance = None
        return tasks

    def recover(self) -> None:
        """Takes prompts again."""
        self.up, self.free_at = True, self._kernel.now
        self._idle()

    def cancel(self, task: PrefillTask) -> None:
        """Takes a prompt out, for which nothing is called any more; a step that it is part of runs to its end."""
        growth = self.time.growth
        if task in self._started:
            if self._base is not None:
                self._cut_in()
            del self._started[task]
            # The step that computes it now goes on.
            position = task.start + next((n for t, n in self._running if t is task), 0)
            left = growth(task.length) - growth(position)
        else:
            self.fresh.remove(task)
            left = task.work_s
        task.instance = None
        self.free_at -= left
        self.busy_s -= left

    def _next(self) -> None:
        """Starts the next step, or reports that there is nothing left to do."""
        self._version += 1
        now = self._kernel.now
        fresh, started = self.fresh, self._started
        if not fresh and not started:
            self._running, self.free_at = (), now
            self._idle()
            return
        self._step += 1
        if self._rows == 1:
            task = self._most_urgent()
            if task.on_chunk is None and len(fresh) + len(started) == 1:
                self._run_through(task)
                return
            tokens = min(self._chunk - task.start % self._chunk, task.length - task.start)
            self._running = ((task, tokens),)
            seconds = self._serve(task, tokens)
        else:
            self._running = tuple(self._choose())
            seconds = sum(self._serve(task, tokens) for task, tokens in self._running)
        self._kernel.at(now + seconds, self._end, self._version)

    def _idle(self) -> None:
        if self.draining and self.drained is not None and not self.jobs:
            self.drained(self)

    def _most_urgent(self) -> PrefillTask:
        """What `choose_prefill` takes where a step has one row: the first never served, unless a started one is overdue."""
        if not self._started:
            return self.fresh[0]
        least_recent = next(iter(self._started))
        return least_recent if not self.fresh or self._step - least_recent.last_step > PATIENCE else self.fresh[0]

    def _choose(self) -> list[tuple[PrefillTask, int]]:
        tasks = {t.ticket: t for queue in (self._started, self.fresh) for t in itertools.islice(queue, LOOKAHEAD)}
        choice = choose_prefill(tasks.values(), self._buckets, self._chunk, self._step)
        return [(tasks[row.ticket], row.tokens) for row in choice.rows]

    def _serve(self, task: PrefillTask, tokens: int) -> float:
        """Moves the task to the back of its queue; seconds that the row takes."""
        started, before = self._started, task.grown_s
        task.grown_s = self.time.growth(task.start + tokens)
        seconds = task.grown_s - before
        if task.last_step < 0:
            task.begun_s = self._kernel.now
            if self.fresh[0] is task:
                self.fresh.popleft()
            else:
                self.fresh.remove(task)
            seconds += self.time.start_s
        else:
            del started[task]
        started[task] = None
        task.last_step = self._step
        return seconds

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        running, self._running, self._base = self._running, (), None
        for task, tokens in running:
            task.start += tokens
            if task.start >= task.length:
                self._started.pop(task, None)  # it may have been cancelled
        # The next step starts first: what the callbacks submit joins it no sooner than it would live.
        self._next()
        for task, _ in running:
            if task.instance is self and task.on_chunk is not None:
                task.on_chunk(task)
            if task.instance is self and task.start >= task.length:
                task.on_done(task)

    def _run_through(self, task: PrefillTask) -> None:
        """All chunks of a lone prompt in one event."""
        tokens = task.length - task.start
        self._base = self._kernel.now - task.grown_s + (self.time.start_s if task.last_step < 0 else 0.0)
        self._serve(task, tokens)
        self._running = ((task, tokens),)
        self._kernel.at(self._base + task.grown_s, self._end, self._version)

    def _cut_in(self) -> None:
        """Ends a run-through at the end of the chunk that is being computed."""
        task, base, now = self._running[0][0], self._base, self._kernel.now
        assert base is not None  # who calls has looked
        self._base = None
        position, at = task.start, now
        while position < task.length:
            position = min(task.length, position - position % self._chunk + self._chunk)
            task.grown_s = self.time.growth(position)
            at = base + task.grown_s
            if at >= now:
                break
        self._running = ((task, position - task.start),)
        self._version += 1
        self._kernel.at(max(now, at), self._end, self._version)

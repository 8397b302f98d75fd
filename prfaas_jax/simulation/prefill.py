"""Prefill instances: one step after the other, rows chosen by the very function that the engine uses, times from a profile."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.batching import MIN_PREFILL_TOKENS, choose_prefill, prefill_buckets
from prfaas_jax.scheduling.profiles import PrefillTime
from prfaas_jax.simulation.kernel import Kernel

# Most prompts that one step looks at, in order of urgency: beyond that many a step has no row for them anyway.
LOOKAHEAD = 32


class PrefillTask:
    """One prompt on one instance; to `choose_prefill` it is a `PrefillItem`.

    Tokens [start, length) are still to be computed; it began over a prefix of `cached` tokens. `on_chunk(task)` comes after every step that
    served it, where it is given; `on_done(task)` after the last one. `owner` is the caller's.
    """

    __slots__ = (
        *("arrival", "begun_s", "cached", "instance", "last_step", "length", "on_chunk", "on_done", "owner", "shard", "start", "ticket"),
        "work_s",
    )

    def __init__(self, owner: Any, start: int, length: int, on_done: Callable[["PrefillTask"], None]):
        if not 0 <= start < length:
            raise InvalidInput("prefill start", start, f"0..{length - 1}")
        self.owner = owner
        self.cached, self.start, self.length = start, start, length
        self.on_done = on_done
        self.on_chunk: Callable[[PrefillTask], None] | None = None
        self.instance: PrefillInstance | None = None
        self.ticket = ""
        self.arrival = self.shard = 0
        self.last_step = -1
        self.begun_s = math.nan
        self.work_s = 0.0


class PrefillInstance:
    """A prompt alone runs through in one event, unless someone asks for its chunks; the first that joins it cuts in at the next chunk.

    `free_at` is exact: an instance is never idle while it has work, and its work is known.
    """

    __slots__ = (
        *("_boundaries", "_buckets", "_chunk", "_kernel", "_rows", "_running", "_started", "_step", "_tasks", "_version"),
        *("busy_s", "cluster", "drained", "draining", "fresh", "free_at", "index", "rows_per_step", "time", "up"),
    )

    def __init__(self, kernel: Kernel, time: PrefillTime, chunk: int, rows: int, cluster: Any = None, index: int = 0):
        self._kernel, self.time, self._chunk, self._rows = kernel, time, chunk, rows
        self._buckets = prefill_buckets(chunk, rows)
        self.cluster, self.index = cluster, index
        self.fresh: deque[PrefillTask] = deque()  # never served, by arrival
        self._started: dict[PrefillTask, None] = {}  # least recently served first
        self._running: tuple[tuple[PrefillTask, int], ...] = ()
        self._boundaries: list[float] | None = None  # of a lone prompt that runs through: when its chunks end
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
        """Takes the prompt; raises InvalidInput for one beyond the profile."""
        if task.length > self.time.max_tokens:
            raise InvalidInput("prompt", task.length, f"at most {self.time.max_tokens} tokens, where the profile ends")
        time = self.time
        task.instance = self
        task.work_s = time.start_s + time.growth(task.length) - time.growth(task.cached)
        self._tasks += 1
        task.ticket, task.arrival = str(self._tasks), self._tasks
        now = self._kernel.now
        self.free_at = max(now, self.free_at) + task.work_s
        self.busy_s += task.work_s
        self.fresh.append(task)
        if not self._running:
            self._next()
        elif self._boundaries is not None:
            self._cut_in()

    def fail(self) -> list[PrefillTask]:
        """Stops at once and hands back every prompt, each as far as it had got lost."""
        tasks = [*self._started, *self.fresh]
        self.busy_s -= max(0.0, self.free_at - self._kernel.now)
        self.fresh.clear()
        self._started.clear()
        self._running, self._boundaries = (), None
        self._version += 1
        self.up, self.free_at = False, 0.0
        return tasks

    def recover(self) -> None:
        """Takes prompts again."""
        self.up = True

    def cancel(self, task: PrefillTask) -> None:
        """Takes a prompt out; a step that it is part of runs to its end."""
        left = self.time.growth(task.length) - self.time.growth(task.start) + (self.time.start_s if task.start == task.cached else 0.0)
        if task in self._started:
            if self._boundaries is not None:
                self._cut_in()
            del self._started[task]
            if any(t is task for t, _ in self._running):
                # The step that computes it now goes on.
                tokens = next(n for t, n in self._running if t is task)
                done = self.time.growth(task.start + tokens) - self.time.growth(task.start)
                left -= done + (self.time.start_s if task.start == task.cached else 0.0)
        else:
            self.fresh.remove(task)
        self.free_at -= left
        self.busy_s -= left

    def _next(self) -> None:
        """Starts the next step, or reports that there is nothing left to do."""
        self._version += 1
        if not self.fresh and not self._started:
            self._running = ()
            if self.draining and self.drained is not None:
                self.drained(self)
            return
        if self.jobs == 1:
            task = self.fresh[0] if self.fresh else next(iter(self._started))
            if task.on_chunk is None:
                self._run_through(task)
                return
            # One row is no choice.
            rows: Iterable[tuple[PrefillTask, int]] = ((task, min(self._chunk - task.start % self._chunk, task.length - task.start)),)
        else:
            rows = self._choose()
        self._step += 1
        self._running = tuple(rows)
        seconds = sum(self._serve(task, tokens) for task, tokens in self._running)
        self._kernel.at(self._kernel.now + seconds, self._end, self._version)

    def _choose(self) -> list[tuple[PrefillTask, int]]:
        tasks = {t.ticket: t for queue in (self._started, self.fresh) for t in itertools.islice(queue, LOOKAHEAD)}
        choice = choose_prefill(tasks.values(), self._buckets, self._chunk, self._step)
        return [(tasks[row.ticket], row.tokens) for row in choice.rows]

    def _serve(self, task: PrefillTask, tokens: int) -> float:
        """Moves the task to the back of its queue; seconds that the row takes."""
        growth = self.time.growth
        seconds = growth(task.start + tokens) - growth(task.start)
        if task.last_step < 0:
            self._begin(task)
        if task.start == task.cached:
            seconds += self.time.start_s
        self._started.pop(task, None)
        self._started[task] = None
        task.last_step = self._step
        return seconds

    def _begin(self, task: PrefillTask) -> None:
        task.begun_s = self._kernel.now
        if self.fresh[0] is task:
            self.fresh.popleft()
        else:
            self.fresh.remove(task)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        running, self._running, self._boundaries = self._running, (), None
        for task, tokens in running:
            task.start += tokens
            if task not in self._started:
                continue  # cancelled meanwhile
            if task.start >= task.length:
                del self._started[task]
        # The next step starts first: what the callbacks submit joins it no sooner than it would live.
        self._next()
        for task, _ in running:
            if task.on_chunk is not None:
                task.on_chunk(task)
            if task.start >= task.length:
                task.on_done(task)

    def _run_through(self, task: PrefillTask) -> None:
        """All chunks of a lone prompt in one event."""
        now, growth = self._kernel.now, self.time.growth
        base = now - growth(task.start) + (self.time.start_s if task.start == task.cached else 0.0)
        self._step += 1
        self._serve(task, task.length - task.start)
        self._running = ((task, task.length - task.start),)
        self._boundaries = [base]
        self._kernel.at(base + growth(task.length), self._end, self._version)

    def _cut_in(self) -> None:
        """Ends a run-through at the end of the chunk that is being computed."""
        assert self._boundaries is not None
        (task, tokens), base, now = self._running[0], self._boundaries[0], self._kernel.now
        self._boundaries = None
        position, end = task.start, task.start + tokens
        while position < end:
            position = min(end, position - position % self._chunk + self._chunk)
            at = base + self.time.growth(position)
            if at >= now:
                break
        self._running = ((task, position - task.start),)
        self._version += 1
        self._kernel.at(max(now, at), self._end, self._version)


def check_chunk(chunk: int) -> None:
    """Raises InvalidInput unless `chunk` is a positive multiple of the smallest prefill bucket."""
    if chunk < MIN_PREFILL_TOKENS or chunk % MIN_PREFILL_TOKENS:
        raise InvalidInput("prefill_chunk", chunk, f"a positive multiple of {MIN_PREFILL_TOKENS}")

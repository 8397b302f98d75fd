"""When the requests of one decode batch say their tokens, of which each stands for many steps of the model."""

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

from prfaas_jax.simulation.decode import DecodeInstance, DecodeTask
from prfaas_jax.simulation.kernel import Kernel

R = TypeVar("R")

# A token may come this part of a step early: a batch's pace is known to less than that.
_EARLY_STEPS = 0.05


class LiveTokens(Generic[R]):
    """Calls `say(task.owner)` each time that a running task has done `stride` more steps, but for its last ones: the task is done then.

    One event at a time for the whole batch, which is planned anew when someone joins or leaves, as the pace changes with it.
    """

    def __init__(self, kernel: Kernel, instance: DecodeInstance, stride: int, say: Callable[[R], None]):
        self._kernel, self._instance, self._stride, self._say = kernel, instance, stride, say
        self.tasks: set[DecodeTask] = set()
        self._due: list[tuple[float, int, DecodeTask]] = []  # by the batch's progress
        self._order = itertools.count()
        self._version = 0
        self._base = 0.0  # tokens in the batch's contexts, at progress 0

    def add(self, task: DecodeTask) -> None:
        """A task that has just joined."""
        self.tasks.add(task)
        self._base += task.context - task.joined_at
        self._push(task, task.joined_at + self._stride)
        self._plan()

    def remove(self, task: DecodeTask) -> None:
        """A task that has just left, for whatever reason."""
        self.tasks.discard(task)
        self._base -= task.context - task.joined_at
        self._plan()

    def _push(self, task: DecodeTask, due: float) -> None:
        if due < task.ends - _EARLY_STEPS:
            heapq.heappush(self._due, (due, next(self._order), task))

    def _plan(self) -> None:
        self._version += 1
        due, instance = self._due, self._instance
        while due and due[0][2] not in self.tasks:
            heapq.heappop(due)
        if due:
            instance.advance()
            assert instance.instance.decode is not None  # it decodes
            step_s = instance.instance.decode.step_s(instance.running, self._base + instance.running * instance.progress)
            steps = max(_EARLY_STEPS, due[0][0] - instance.progress)
            self._kernel.at(self._kernel.now + steps * step_s, self._turn, self._version)

    def _turn(self, version: int) -> None:
        if version != self._version:
            return
        self._instance.advance()
        reached = self._instance.progress + _EARLY_STEPS
        ready: list[DecodeTask] = []
        while self._due and self._due[0][0] <= reached:
            due, _, task = heapq.heappop(self._due)
            if task in self.tasks:
                ready.append(task)
                self._push(task, due + self._stride)
        self._plan()
        for task in ready:
            if task in self.tasks:
                self._say(task.owner)

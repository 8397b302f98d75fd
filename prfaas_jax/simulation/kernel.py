"""The clock of a simulation: a heap of events, run in order of time; events of one moment run in the order in which they were made."""

import itertools
import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from prfaas_jax.errors import InvalidInput

Handler = Callable[[Any], None]


class Kernel:
    """Calls handlers at simulated times. Events cannot be taken back: a handler that may be out of date compares versions."""

    __slots__ = ("_heap", "_order", "events", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Handler, Any]] = []
        self._order = itertools.count()

    def at(self, time: float, handler: Handler, argument: Any = None) -> None:
        """Calls `handler(argument)` at `time`, which must not lie in the past; infinite times never come."""
        if self.now <= time < math.inf:
            heappush(self._heap, (time, next(self._order), handler, argument))
        elif time != math.inf:
            raise InvalidInput("event time", time, f"a time from now on, {self.now}")

    def run(self, until: float = math.inf) -> None:
        """Runs events up to and including those at `until`, or until there are none; `now` ends at `until` if that is finite."""
        heap, ran = self._heap, 0
        try:
            while heap and heap[0][0] <= until:
                self.now, _, handler, argument = heappop(heap)
                ran += 1
                handler(argument)
        finally:
            self.events += ran
        if until < math.inf:
            self.now = max(self.now, until)

    @property
    def pending(self) -> int:
        """Events still to come."""
        return len(self._heap)

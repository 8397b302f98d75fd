"""A simulation's kernel in real time: events when their time has come, commands of other threads in between."""

import concurrent.futures
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.simulation.kernel import Kernel

T = TypeVar("T")

_CALL_S = 30.0
_CLOSE_S = 60.0
_LONGEST_S = 3600.0


class RealTimeKernel(Kernel):
    """A `Kernel` that a thread of its own drives: a wall second is `time_scale` seconds of its clock, which begins at 0 when it is made.

    A command takes effect at the moment at which it was posted, and events run in order of their times, however late the thread is. So a
    busy machine delays what others see of a run, by `max_late_s`, and changes nothing of what happens in it.

    Attributes:
        time_scale: seconds of the clock per wall second.
        max_late_s: by how many wall seconds the latest event came late.
    """

    def __init__(self, name: str, time_scale: float, ended: Callable[[EngineFailed], None]):
        """`ended` is called on the thread, once, when it is closed or a handler has raised; InvalidInput for a scale not above zero."""
        super().__init__()
        if not 0 < time_scale < math.inf:
            raise InvalidInput("time_scale", time_scale, "a finite number above zero")
        self.time_scale = time_scale
        self.max_late_s = 0.0
        self._late_s, self._moments = 0.0, 0
        self._ended = ended
        self._begun = time.monotonic()
        self._inbox: queue.SimpleQueue[tuple[float, Callable[[], None]]] = queue.SimpleQueue()
        self._taken: tuple[float, Callable[[], None]] | None = None  # the next command, while an earlier event is to come
        self._posting = threading.Lock()  # moments of the inbox ascend, and nothing comes into it after the last drain
        self._over: EngineFailed | None = None
        self._thread = threading.Thread(target=self._run_thread, name=name, daemon=True)

    @property
    def present(self) -> float:
        """What the clock should show now, in its seconds; `now` is that of the last event or command."""
        return (time.monotonic() - self._begun) * self.time_scale

    @property
    def mean_late_s(self) -> float:
        """By how many wall seconds events came late; those of one moment count once."""
        return self._late_s / max(1, self._moments)

    def start(self) -> None:
        """Starts the thread; call once."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after what it is doing. Idempotent."""
        with self._posting:
            self._over = self._over or EngineFailed("the engine is closed")
            self._inbox.put((self.present, lambda: None))
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_S)

    def post(self, command: Callable[[], None]) -> None:
        """Has the thread call `command` at this moment of the clock; raises EngineFailed once it is closed."""
        with self._posting:
            self.check_alive()
            self._inbox.put((self.present, command))

    def check_alive(self) -> None:
        """Raises EngineFailed once it is closed or a handler has raised."""
        if self._over is not None:
            raise self._over

    def call(self, command: Callable[[], T]) -> T:
        """Posts a command and waits for what it returns or raises; EngineFailed when that takes too long. Not from the thread itself."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                answer.set_result(command())
            except Exception as error:
                answer.set_exception(error)

        self.post(run)
        try:
            return answer.result(_CALL_S)
        except TimeoutError as error:
            raise EngineFailed(f"the engine's thread has not answered for {_CALL_S} s") from error

    # --- the thread ----------------------------------------------------------------------------------------------------------

    def _run_thread(self) -> None:
        try:
            while self._over is None:
                self._turn()
        except Exception as error:  # a handler may raise anything: whoever waits must hear of it
            logging.exception("the engine's thread cannot go on")
            with self._posting:
                self._over = EngineFailed(f"the engine cannot go on: {type(error).__name__}: {error}")
        self._ended(self._over)
        while self._taken is not None or not self._inbox.empty():
            _, command = self._taken or self._inbox.get()
            self._taken = None
            try:
                command()
            except Exception:  # the commands behind it must still be called: buffers wait for them
                logging.exception("a command failed while the engine was closing")

    def _turn(self) -> None:
        """The next event or command, whichever is earlier; waits until there is one whose time has come."""
        due = self._heap[0][0] if self._heap else math.inf
        if self._taken is None:
            with contextlib.suppress(queue.Empty):
                self._taken = self._inbox.get(timeout=self._wait_s(due))
        if self._taken is not None and self._taken[0] < due:
            (moment, command), self._taken = self._taken, None
            self.run(max(moment, self.now))
            command()
        elif (wait_s := self._wait_s(due)) is not None and wait_s <= 0:
            self._note_late(due)
            self.run(due)

    def _wait_s(self, due: float) -> float | None:
        return None if due == math.inf else min(max(0.0, (due - self.present) / self.time_scale), _LONGEST_S)

    def _note_late(self, due: float) -> None:
        late_s = (self.present - due) / self.time_scale
        self._late_s += late_s
        self._moments += 1
        self.max_late_s = max(self.max_late_s, late_s)

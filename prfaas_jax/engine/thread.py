"""One engine thread owns every jax call; other threads only post commands to it."""

import abc
import contextlib
import queue
import threading
from collections.abc import Callable

from absl import logging

from prfaas_jax.errors import EngineFailed

_CLOSE_DEADLINE_S = 60.0


class EngineThread(abc.ABC):
    """Runs posted commands between steps. Subclasses give `_step`, `_fail_all`, `_reset` and call `_post`."""

    def __init__(self, name: str):
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._posting = threading.Lock()  # a command is either in the inbox before the last drain, or refused
        self._lost: EngineFailed | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread; call once."""
        self._thread.start()

    def close(self) -> None:
        """Stops after the step in progress; outstanding jobs fail. Idempotent."""
        with self._posting:
            self._closing.set()
            self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(_CLOSE_DEADLINE_S)

    def _post(self, command: Callable[[], None]) -> None:
        with self._posting:
            if self._closing.is_set():
                raise self._lost or EngineFailed("the engine is closed")
            self._inbox.put(command)

    def _post_unless_closed(self, command: Callable[[], None]) -> None:
        """For jobs that have failed already when the engine is closed."""
        with contextlib.suppress(EngineFailed):
            self._post(command)

    def _check_alive(self) -> None:
        """Raises EngineFailed when a failure has ended the engine for good."""
        if self._lost is not None:
            raise self._lost

    def _run(self) -> None:
        busy = False
        while not self._closing.is_set():
            try:
                self._drain(wait=not busy)
                busy = self._step()
            except Exception as error:  # a step may raise anything (XLA errors, OOM): the requests fail, the engine lives
                logging.exception("engine step failed")
                busy = False
                self._recover(EngineFailed(f"engine step failed: {type(error).__name__}: {error}"))
        while not self._inbox.empty():
            try:
                self._drain(wait=False)
            except Exception:  # whatever it raises: the jobs of the commands behind it must hear of the end
                logging.exception("a command failed while the engine was closing")
        self._fail_all(self._lost or EngineFailed("the engine was closed"))

    def _recover(self, error: EngineFailed) -> None:
        try:
            self._fail_all(error)
            self._reset()
        except Exception as fatal:  # no memory for new pools, a lost device: from now on every job is refused
            logging.exception("the engine cannot go on")
            with self._posting:
                self._lost = EngineFailed(f"the engine cannot go on: {type(fatal).__name__}: {fatal}")
                self._closing.set()

    def _drain(self, wait: bool) -> None:
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return
            command()
            wait = False

    @abc.abstractmethod
    def _step(self) -> bool:
        """Does one round of work; returns whether there is more to do without a new command."""

    @abc.abstractmethod
    def _fail_all(self, error: EngineFailed) -> None:
        """Fails every outstanding job and gives back what it held."""

    @abc.abstractmethod
    def _reset(self) -> None:
        """Makes the engine usable again after a failed step."""

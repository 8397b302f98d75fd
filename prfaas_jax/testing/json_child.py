"""A child process that is told JSON lines on stdin and answers each with one on stdout, all with deadlines."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from prfaas_jax.errors import PrfaasError
from prfaas_jax.serving.launcher import LaunchFailed

_GRACE_S = 5.0
_TAIL_BYTES = 4096


class ChildFailed(PrfaasError):
    """A child ended or was silent where it should have answered; the message ends with the last of what it wrote to stderr."""


class JsonChild:
    """Runs `command` while the block is entered; it is ready once it has printed its first JSON line.

    What else it prints is ignored. The end of its stdin, which comes at the latest with the end of this process, tells it to stop.

    Attributes:
        ready: that first line.
        pid: its process id.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, ready_s: float = 60.0, cwd: Path | None = None
    ):
        """Starts nothing yet.

        Args:
            name: what messages call it.
            command: program and arguments.
            env: its whole environment; None is this process's own.
            ready_s: seconds until it must be ready.
            cwd: its working directory; None is this process's own.
        """
        self._name, self._command, self._ready_s, self._cwd = name, list(command), ready_s, cwd
        self._env = dict(os.environ if env is None else env)
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> "JsonChild":
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._env,
            cwd=self._cwd,
            start_new_session=True,  # ctrl-C reaches the parent alone
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, name=f"stdout {self._name}", daemon=True)
        self._reader.start()
        try:
            self.ready = self._next(self._ready_s)
        except BaseException as error:
            self._process.kill()
            self.__exit__(None, None, None)
            if isinstance(error, ChildFailed):
                raise LaunchFailed(str(error)) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        self.thaw()
        with contextlib.suppress(OSError):
            stdin.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_GRACE_S)
        self._reader.join(_GRACE_S)
        self._log.close()

    def ask(self, message: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        """Tells it one thing and returns its answer; raises ChildFailed when it ends or has not answered in `deadline_s` seconds."""
        self.tell(message)
        return self.answer(deadline_s)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Tells it one thing; `answer` has what it says."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except OSError as error:
            raise ChildFailed(f"{self._name} is gone; it ended with\n{self._tail()}") from error

    def answer(self, deadline_s: float) -> dict[str, Any]:
        """Its next line; raises ChildFailed likewise."""
        return self._next(deadline_s)

    def freeze(self) -> None:
        """Stops it where it is, until `thaw`; it would not see the end of its stdin meanwhile."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        self._process.send_signal(signal.SIGCONT)

    def _next(self, deadline_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            raise ChildFailed(f"{self._name} said nothing for {deadline_s} s; its stderr ends with\n{self._tail()}") from None
        if line is None:
            self._lines.put(None)
            raise ChildFailed(f"{self._name} ended with code {self._process.wait(_GRACE_S)}; its stderr ends with\n{self._tail()}")
        return line

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                # Libraries print, too.
                if line.startswith(b"{"):
                    with contextlib.suppress(ValueError):
                        self._lines.put(json.loads(line))
        self._lines.put(None)

    def _tail(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")

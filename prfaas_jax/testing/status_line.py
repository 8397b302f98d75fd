"""A line on the terminal that says what is going on while something else works."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_TTY_S, _LOG_S = 0.5, 10.0


class StatusLine:
    """Shows `describe()` and the seconds since the start while the block runs.

    On a terminal it is one line that is rewritten, and gone at the end; elsewhere a new line every ten seconds.
    """

    def __init__(self, describe: Callable[[], str], stream: TextIO | None = None, period_s: float | None = None):
        """`stream` is stderr when None; `describe` is called on a thread."""
        self._describe, self._stream = describe, stream or sys.stderr
        self._rewrite = self._stream.isatty()
        self._period_s = period_s or (_TTY_S if self._rewrite else _LOG_S)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status line", daemon=True)

    def __enter__(self) -> "StatusLine":
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Takes the line away, so that other output can follow; idempotent."""
        if not self._done.is_set():
            self._done.set()
            self._thread.join()
            if self._rewrite:
                self._write("\r\x1b[K")

    def _run(self) -> None:
        while not self._done.wait(self._period_s):
            text = f"{self._describe()} ... {time.monotonic() - self._started:.0f} s"
            self._write(f"\r{text}\x1b[K" if self._rewrite else f"{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

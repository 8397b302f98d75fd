"""SIGTERM and SIGINT as something to wait for, in an event loop or out of one."""

import contextlib
import select
import signal
import socket
from types import TracebackType

_ENDS = (signal.SIGTERM, signal.SIGINT)


class EndSignals:
    """A block of the main thread in which SIGTERM and SIGINT end nothing: they make `fileno()` readable and let `wait` return.

    After the block both are ignored: what follows is the end, and has deadlines of its own.
    """

    # A handler alone is not enough: it runs in the main thread, and a signal that another thread receives, or that comes just before
    # the main thread goes to sleep, does not wake it. The wakeup descriptor is written by whichever thread receives it.
    def __init__(self) -> None:
        self._told, self._tells = socket.socketpair()
        self._tells.setblocking(False)

    def __enter__(self) -> "EndSignals":
        self._wakeup_before = signal.set_wakeup_fd(self._tells.fileno(), warn_on_full_buffer=False)
        for number in _ENDS:
            signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in _ENDS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wakeup_before)
        self._told.close()
        self._tells.close()

    def fileno(self) -> int:
        """Readable, and for good, once a signal has come."""
        return self._told.fileno()

    def tell(self) -> None:
        """As if a signal had come; from any thread."""
        with contextlib.suppress(OSError):  # told more often than a socket holds, or after the block
            self._tells.send(b"\0")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether a signal has come, after at most `timeout_s` seconds; None waits for it."""
        return bool(select.select([self._told], [], [], timeout_s)[0])

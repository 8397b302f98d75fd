"""The way from an engine's thread to the event loop: one bounded queue per request."""

import asyncio
import collections
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from prfaas_jax.errors import Exhausted

T = TypeVar("T")

_ITEM_BYTES = 64


class EventQueue(Generic[T]):
    """Items pushed from any thread, taken in order by one coroutine, each with the monotonic second at which it was pushed.

    The producer never waits: a consumer that lets more than `limit_bytes` pile up loses the queue instead, with Exhausted.
    """

    def __init__(self, limit_bytes: int, weigh: Callable[[T], int] = lambda item: 0):
        self._loop = asyncio.get_running_loop()
        self._weigh = weigh
        self._limit = limit_bytes
        self._items: collections.deque[tuple[T, float, int]] = collections.deque()
        self._bytes = 0
        self._overflowed = False
        self._ready = asyncio.Event()

    def push(self, item: T) -> None:
        """Thread-safe; never blocks and never raises, so an engine may call it as its sink."""
        now = time.monotonic()
        try:
            self._loop.call_soon_threadsafe(self._append, item, now)
        except RuntimeError:
            # The loop is closed: the server is gone, and with it whoever would have read this.
            return

    async def get(self) -> tuple[T, float]:
        """The next item and when it was pushed; raises Exhausted once the limit was passed."""
        while not self._items and not self._overflowed:
            self._ready.clear()
            await self._ready.wait()
        if self._overflowed:
            raise Exhausted(f"the client reads too slowly: more than {self._limit} bytes of undelivered events")
        item, at, nbytes = self._items.popleft()
        self._bytes -= nbytes
        return item, at

    def _append(self, item: T, at: float) -> None:
        if self._overflowed:
            return
        nbytes = _ITEM_BYTES + self._weigh(item)
        if self._bytes + nbytes > self._limit:
            self._overflowed = True
            self._items.clear()
        else:
            self._bytes += nbytes
            self._items.append((item, at, nbytes))
        self._ready.set()

"""One direction of an emulated link: when bytes leave the line, when they arrive, and what is planned to happen to them on the way.

No sockets here. Times are seconds of one monotonic clock that the caller reads.
"""

import bisect
import dataclasses
import heapq
import math
import random
from collections.abc import Iterable
from typing import Literal

# What one read takes at most, and so the size of a relay's buffers: large reads are cheap, and this still fits a core's cache.
READ_BYTES = 256 << 10
# Shaped reads are a millisecond of the line each, and run this far ahead of it: the event loop's clock ticks in milliseconds.
_READ_S = 0.001
_AHEAD_S = 0.002
_AHEAD_BYTES = 256 << 10
# What a late wake-up of the loop may catch up on, and what a sender that had nothing for the line may.
_LATE_S = 0.02
_IDLE_S = 0.002
# What may fly beyond rate x delay: a line that catches up sends more than that.
_BURST_BYTES = 512 << 10
_QUEUE_S = 0.004
_QUEUE_BYTES = 256 << 10, 2 << 20
FOREVER = math.inf


@dataclasses.dataclass(order=True, frozen=True)
class Mark:
    """What happens to the connection that would carry the byte at `offset`; `seconds` is the length of a black hole."""

    offset: int
    kind: Literal["reset", "half_close", "black_hole"]
    seconds: float = FOREVER


class Flips:
    """Bytes to damage, by offset: chosen ones, and random ones at a rate that do not depend on how the bytes are read."""

    def __init__(self) -> None:
        self._chosen: list[int] = []
        self._next_random: float = FOREVER
        self._per_byte = 0.0
        self._rng = random.Random()

    def add(self, offsets: Iterable[int]) -> None:
        """Each of these bytes will have one bit inverted."""
        for offset in offsets:
            bisect.insort(self._chosen, offset)

    def set_rate(self, per_byte: float, seed: int, start: int) -> None:
        """From offset `start` on every byte is damaged with this probability; 0 ends it."""
        self._per_byte, self._rng = per_byte, random.Random(seed)
        self._next_random = start + self._gap()

    def apply(self, data: memoryview, start: int) -> None:
        """Damages, in place, what is due among the bytes that begin at offset `start`."""
        end = start + len(data)
        while self._chosen and self._chosen[0] < end:
            data[self._chosen.pop(0) - start] ^= 0x10
        while self._next_random < end:
            data[int(self._next_random) - start] ^= 1 << self._rng.randrange(8)
            self._next_random += 1 + self._gap()

    def _gap(self) -> float:
        """Whole bytes before the next one that is damaged: geometric."""
        if self._per_byte <= 0:
            return FOREVER
        if self._per_byte >= 1:
            return 0
        return math.floor(math.log(1.0 - self._rng.random()) / math.log1p(-self._per_byte))


@dataclasses.dataclass
class Link:
    """A serial line of `bytes_per_s` that all connections share, then a delay.

    `passed` counts the bytes put on it; `flying` those of them that have not arrived, which whoever carries them takes off.
    """

    bytes_per_s: float = FOREVER
    delay_s: float = 0.0
    jitter_s: float = 0.0
    slice_bytes: int | None = None
    slice_pause_s: float = 0.0
    stalled_until: float = -FOREVER
    passed: int = 0
    flying: int = 0
    flips: Flips = dataclasses.field(default_factory=Flips)
    marks: list[Mark] = dataclasses.field(default_factory=list)
    _free_at: float = 0.0  # when the line has sent all that it was given
    _idle: bool = True

    def read_size(self) -> int:
        """Bytes that the next read may take; 0 when a mark is due."""
        size = int(min(READ_BYTES, max(1024, self.bytes_per_s * _READ_S)))
        if self.slice_bytes is not None:
            size = min(size, self.slice_bytes)
        return min(size, self.marks[0].offset - self.passed) if self.marks else size

    def queue_size(self) -> int:
        """Bytes of a connection to let the kernel queue in front of the line: what a late wake-up of the loop finds there."""
        return int(min(_QUEUE_BYTES[1], max(_QUEUE_BYTES[0], self.bytes_per_s * _QUEUE_S)))

    def reads_at(self) -> float:
        """When the line is ready for the next read; infinity while as much flies as can."""
        if self.bytes_per_s < FOREVER and self.flying > self.bytes_per_s * (self.delay_s + self.jitter_s) + _BURST_BYTES:
            return FOREVER
        return self._free_at - min(_AHEAD_S, _AHEAD_BYTES / self.bytes_per_s)

    def put(self, now: float, nbytes: int) -> float:
        """Puts bytes on the line; when it will have sent the last of them."""
        earliest = now - (_IDLE_S if self._idle else _LATE_S)
        self._idle = False
        self._free_at = max(earliest, self._free_at) + nbytes / self.bytes_per_s
        self.passed += nbytes
        self.flying += nbytes
        return max(now, self._free_at)

    def starve(self) -> None:
        """No sender has anything for the line."""
        self._idle = True

    def mark(self, mark: Mark) -> None:
        """Plans something for later."""
        heapq.heappush(self.marks, mark)

    def take_mark(self) -> Mark:
        """The one that is due."""
        return heapq.heappop(self.marks)

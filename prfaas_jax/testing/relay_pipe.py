"""One direction of one relayed connection: reads as its link allows, holds bytes while they fly, delivers them in order."""

import random
import socket
from collections import deque

from prfaas_jax.testing.relay_link import FOREVER, READ_BYTES, Link

# What has arrived and a receiver does not take, until its sender is held back.
_LANDED_BYTES = 256 << 10
# How far reads run ahead of paused slices.
_SLICES_AHEAD_S = 0.002


class Buffers:
    """Read buffers that are used again: fresh memory costs more, in page faults, than the copy into it."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        """One of READ_BYTES, with anything in it."""
        return self._free.pop() if self._free else bytearray(READ_BYTES)

    def give(self, buffer: bytearray) -> None:
        """Back from where it was taken."""
        self._free.append(buffer)


class Pipe:
    """Moves bytes from `source` to `sink` over `link`. Both sockets are non-blocking; OSError means that the connection is gone.

    Attributes:
        readable: the source may have something; the caller sets it when the selector says so.
        writable: the sink may take something; likewise.
        ended: no more is read; once all is delivered the sink is told.
        resets: no more is read; once all is delivered the connection is to be reset.
        shut: the sink was told that no more comes.
        held: bytes read and not yet delivered.
    """

    def __init__(self, source: socket.socket, sink: socket.socket, link: Link, rng: random.Random, buffers: Buffers):
        self.source, self.sink, self.link = source, sink, link
        self.readable, self.writable = False, True
        self.ended = self.resets = self.shut = False
        self.held = 0
        self._rng, self._buffers = rng, buffers
        # (arrival time, bytes, the buffer they lie in or None when it is their own)
        self._flying: deque[tuple[float, memoryview, bytearray | None]] = deque()
        self._landed: deque[tuple[memoryview, bytearray | None]] = deque()
        self._landed_bytes = 0
        self._sliced_at = self._last_arrival = -FOREVER

    @property
    def spent(self) -> bool:
        """All that came has been delivered and a reset is due."""
        return self.resets and not self.held

    def reads_at(self) -> float:
        """When the next read is due, were the source readable; infinity while only another event can bring one about."""
        if self.ended or self.resets or self._landed_bytes >= _LANDED_BYTES:
            return FOREVER
        ready = max(self.link.reads_at(), self.link.stalled_until)
        return max(ready, self._sliced_at + self.link.slice_pause_s - _SLICES_AHEAD_S) if self.link.slice_pause_s else ready

    def acts_at(self) -> float:
        """When time alone gives this pipe something to do."""
        reads = self.reads_at() if self.readable else FOREVER
        if self._landed:
            delivers = self.link.stalled_until if self.writable else FOREVER
        elif self._flying:
            delivers = max(self._flying[0][0], self.link.stalled_until)
        else:
            delivers = self.link.stalled_until if self.resets or (self.ended and not self.shut) else FOREVER
        return min(reads, delivers)

    def read(self, now: float) -> bool:
        """Takes one read from the source if that is allowed now; whether it did anything."""
        if not self.readable or self.reads_at() > now:
            return False
        size = self.link.read_size()
        if size <= 0:
            self._obey(now)
            return True
        buffer = self._buffers.take()
        try:
            count = self.source.recv_into(buffer, size)
        except BlockingIOError:
            self._buffers.give(buffer)
            self.readable = False
            return False
        except OSError:
            self._buffers.give(buffer)
            raise
        # A short read emptied the source, and spares the read that would say so; only the selector tells of the end, though.
        self.readable = count == size or count == 0
        if count == 0:
            self._buffers.give(buffer)
            self.ended = True
            return True
        self._take(now, buffer, count)
        return True

    def _take(self, now: float, buffer: bytearray, count: int) -> None:
        link, data, owner = self.link, memoryview(buffer)[:count], buffer
        link.flips.apply(data, link.passed)
        sent = link.put(now, count)
        if link.slice_pause_s:
            sent = max(sent, self._sliced_at + link.slice_pause_s)
            self._sliced_at = sent
        # TCP keeps order, so jitter can only hold back what follows.
        self._last_arrival = max(self._last_arrival, sent + link.delay_s + self._rng.uniform(0, link.jitter_s))
        self.held += count
        if 2 * count >= READ_BYTES:
            self._flying.append((self._last_arrival, data, owner))
        else:
            # Few bytes must not hold a whole buffer while they fly.
            self._flying.append((self._last_arrival, memoryview(bytes(data)), None))
            self._buffers.give(buffer)

    def _obey(self, now: float) -> None:
        mark = self.link.take_mark()
        if mark.kind == "black_hole":
            self.link.stalled_until = now + mark.seconds
        elif mark.kind == "reset":
            self.resets = True
        else:
            self.ended = True

    def drop(self) -> None:
        """Forgets what it holds: the connection is gone."""
        self.link.flying -= self.held - self._landed_bytes
        self._flying.clear()
        self._landed.clear()
        self.held = self._landed_bytes = 0

    def deliver(self, now: float) -> bool:
        """Hands on what has arrived, each piece in a send of its own, and the end after it; whether it did anything."""
        if now < self.link.stalled_until:
            return False
        while self._flying and self._flying[0][0] <= now:
            _, data, owner = self._flying.popleft()
            self._landed.append((data, owner))
            self._landed_bytes += len(data)
            self.link.flying -= len(data)
        did = False
        while self._landed and self.writable:
            did = self._send_first() or did
        if self.ended and not self.held and not self.shut:
            self.shut = did = True
            self.sink.shutdown(socket.SHUT_WR)
        return did

    def _send_first(self) -> bool:
        data, owner = self._landed[0]
        try:
            sent = self.sink.send(data)
        except BlockingIOError:
            self.writable = False
            return False
        self._landed_bytes -= sent
        self.held -= sent
        if sent < len(data):
            self._landed[0] = data[sent:], owner
            self.writable = False
        else:
            self._landed.popleft()
            if owner is not None:
                self._buffers.give(owner)
        return True

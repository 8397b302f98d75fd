"""Memory that a server and its processes see together, in regions that are used again.

One anonymous file that all of them map: nothing has a name that could be left behind, and the last of them to end frees it. The file is
far larger than what is ever in use, for only bytes that were touched take memory.
"""

import contextlib
import functools
import mmap
import os
import queue
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Hashable

import numpy as np

from prfaas_jax.errors import Exhausted, InvalidInput

# Least region: sizes are powers of two from here.
_LEAST_BYTES = 64 << 10
_DISCARD_BYTES = 4 << 20
_IDLE_S = 10.0


class SharedMemory:
    """Maps the file; `fd` is inherited by a child that is told its number."""

    def __init__(self, fd: int, nbytes: int):
        """Maps a file that another process has made."""
        self.fd, self.nbytes = fd, nbytes
        self._map = mmap.mmap(fd, nbytes)
        # Regions that nobody in this process refers to any more; its put may be called from a finalizer, whatever that interrupts.
        self.unused: queue.SimpleQueue[Hashable] = queue.SimpleQueue()

    @classmethod
    def create(cls, nbytes: int) -> "SharedMemory":
        """Makes the file; raises InvalidInput when there cannot be such a one."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("prfaas")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        try:
            os.ftruncate(fd, nbytes)
            return cls(fd, nbytes)
        except (OSError, OverflowError, ValueError) as error:
            os.close(fd)
            raise InvalidInput("shared memory bytes", nbytes, f"a size that can be mapped ({error})") from error

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of a region, for who knows that it is taken."""
        return memoryview(self._map)[offset : offset + nbytes]

    def lease(self, name: Hashable, offset: int, nbytes: int) -> memoryview:
        """Bytes of a region; `name` is put into `unused` once nothing in this process refers to them, however they were cut."""
        whole = np.frombuffer(self._map, np.uint8, nbytes, offset)
        # A memoryview and all that is made from it keep this very array; another array on it would keep only the map.
        weakref.finalize(whole, functools.partial(self.unused.put, name)).atexit = False
        return whole.data

    def discard(self, offset: int, nbytes: int) -> None:
        """Gives the memory of a region back to the system; its bytes are zero afterwards."""
        if hasattr(mmap, "MADV_REMOVE"):
            for at in range(offset, offset + nbytes, _DISCARD_BYTES):  # which holds the GIL
                self._map.madvise(mmap.MADV_REMOVE, at, min(_DISCARD_BYTES, offset + nbytes - at))

    def close(self) -> None:
        """Closes the file, and unmaps it now or with its last lease; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(BufferError):
            self._map.close()


class Regions:
    """Which parts of a shared memory are taken. Not thread safe.

    What was given back last is taken first: pages that were touched are there already, and touching new ones costs more than a copy.
    """

    def __init__(self, memory: SharedMemory, spare_bytes: int):
        """`spare_bytes` of regions that nobody uses keep their memory at most; `taken` says how many are in use."""
        self._memory, self._spare_limit = memory, spare_bytes
        self._end = self._spare = self.taken = 0
        self._idle_since: float | None = None
        self._warm: dict[int, list[int]] = defaultdict(list)
        self._cold: dict[int, list[int]] = defaultdict(list)

    def take(self, nbytes: int) -> int:
        """Offset of a region of at least so many bytes; raises Exhausted."""
        size = _size(nbytes)
        fresh = not self._warm[size] and not self._cold[size]
        if fresh and self._end + size > self._memory.nbytes:
            raise Exhausted(f"shared memory of {self._memory.nbytes} bytes has no region of {size} bytes left")
        self.taken += 1
        if self._warm[size]:
            self._spare -= size
            return self._warm[size].pop()
        if self._cold[size]:
            return self._cold[size].pop()
        self._end += size
        return self._end - size

    def give(self, offset: int, nbytes: int) -> None:
        """Takes back what `take(nbytes)` gave."""
        size = _size(nbytes)
        self.taken -= 1
        if self._spare + size <= self._spare_limit:
            self._spare += size
            self._warm[size].append(offset)
        else:
            self._memory.discard(offset, size)
            self._cold[size].append(offset)

    def trim(self, now: float) -> None:
        """Gives all spare memory back to the system once nothing has been taken for a while; to be called now and then, with seconds."""
        if self.taken or self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since <= _IDLE_S:
            return
        for size, offsets in self._warm.items():
            for offset in offsets:
                self._memory.discard(offset, size)
            self._cold[size] += offsets
            offsets.clear()
        self._spare = 0


def _size(nbytes: int) -> int:
    return max(_LEAST_BYTES, 1 << (nbytes - 1).bit_length())

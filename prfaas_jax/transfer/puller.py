"""One request's cache on its way here: what lanes bring is verified, staged, handed on, and proven to be complete."""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from prfaas_jax.errors import InvalidInput, PrfaasError, TransferError
from prfaas_jax.kvcache.codecs import AS_CACHED, CacheCodec
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer import frames, wire
from prfaas_jax.transfer.assembly import Assembly, Block
from prfaas_jax.transfer.counters import Counters
from prfaas_jax.transfer.receivers import AnyLaneGroup

# Grants are said in about so many parts of the staging.
_GRANTS = 8
# A callback that hangs is waited for no longer than this.
_JOIN_S = 5.0


OnBlock = Callable[[SegmentKey, np.ndarray, Callable[[], None]], None]


class Puller:
    """Pulls one cache, by one ticket or, after a failure, by another one that stands for the same cache (`move`).

    `on_block(key, block, done)` is called from lane threads, several at a time, with verified full-head blocks
    `[layers, tokens, all heads, width]` as they travel (bfloat16 as uint16, read-only where a message holds all of it); it must not block.
    `done()` gives the block's memory back and may come from any thread, once. After a failure or `cancel`, blocks in flight are simply
    forgotten and their memory is never written again.

    The idle timer is the only clock: any message, any `done`, any `touch` restarts it. A sender may have sent no more than it was granted:
    what waits for `done` is not granted again, so a slow reader holds back its own transfer and nobody else's. That wait has its own
    timer, which `touch` does not restart.
    """

    def __init__(
        self,
        spec: CacheSpec,
        length: int,
        on_block: OnBlock,
        *,
        codec: CacheCodec = AS_CACHED,
        prefix: int = 0,
        checked: bool = True,
        compressed: bool = False,
        idle_s: float = 10.0,
        max_staging_bytes: int = 64 << 20,
    ):
        """Of a `length`-token cache, the first `prefix` tokens are here already. Raises InvalidInput for sizes out of range."""
        self._spec, self._wire_spec = spec, codec.wire_spec(spec)
        wire.check_spec(self._wire_spec)
        if length < 0:
            raise InvalidInput("length", length, "a number of tokens >= 0")
        if not 0 <= prefix <= length:
            raise InvalidInput("prefix", prefix, f"0..{length}, the prompt length")
        if not idle_s > 0:
            raise InvalidInput("idle_s", idle_s, "a positive number of seconds")
        if max_staging_bytes < 1:
            raise InvalidInput("max_staging_bytes", max_staging_bytes, "a positive number of bytes")
        self._length, self._prefix, self._on_block = length, prefix, on_block
        self._checked, self._compressed, self._idle_s = checked, compressed, idle_s
        self._changed = threading.Condition()
        self._assembly = Assembly(self._wire_spec, length, prefix, max_staging_bytes)
        self._wire_bytes = 0
        self._in_flight = 0  # blocks handed on whose `done` has not come
        self._handing: set[int] = set()  # threads in `on_block`
        self._parting = False  # somebody waits for these
        self._share = max_staging_bytes  # of the staging, for each source
        self._ticket: tuple[bytes, int] = (b"", 0)
        self._sources: dict[AnyLaneGroup, _Source] = {}
        self._error: TransferError | None = None
        self._progress = self._moved = time.monotonic()

    @property
    def staging_bytes(self) -> int:
        """Bytes of blocks being filled or waiting for `done`."""
        with self._changed:
            return self._assembly.staged

    @property
    def left_bytes(self) -> float:
        """Bytes that are still to come, as they travel: what is compressed is taken to shrink on as it did so far."""
        with self._changed:
            moved = self._assembly.moved
            return (self._assembly.total - moved) * (self._wire_bytes / moved if moved else 1.0)

    def start(self, ticket_id: bytes, epoch: int, groups: Sequence[AnyLaneGroup]) -> None:
        """Pulls a ticket over every group, each of which brings its share of it.

        After a failure it may be called again with another ticket for the same cache, cut in the same way: blocks that are here stay, and
        nothing of them is sent again. Raises InvalidInput for no groups.
        """
        if not groups:
            raise InvalidInput("lanes", groups, "at least one address")
        with self._changed:
            self._leave()
            self._error, self._parting = None, False
            self._ticket = (ticket_id, epoch)
            self._assembly.forget_partial()
            held = self._assembly.whole_blocks()
            self._progress = self._moved = time.monotonic()
            if self._over():
                return
            granted = (self._assembly.max_staging_bytes - self._assembly.staged) // len(groups)
            request = frames.Open(ticket_id, epoch, granted, self._checked, self._compressed, held)
            frames.encode(request)  # judged here, not in a lane's thread
            self._share = self._assembly.max_staging_bytes // len(groups)
            self._sources = {group: _Source(self, group, ticket_id, granted, self._share) for group in groups}
            sources = list(self._sources.items())
        try:
            for group, source in sources:
                group.open(request, source)
        except TransferError as error:
            self._fail(error)

    def touch(self) -> None:
        """Restarts the idle timer: the peer has shown a sign of life elsewhere."""
        with self._changed:
            self._progress = time.monotonic()

    def finish(self, expected_bytes: int) -> Counters:
        """Waits until every byte is verified, handed on and `done`; call after `start`.

        `expected_bytes` is what the sender says will travel, before compression. Raises TransferError when anything is wrong, missing,
        idle or cancelled; on return and on raise no lane hands anything more to this transfer.
        """
        try:
            if expected_bytes != self._assembly.total:
                whole = f"{self._length} tokens have {self._assembly.total}"
                self._fail(TransferError(f"sender exported {expected_bytes} bytes, {whole}"))
            with self._changed:
                while not self._over():
                    self._changed.wait(self._time_left())
                if self._error is not None:
                    raise self._error
                moved, skipped = self._spec.bytes(self._length, self._prefix), self._spec.bytes(self._length)
                counters = Counters(moved, skipped - moved, self._assembly.resent, 0, self._wire_bytes)
        finally:
            self._part()
        counters.check(self._spec, self._length)
        return counters

    def cancel(self) -> None:
        """Ends the transfer from any thread, and waits, boundedly, until no lane hands it anything; harmless when it is over."""
        self._fail(TransferError("transfer cancelled"))
        self._part()

    def _part(self) -> None:
        """Leaves the lanes; what one of them is in the middle of handing on is waited for, unless it is this very call's doing."""
        with self._changed:
            self._leave()
            self._parting = True
            self._changed.wait_for(lambda: self._handing <= {threading.get_ident()}, _JOIN_S)

    # --- with the lock held --------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        for group in self._sources:
            group.release(self._ticket[0])
        self._sources = {}

    def _over(self) -> bool:
        return self._error is not None or (self._in_flight == 0 and self._assembly.complete)

    def _wake(self) -> None:
        """Who waits, waits for an end: to be woken for every block costs more than the block."""
        if self._parting or self._over():
            self._changed.notify_all()

    def _time_left(self) -> float:
        """Seconds until one of the timers runs out; sets the error when one has."""
        now, staged = time.monotonic(), self._assembly.staged
        left = self._progress + self._idle_s - now
        if left <= 0:
            self._error = TransferError(f"no progress for {self._idle_s} s; {staged} bytes staged, missing: {self._assembly.gap()}")
            return 0.0
        if not self._in_flight:
            return left
        waits = self._moved + self._idle_s - now
        if waits <= 0:
            self._error = TransferError(f"staging full for {self._idle_s} s: {staged} bytes wait for their reader")
        return max(0.0, min(left, waits))

    # --- from lane threads -----------------------------------------------------------------------------------------------------------

    def _fail(self, error: TransferError) -> None:
        with self._changed:
            if not self._over():
                self._error = error
                self._changed.notify_all()

    def _take(self, source: "_Source", header: wire.Header, payload: memoryview, wire_bytes: int) -> None:
        header.check(self._wire_spec, self._length, self._prefix)
        with self._changed:
            if self._error is not None or self._sources.get(source.group) is not source:
                return
            self._progress = self._moved = time.monotonic()
            self._wire_bytes += wire_bytes
            source.came += payload.nbytes
            block = self._assembly.claim(header, payload)
            if block is None:
                source.grant(payload.nbytes, now=True)
                return
            block.owed[source] = block.owed.get(source, 0) + payload.nbytes
            if header.segment_bytes > self._share:
                mine = f"{self._share} bytes, its part of max_staging_bytes={self._assembly.max_staging_bytes}"
                raise TransferError(f"{header.key} has {header.segment_bytes} bytes; each of {len(self._sources)} senders may have {mine}")
            if not block.complete:
                if not self._in_flight:
                    source.grant(0, now=source.short)  # no `done` will come before this block is whole
                return
            self._in_flight += 1
            self._handing.add(threading.get_ident())
        try:
            self._on_block(block.key, self._build(block), lambda: self._done(block))
        except BaseException:
            with self._changed:
                if block.pieces is not None:
                    # Nobody has it: should another ticket follow, it is to come again.
                    self._in_flight -= 1
                    self._assembly.forget(block)
            raise
        finally:
            with self._changed:
                self._handing.discard(threading.get_ident())
                self._wake()

    def _build(self, block: Block) -> np.ndarray:
        if block.in_one_piece:
            return block.build(None)
        with self._changed:
            buffer = self._assembly.buffer_for(block)
        return block.build(buffer)

    def _done(self, block: Block) -> None:
        with self._changed:
            if not self._assembly.free(block):
                return
            self._in_flight -= 1
            self._progress = self._moved = time.monotonic()
            self._wake()
            owed, block.owed = block.owed, {}
            owner: _Source
            for owner, nbytes in owed.items():
                if self._sources.get(owner.group) is owner:
                    owner.grant(nbytes)
                elif self._sources:
                    # What an earlier ticket brought makes room for the present one, where there is least.
                    min(self._sources.values(), key=lambda s: s.granted - s.came).grant(nbytes)
            if not self._in_flight:
                # What is not said must not be what a block that has begun waits for.
                for source in self._sources.values():
                    source.grant(0, now=source.short)

    def _ended(self) -> None:
        with self._changed:
            if all(source.over for source in self._sources.values()) and not self._assembly.complete:
                self._error = self._error or TransferError(f"every lane has ended; missing: {self._assembly.gap()}")
                self._changed.notify_all()


class _Source:
    """A transfer's share of one group: its grant, and its ear there."""

    def __init__(self, puller: Puller, group: AnyLaneGroup, ticket: bytes, granted: int, share: int):
        self._puller, self.group, self._ticket, self.granted, self._share = puller, group, ticket, granted, share
        self._unsaid = 0
        self.came = 0
        self.over = False

    @property
    def short(self) -> bool:
        """The sender may have little left to send of what it knows to be granted."""
        return self.granted - self._unsaid - self.came <= self._share // 2

    def grant(self, nbytes: int, now: bool = False) -> None:
        """Room for so many more, which the sender hears `now` or when it has become much; with the puller's lock held."""
        self.granted += nbytes
        self._unsaid += nbytes
        if self._unsaid and (now or self._unsaid >= self._share // _GRANTS):
            self._unsaid = 0
            self.group.grant(self._ticket, self.granted)

    def take(self, header: wire.Header, payload: memoryview, wire_bytes: int) -> None:
        """See Receiver.take."""
        try:
            self._puller._take(self, header, payload, wire_bytes)
        except PrfaasError as error:
            self._puller._fail(TransferError(f"lane {self.group.address}: {error}"))
        except Exception as error:  # whatever a callback raises ends the transfer, and must not end silently with a lane's thread
            failure = TransferError(f"lane {self.group.address}: {type(error).__name__} while handing on a block: {error}")
            failure.__cause__ = error
            self._puller._fail(failure)

    def ended(self) -> None:
        """See Receiver.ended."""
        self.over = True
        self._puller._ended()

    def failed(self, error: TransferError) -> None:
        """See Receiver.failed."""
        self._puller._fail(error)

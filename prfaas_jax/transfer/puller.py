"""The receiving end of a request's lanes: pull, verify, stage, hand on, and prove that nothing is missing."""

import threading
import time
from collections.abc import Callable, Sequence

import grpc
import numpy as np

from prfaas_jax.errors import InvalidInput, PrfaasError, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer import wire
from prfaas_jax.transfer.assembly import Assembly, Block, Staging
from prfaas_jax.transfer.channel import LANE_CHANNEL_OPTIONS
from prfaas_jax.transfer.counters import Counters
from prfaas_jax.transfer.lane import METHOD
from prfaas_jax.transfer.security import NONE, Security, open_channel

OnBlock = Callable[[SegmentKey, np.ndarray, Callable[[], None]], None]

# A lane thread leaves its blocking call at once when cancelled; only a callback that hangs could keep it longer.
_JOIN_S = 5.0


class Puller:
    """Pulls one ticket's cache over all its lanes.

    `on_block(key, block, done)` is called from lane threads, several at a time, with verified full-head blocks
    `[layers, tokens, all heads, width]` (bfloat16 as uint16); `done()` gives the block's memory back and may come from any thread,
    once. After a failure or `cancel`, blocks in flight are simply forgotten and their memory is never written again.

    The idle timer is the only clock: any message, any `done`, any `touch` restarts it. A lane that has no room to stage waits for
    `done` without reading, so HTTP/2 flow control holds the sender; that wait has its own timer, which `touch` does not restart.
    """

    def __init__(
        self,
        spec: CacheSpec,
        length: int,
        ticket_id: bytes,
        epoch: int,
        lanes: Sequence[str],
        on_block: OnBlock,
        idle_s: float = 10.0,
        max_staging_bytes: int = 64 << 20,
        security: Security = NONE,
    ):
        """Raises InvalidInput for a spec that lanes cannot carry, no lanes, or sizes out of range."""
        wire.check_spec(spec)
        if length < 0:
            raise InvalidInput("length", length, "a number of tokens >= 0")
        if not lanes:
            raise InvalidInput("lanes", lanes, "at least one address")
        if not idle_s > 0:
            raise InvalidInput("idle_s", idle_s, "a positive number of seconds")
        if max_staging_bytes < 1:
            raise InvalidInput("max_staging_bytes", max_staging_bytes, "a positive number of bytes")
        self._spec, self._length = spec, length
        self._ticket, self._epoch = ticket_id, epoch
        self._request = wire.FetchRequest(ticket_id, epoch).encode()
        self._on_block = on_block
        self._idle_s = idle_s
        self._security = security
        self._changed = threading.Condition()
        self._assembly = Assembly(spec, length, Staging(max_staging_bytes))
        self._in_flight = 0  # blocks handed on whose `done` has not come
        self._lanes_open = len(lanes)
        self._channels: list[grpc.Channel] = []
        self._error: TransferError | None = None
        self._progress = 0.0
        self._readers = [threading.Thread(target=self._read, args=(lane,), name=f"pull {lane}", daemon=True) for lane in lanes]
        self._monitor = threading.Thread(target=self._watch, name="pull monitor", daemon=True)

    @property
    def staging_bytes(self) -> int:
        """Bytes of blocks being filled or waiting for `done`."""
        with self._changed:
            return self._assembly.staging.in_use

    def start(self) -> None:
        """Starts to pull; call once."""
        self._progress = time.monotonic()
        self._monitor.start()

    def touch(self) -> None:
        """Restarts the idle timer: the peer has shown a sign of life elsewhere."""
        with self._changed:
            self._progress = time.monotonic()

    def finish(self, expected_bytes: int) -> Counters:
        """Waits until every byte is verified, handed on and `done`; call after `start`.

        `expected_bytes` is what the sender says it exported. Raises TransferError when anything is wrong, missing, idle or cancelled;
        on return and on raise every thread and channel of this transfer is gone.
        """
        if expected_bytes != self._assembly.total:
            self._fail(TransferError(f"sender exported {expected_bytes} bytes, {self._length} tokens have {self._assembly.total}"))
        # Bounded: the monitor ends with the transfer, and its idle timer ends a transfer without progress.
        self._monitor.join()
        with self._changed:
            if self._error is not None:
                raise self._error
            counters = Counters(moved=self._assembly.moved, resent=self._assembly.resent)
        counters.check(self._spec, self._length)
        return counters

    def cancel(self) -> None:
        """Ends the transfer from any thread and waits, boundedly, for its threads and channels; harmless when it is over."""
        self._fail(TransferError("transfer cancelled"))
        # From inside `on_block` or `done` the caller may be one of the threads to wait for.
        if self._monitor.is_alive() and threading.current_thread() not in (self._monitor, *self._readers):
            self._monitor.join(2 * _JOIN_S)

    def _fail(self, error: TransferError) -> None:
        with self._changed:
            if not self._over():
                self._error = error
                self._changed.notify_all()

    def _over(self) -> bool:
        return self._error is not None or (self._in_flight == 0 and self._assembly.complete)

    def _watch(self) -> None:
        """Starts the lanes, runs the idle timer, and takes everything down at the end, whatever the end is."""
        with self._changed:
            # Nothing to move (length 0), or cancelled already: no lane is needed.
            readers = [] if self._over() else self._readers
            for reader in readers:
                reader.start()
            while not self._over():
                left = self._progress + self._idle_s - time.monotonic()
                if left <= 0:
                    staged, gap = self._assembly.staging.in_use, self._assembly.gap()
                    self._error = TransferError(f"no progress for {self._idle_s} s; {staged} bytes staged, missing: {gap}")
                    break
                self._changed.wait(left)
            self._changed.notify_all()
            channels = list(self._channels)
        for channel in channels:
            channel.close()
        deadline = time.monotonic() + _JOIN_S
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))

    def _read(self, lane: str) -> None:
        """One lane, from connection to end of stream."""
        channel = open_channel(lane, LANE_CHANNEL_OPTIONS, self._security)
        with self._changed:
            if self._over():
                channel.close()
                return
            call = channel.unary_stream(METHOD)(self._request)
            self._channels.append(channel)
        try:
            for sequence, message in enumerate(call):
                self._take(sequence, message)
            self._lane_ended()
        except grpc.RpcError:
            # The call is its own error; it has a status by now.
            self._fail(TransferError(f"lane {lane}: {call.code().name}: {call.details()}"))
        except PrfaasError as error:
            self._fail(TransferError(f"lane {lane}: {error}"))
        except Exception as error:  # whatever a callback raises ends the transfer, and must not end silently with its thread
            failure = TransferError(f"lane {lane}: {type(error).__name__} while handing on a block: {error}")
            failure.__cause__ = error
            self._fail(failure)
        finally:
            channel.close()

    def _take(self, sequence: int, message: bytes) -> None:
        header, payload = wire.decode(message)
        if (header.ticket, header.epoch) != (self._ticket, self._epoch):
            raise TransferError(
                f"message of ticket {header.ticket.hex()} epoch {header.epoch}, not {self._ticket.hex()} epoch {self._epoch}"
            )
        if header.sequence != sequence:
            raise TransferError(f"message {header.sequence} came where message {sequence} was due")
        header.check(self._spec, self._length, payload.nbytes)
        with self._changed:
            self._progress = time.monotonic()
            self._wait_for_room(header.key)
            block = self._assembly.claim(header, payload.nbytes)
        if block is None:
            return
        block.write(header.key.heads, header.offset, payload)
        with self._changed:
            elements = self._assembly.wrote(block, payload.nbytes)
            if elements is None:
                return
            self._in_flight += 1
        self._on_block(block.key, elements, lambda: self._done(block))

    def _wait_for_room(self, key: SegmentKey) -> None:
        """Returns once the segment's block exists or fits; raises TransferError when the transfer ends or nothing is freed in time."""
        in_use, since = self._assembly.staging.in_use, time.monotonic()
        while self._error is None and not self._assembly.fits(key):
            if self._assembly.staging.in_use != in_use:
                in_use, since = self._assembly.staging.in_use, time.monotonic()
            left = since + self._idle_s - time.monotonic()
            if left <= 0:
                raise TransferError(f"staging full for {self._idle_s} s: {in_use} bytes wait for their reader or for other head slices")
            self._changed.wait(left)
        if self._error is not None:
            raise self._error

    def _done(self, block: Block) -> None:
        with self._changed:
            if block.buffer is None:
                return
            self._assembly.free(block)
            self._in_flight -= 1
            self._progress = time.monotonic()
            self._changed.notify_all()

    def _lane_ended(self) -> None:
        with self._changed:
            self._lanes_open -= 1
            if not self._lanes_open and not self._assembly.complete:
                self._error = self._error or TransferError(f"every lane has ended; missing: {self._assembly.gap()}")
                self._changed.notify_all()

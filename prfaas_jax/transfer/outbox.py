"""What a prefill server holds for pulling: segments by ticket, bounded in bytes, kept for a lease."""

import dataclasses
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator

from prfaas_jax.errors import Exhausted, InvalidInput, PrfaasError, TransferError
from prfaas_jax.kvcache.segments import Segment
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer import wire

# How often a waiting stream asks whether its reader is still there.
_POLL_S = 0.1


class UnknownTicket(TransferError):
    """No such ticket: never opened, released, or its lease expired."""


class StaleEpoch(TransferError):
    """The ticket exists under another epoch."""


@dataclasses.dataclass(frozen=True)
class Ticket:
    """Names one request's cache. The server chooses `id` (16 random bytes), so a client cannot guess or reuse one."""

    id: bytes
    epoch: int

    @property
    def hex(self) -> str:
        """`id` as 32 hex digits."""
        return self.id.hex()


@dataclasses.dataclass(eq=False)
class _Held:
    """One ticket's state; `changed` shares the outbox's lock."""

    ticket: Ticket
    length: int
    reserved: int
    changed: threading.Condition
    touched: float
    segments: list[Segment] = dataclasses.field(default_factory=list)
    put_bytes: int = 0
    finished: bool = False
    error: PrfaasError | None = None


class Outbox:
    """Segments of running and finished prefills, until their reader releases them or their lease ends. Thread safe.

    A ticket reserves its whole cache when opened, so that a prefill which starts can also finish. Its lease is extended by progress on
    either side: a segment put, a message fetched, or `extend` while the prefill waits in a queue.
    """

    def __init__(
        self,
        spec: CacheSpec,
        capacity_bytes: int,
        lease_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        message_bytes: int = wire.MESSAGE_BYTES,
    ):
        """Raises InvalidInput for a spec that lanes cannot carry or sizes out of range."""
        wire.check_spec(spec)
        if capacity_bytes < 1:
            raise InvalidInput("outbox.capacity_bytes", capacity_bytes, "a positive number of bytes")
        if not lease_s > 0:
            raise InvalidInput("outbox.lease_s", lease_s, "a positive number of seconds")
        if not 0 < message_bytes <= wire.MAX_MESSAGE_BYTES:
            raise InvalidInput("outbox.message_bytes", message_bytes, f"1..{wire.MAX_MESSAGE_BYTES}")
        self.spec, self.capacity_bytes, self.lease_s = spec, capacity_bytes, lease_s
        self._message_bytes = message_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[bytes, _Held] = {}
        self._epochs = itertools.count(1)
        self._bytes_held = 0

    @property
    def bytes_held(self) -> int:
        """Bytes reserved by all tickets."""
        with self._lock:
            return self._bytes_held

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Tickets that are open, failed or finished, and not yet released."""
        with self._lock:
            return tuple(held.ticket for held in self._held.values())

    def open(self, length: int, ticket: Ticket | None = None) -> Ticket:
        """Reserves the cache of a `length`-token request (0 after a full prefix hit).

        `ticket` is given where another process of the same server has chosen it and this one holds a shard of the same cache.
        Raises InvalidInput when the cache can never fit or the ticket is open already, Exhausted when it does not fit right now.
        """
        if length < 0:
            raise InvalidInput("length", length, "a number of tokens >= 0")
        size = self.spec.bytes(length)
        if size > self.capacity_bytes:
            raise InvalidInput("length", length, f"a cache of at most {self.capacity_bytes} bytes; this one has {size}")
        with self._lock:
            if self._bytes_held + size > self.capacity_bytes:
                raise Exhausted(f"outbox holds {self._bytes_held} of {self.capacity_bytes} bytes, {size} more do not fit now")
            if ticket is None:
                ticket = Ticket(secrets.token_bytes(wire.TICKET_BYTES), next(self._epochs) % 2**32)
            elif ticket.id in self._held:
                raise InvalidInput("ticket", ticket.hex, "a ticket that is not open here")
            self._held[ticket.id] = _Held(ticket, length, size, threading.Condition(self._lock), self._clock())
            self._bytes_held += size
        return ticket

    def put(self, ticket: Ticket, segment: Segment) -> None:
        """Makes a segment ready to be pulled; its payload must not change until the ticket is released.

        Raises InvalidInput for a key outside the cache or a payload of another size, TransferError when the ticket is gone, over, or
        given more bytes than it reserved.
        """
        with self._lock:
            held = self._find(ticket.id, ticket.epoch)
            segment.key.check(self.spec, held.length)
            nbytes = segment.key.nbytes(self.spec)
            if segment.payload.nbytes != nbytes or not segment.payload.c_contiguous:
                raise InvalidInput("segment.payload", segment.payload, f"{nbytes} contiguous bytes")
            if held.finished:
                raise TransferError(f"ticket {ticket.hex} is finished; {segment.key} came late")
            if held.put_bytes + nbytes > held.reserved:
                raise TransferError(f"ticket {ticket.hex} reserved {held.reserved} bytes; {segment.key} goes beyond")
            held.segments.append(Segment(segment.key, segment.payload.cast("B")))
            held.put_bytes += nbytes
            self._progress(held)

    def finish(self, ticket: Ticket) -> None:
        """No more segments will come; streams end after the last one. Raises TransferError when the ticket is gone or failed."""
        with self._lock:
            held = self._find(ticket.id, ticket.epoch)
            held.finished = True
            self._progress(held)

    def fail(self, ticket: Ticket, error: PrfaasError) -> None:
        """Ends the ticket's streams with `error` and frees its bytes at once; ignored when the ticket is gone."""
        with self._lock:
            held = self._held.get(ticket.id)
            if held is not None and held.ticket == ticket and held.error is None:
                held.error = error
                self._free(held)

    def extend(self, ticket: Ticket) -> None:
        """Renews the lease of a prefill that is alive but has nothing to put yet; ignored when the ticket is gone."""
        with self._lock:
            held = self._held.get(ticket.id)
            if held is not None and held.ticket == ticket:
                held.touched = self._clock()

    def release(self, ticket_id: bytes, epoch: int) -> None:
        """Drops a ticket; releasing it again is harmless. Raises StaleEpoch when the ticket lives under another epoch."""
        with self._lock:
            held = self._held.get(ticket_id)
            if held is None:
                return
            if held.ticket.epoch != epoch:
                raise StaleEpoch(f"ticket {ticket_id.hex()} has epoch {held.ticket.epoch}, not {epoch}")
            self._drop(held)

    def sweep(self) -> tuple[Ticket, ...]:
        """Drops every ticket whose lease has expired; the caller cancels the jobs behind them."""
        with self._lock:
            now = self._clock()
            expired = [held for held in self._held.values() if now - held.touched > self.lease_s]
            for held in expired:
                self._drop(held)
        return tuple(held.ticket for held in expired)

    def messages(
        self,
        ticket_id: bytes,
        epoch: int,
        from_sequence: int = 0,
        is_active: Callable[[], bool] = lambda: True,
        idle_s: float = 30.0,
    ) -> Iterator[bytes]:
        """Encoded messages of a ticket, in order, as segments become ready; ends after `finish`.

        Message n is the same bytes in every stream of a ticket, so a broken stream resumes with `from_sequence`. Ends early when
        `is_active` says no. Raises UnknownTicket, StaleEpoch, or TransferError when the prefill failed or made no progress for `idle_s`.
        """
        with self._lock:
            held = self._find(ticket_id, epoch)
        return self._messages(held, from_sequence, is_active, idle_s)

    def _messages(self, held: _Held, from_sequence: int, is_active: Callable[[], bool], idle_s: float) -> Iterator[bytes]:
        sequence = 0
        for index in itertools.count():
            segment = self._wait_for(held, index, is_active, idle_s)
            if segment is None:
                return
            dtype, size = segment.key.tensor_spec(self.spec).dtype, segment.payload.nbytes
            for offset in range(0, size, self._message_bytes):
                if sequence >= from_sequence:
                    header = wire.Header(held.ticket.id, held.ticket.epoch, sequence, segment.key, dtype, offset, size)
                    message = wire.encode(header, segment.payload[offset : offset + self._message_bytes])
                    with self._lock:
                        # Released or failed while this message was built: nothing more may leave.
                        self._find(held.ticket.id, held.ticket.epoch)
                        held.touched = self._clock()
                    if not is_active():
                        return
                    yield message
                sequence += 1

    def _wait_for(self, held: _Held, index: int, is_active: Callable[[], bool], idle_s: float) -> Segment | None:
        """Segment `index` once it is there; None after the last one, or when the reader has gone."""
        started = self._clock()
        with self._lock:
            while True:
                self._find(held.ticket.id, held.ticket.epoch)
                if index < len(held.segments):
                    return held.segments[index]
                if held.finished or not is_active():
                    return None
                quiet = self._clock() - max(started, held.touched)
                if quiet >= idle_s:
                    raise TransferError(f"ticket {held.ticket.hex}: no segment and no sign of life for {quiet:.1f} s")
                held.changed.wait(min(_POLL_S, idle_s - quiet))

    def _find(self, ticket_id: bytes, epoch: int) -> _Held:
        held = self._held.get(ticket_id)
        if held is None:
            raise UnknownTicket(f"ticket {ticket_id.hex()} is unknown: released, expired or never opened")
        if held.ticket.epoch != epoch:
            raise StaleEpoch(f"ticket {ticket_id.hex()} has epoch {held.ticket.epoch}, not {epoch}")
        if held.error is not None:
            raise TransferError(f"ticket {ticket_id.hex()} failed: {held.error}") from held.error
        return held

    def _progress(self, held: _Held) -> None:
        held.touched = self._clock()
        held.changed.notify_all()

    def _free(self, held: _Held) -> None:
        self._bytes_held -= held.reserved
        held.reserved = 0
        held.segments = []
        held.changed.notify_all()

    def _drop(self, held: _Held) -> None:
        del self._held[held.ticket.id]
        self._free(held)

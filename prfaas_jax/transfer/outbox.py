"""What a prefill server holds for pulling: segments by ticket, bounded in bytes, kept for a lease."""

import dataclasses
import itertools
import secrets
import threading
import time
from collections.abc import Callable

from prfaas_jax.errors import Exhausted, InvalidInput, PrfaasError, TransferError
from prfaas_jax.kvcache.segments import Segment
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer import wire


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
class Held:
    """One ticket's state, read and changed under `Outbox.changed` only.

    Attributes:
        spec: the cache as it travels (`kvcache/codecs.py`).
        length: tokens of the prompt.
        prefix: of these, tokens whose cache the reader has already.
        reserved: bytes that all segments have together, 0 once they were freed.
        total: the same, for good.
        finished: no more segments will come.
        error: why the ticket is dead; its segments are gone.
    """

    ticket: Ticket
    spec: CacheSpec
    length: int
    prefix: int
    reserved: int
    total: int
    touched: float
    segments: list[Segment] = dataclasses.field(default_factory=list)
    put_bytes: int = 0
    finished: bool = False
    error: PrfaasError | None = None


class Outbox:
    """Segments of running and finished prefills, until their reader releases them or their lease ends. Thread safe.

    A ticket reserves its whole cache when opened, so that a prefill which starts can also finish. Its lease is extended by progress on
    either side: a segment put, a message sent or acknowledged, or `extend` while the prefill waits in a queue.

    Attributes:
        changed: guards every ticket, and is notified whenever something may be sent or a ticket has died.
    """

    def __init__(
        self,
        spec: CacheSpec,
        capacity_bytes: int,
        lease_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Raises InvalidInput for a spec that lanes cannot carry or sizes out of range."""
        wire.check_spec(spec)
        if capacity_bytes < 1:
            raise InvalidInput("outbox.capacity_bytes", capacity_bytes, "a positive number of bytes")
        if not lease_s > 0:
            raise InvalidInput("outbox.lease_s", lease_s, "a positive number of seconds")
        self.spec, self.capacity_bytes, self.lease_s = spec, capacity_bytes, lease_s
        self.clock = clock
        self.changed = threading.Condition()
        self._held: dict[bytes, Held] = {}
        self._epochs = itertools.count(1)
        self._bytes_held = 0

    @property
    def bytes_held(self) -> int:
        """Bytes reserved by all tickets."""
        with self.changed:
            return self._bytes_held

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Tickets that are open, failed or finished, and not yet released."""
        with self.changed:
            return tuple(held.ticket for held in self._held.values())

    def open(self, length: int, ticket: Ticket | None = None, *, spec: CacheSpec | None = None, prefix: int = 0) -> Ticket:
        """Reserves the cache of a `length`-token request (0 after a full prefix hit).

        `ticket` is given where another process of the same server has chosen it and this one holds a shard of the same cache; `spec` where
        a codec makes the cache travel as another one than the outbox's; `prefix` tokens are the reader's already.
        Raises InvalidInput when the cache can never fit or the ticket is open already, Exhausted when it does not fit right now.
        """
        if length < 0:
            raise InvalidInput("length", length, "a number of tokens >= 0")
        if not 0 <= prefix <= length:
            raise InvalidInput("prefix", prefix, f"0..{length}, the prompt length")
        spec = self.spec if spec is None else spec
        size = spec.bytes(length, prefix)
        if size > self.capacity_bytes:
            raise InvalidInput("length", length, f"a cache of at most {self.capacity_bytes} bytes; this one has {size}")
        with self.changed:
            if self._bytes_held + size > self.capacity_bytes:
                raise Exhausted(f"outbox holds {self._bytes_held} of {self.capacity_bytes} bytes, {size} more do not fit now")
            if ticket is None:
                ticket = Ticket(secrets.token_bytes(wire.TICKET_BYTES), next(self._epochs) % 2**32)
            elif ticket.id in self._held:
                raise InvalidInput("ticket", ticket.hex, "a ticket that is not open here")
            self._held[ticket.id] = Held(ticket, spec, length, prefix, size, size, self.clock())
            self._bytes_held += size
        return ticket

    def put(self, ticket: Ticket, segment: Segment) -> None:
        """Makes a segment ready to be pulled; its payload must not change until the ticket is released.

        Raises InvalidInput for a key outside the cache or a payload of another size, TransferError when the ticket is gone, over, or
        given more bytes than it reserved.
        """
        with self.changed:
            held = self._check(ticket, segment)
            held.segments.append(Segment(segment.key, segment.payload.cast("B")))
            held.put_bytes += segment.payload.nbytes
            self._progress(held)

    def finish(self, ticket: Ticket) -> None:
        """No more segments will come; streams end after the last one. Raises TransferError when the ticket is gone or failed."""
        with self.changed:
            held = self.find(ticket.id, ticket.epoch)
            held.finished = True
            self._progress(held)

    def fail(self, ticket: Ticket, error: PrfaasError) -> None:
        """Ends the ticket's streams with `error` and frees its bytes at once; ignored when the ticket is gone."""
        with self.changed:
            held = self._held.get(ticket.id)
            if held is not None and held.ticket == ticket and held.error is None:
                held.error = error
                self._free(held)

    def extend(self, ticket: Ticket) -> None:
        """Renews the lease of a prefill that is alive but has nothing to put yet; ignored when the ticket is gone."""
        with self.changed:
            held = self._held.get(ticket.id)
            if held is not None and held.ticket == ticket:
                held.touched = self.clock()

    def release(self, ticket_id: bytes, epoch: int) -> None:
        """Drops a ticket; releasing it again is harmless. Raises StaleEpoch when the ticket lives under another epoch."""
        with self.changed:
            held = self._held.get(ticket_id)
            if held is None:
                return
            if held.ticket.epoch != epoch:
                raise StaleEpoch(f"ticket {ticket_id.hex()} has epoch {held.ticket.epoch}, not {epoch}")
            self._drop(held)

    def sweep(self) -> tuple[Ticket, ...]:
        """Drops every ticket whose lease has expired; the caller cancels the jobs behind them."""
        with self.changed:
            now = self.clock()
            expired = [held for held in self._held.values() if now - held.touched > self.lease_s]
            for held in expired:
                self._drop(held)
        return tuple(held.ticket for held in expired)

    def find(self, ticket_id: bytes, epoch: int) -> Held:
        """A ticket that is alive, for a caller that holds `changed`; raises UnknownTicket, StaleEpoch, or TransferError when it failed."""
        held = self._held.get(ticket_id)
        if held is None:
            raise UnknownTicket(f"ticket {ticket_id.hex()} is unknown: released, expired or never opened")
        if held.ticket.epoch != epoch:
            raise StaleEpoch(f"ticket {ticket_id.hex()} has epoch {held.ticket.epoch}, not {epoch}")
        if held.error is not None:
            raise TransferError(f"ticket {ticket_id.hex()} failed: {held.error}") from held.error
        return held

    def touched_since(self, moment: float) -> tuple[Ticket, ...]:
        """Tickets whose lease was extended since a moment of `clock`."""
        with self.changed:
            return tuple(held.ticket for held in self._held.values() if held.touched > moment)

    def _check(self, ticket: Ticket, segment: Segment) -> Held:
        held = self.find(ticket.id, ticket.epoch)
        segment.key.check(held.spec, held.length, held.prefix)
        nbytes = segment.key.nbytes(held.spec)
        if segment.payload.nbytes != nbytes or not segment.payload.c_contiguous:
            raise InvalidInput("segment.payload", segment.payload, f"{nbytes} contiguous bytes")
        if held.finished:
            raise TransferError(f"ticket {ticket.hex} is finished; {segment.key} came late")
        if held.put_bytes + nbytes > held.reserved:
            raise TransferError(f"ticket {ticket.hex} reserved {held.reserved} bytes; {segment.key} goes beyond")
        return held

    def _progress(self, held: Held) -> None:
        held.touched = self.clock()
        self.changed.notify_all()

    def _free(self, held: Held) -> None:
        self._bytes_held -= held.reserved
        held.reserved = 0
        held.segments = []
        self.changed.notify_all()

    def _drop(self, held: Held) -> None:
        del self._held[held.ticket.id]
        self._free(held)

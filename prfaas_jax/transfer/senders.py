"""Sender processes of a prefill server: what its engine exports leaves through several interpreters, each with an address of its own.

The server keeps the books (`SharedOutbox`: tickets, leases, bytes reserved); each segment is copied once, into shared memory, and given to
the process that has least of that ticket to send. Copies beyond those of `lane.py`: that one.
"""

import itertools
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from prfaas_jax.errors import Exhausted, PrfaasError, TransferError
from prfaas_jax.kvcache.segments import Segment
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer.child import Child, Crew, Message, security_fields
from prfaas_jax.transfer.endpoint import parse_address
from prfaas_jax.transfer.outbox import Held, Outbox, Ticket
from prfaas_jax.transfer.security import NONE, Security
from prfaas_jax.transfer.shared_memory import Regions, SharedMemory

_MODULE = "prfaas_jax.transfer.sender_process"
# Regions are sized by powers of two, and those of each size may all be in use at one time or another.
_SPACE = 64


class _Share:
    """What one ticket has in shared memory: its region, how much of it is filled, and how much each process has of it.

    `known` is done once every process has heard of the ticket: an address that is told earlier might be asked for what it does not know.
    """

    def __init__(self, whole: memoryview, children: tuple[Child, ...]):
        self.whole, self.filled = whole, 0
        self.loads = dict.fromkeys(children, 0)
        self.known: Future[dict[int, str]] = Future()
        self._unaware = set(children)

    def knows(self, child: Child) -> None:
        """A process has heard of it."""
        self._unaware.discard(child)
        if not self._unaware and not self.known.done():
            self.known.set_result({child.index: child.ready["address"] for child in self.loads})

    def end(self, error: PrfaasError) -> None:
        """It will not be sent."""
        self.whole = memoryview(b"")
        if not self.known.done():
            self.known.set_exception(error)


class SharedOutbox(Outbox):
    """An outbox whose segments are sent by processes of their own."""

    def __init__(
        self,
        spec: CacheSpec,
        capacity_bytes: int,
        lease_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        *,
        processes: int,
        address: str = "127.0.0.1:0",
        max_streams: int = 16,
        message_bytes: int,
        bytes_per_s: float | None = None,
        security: Security = NONE,
    ):
        """Starts nothing yet; the i-th process will listen on `address`'s port + i, or on a free one where that is 0.

        `bytes_per_s` is the pace of all together; everything else is as for `Outbox` and `LaneServer`.
        Raises InvalidInput for numbers out of range.
        """
        super().__init__(spec, capacity_bytes, lease_s, clock)
        host, port = parse_address("lane_address", address, allow_zero=True)
        self._memory = SharedMemory.create(_SPACE * capacity_bytes)
        self._regions = Regions(self._memory, capacity_bytes)
        self._numbers = itertools.count(1)
        self._users: dict[int, tuple[int, int, set[Child | None]]] = {}  # region: offset, bytes, who may read it; None is this process
        self._shares: dict[bytes, _Share] = {}
        lane = {"max_streams": max_streams, "message_bytes": message_bytes}
        pace = None if bytes_per_s is None else bytes_per_s / processes
        self._options: list[Message] = [
            {"security": security_fields(security), "lane": lane | {"address": f"{host}:{port and port + i}", "bytes_per_s": pace}}
            for i in range(processes)
        ]
        self._crew = Crew(processes, self._make)

    # --- the processes ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the processes; raises TransferError when one does not come up (its address is in use)."""
        try:
            self._crew.start()
        except BaseException:
            self._memory.close()
            raise

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the processes that are up."""
        return tuple(child.ready["address"] for child in self._crew.up)

    def shares(self, ticket: Ticket) -> Future[dict[int, str]]:
        """Addresses that bring a part of a ticket each, by number of their process, once all of them know of it.

        Raises TransferError when the ticket is gone; so does the future, when it goes before.
        """
        with self.changed:
            self.find(ticket.id, ticket.epoch)
            return self._shares[ticket.id].known

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of those that run."""
        return tuple(child.pid for child in self._crew.up)

    def stop(self, grace_s: float) -> None:
        """Refuses new streams at once, lets running ones finish their tickets for up to `grace_s`, then ends the processes."""
        for child in self._crew.up:
            child.say({"do": "stop", "grace_s": grace_s})
        self._crew.stop(grace_s)
        self._memory.close()

    def _make(self, index: int, on_end: Callable[[], None]) -> Child:
        def lose(child: Child) -> None:
            on_end()  # first: what is opened from now on is opened without it
            self._lose(child)

        return Child("sender", index, _MODULE, self._memory, self._options[index], self._on_message, lose)

    def _on_message(self, child: Child, message: Message) -> None:
        with self.changed:
            if (region := message.get("unused")) is not None:
                self._leave(region, child)
            if (name := message.get("opened")) is not None and (share := self._shares.get(bytes.fromhex(name))) is not None:
                share.knows(child)
            for ticket, epoch in message.get("progress", ()):
                self.extend(Ticket(bytes.fromhex(ticket), epoch))

    def _lose(self, child: Child) -> None:
        """A process is gone, and its shares with it."""
        with self.changed:
            for region, (_, _, users) in list(self._users.items()):
                if child in users:
                    self._leave(region, child)
            lost = [held.ticket for held in self._held.values() if child in self._shares[held.ticket.id].loads]
        for ticket in lost:
            self.fail(ticket, TransferError(f"{child.name} ended"))

    # --- the books -------------------------------------------------------------------------------------------------------------

    def open(self, length: int, ticket: Ticket | None = None, *, spec: CacheSpec | None = None, prefix: int = 0) -> Ticket:
        """See Outbox.open; raises Exhausted while no sender process is up."""
        with self.changed:
            self._collect()
            children = self._crew.up
            if not children:
                raise Exhausted("no sender process is up; they are being started")
            ticket = super().open(length, ticket, spec=spec, prefix=prefix)
            held = self._held[ticket.id]
            nbytes = max(1, held.total)
            try:
                if (taken := sum(size for _, size, _ in self._users.values())) + nbytes > 2 * self.capacity_bytes:
                    raise Exhausted(f"shared memory has {taken} bytes that a sender process may still read; {nbytes} more do not fit now")
                offset = self._regions.take(nbytes)
            except Exhausted:
                super().release(ticket.id, ticket.epoch)
                raise
            region = next(self._numbers)
            self._users[region] = offset, nbytes, {None, *children}
            self._shares[ticket.id] = _Share(self._memory.lease(region, offset, nbytes), children)
            spec_fields, where = held.spec.fields(), {"region": region, "offset": offset, "nbytes": nbytes}
            self._tell(ticket, {"do": "open", "length": length, "prefix": prefix, "spec": spec_fields} | where)
            return ticket

    def put(self, ticket: Ticket, segment: Segment) -> None:
        """See Outbox.put; the payload is the caller's again once this has returned."""
        with self.changed:
            self._check(ticket, segment)
            share, nbytes = self._shares[ticket.id], segment.payload.nbytes
            at, share.filled = share.filled, share.filled + nbytes
            copy = share.whole[at : at + nbytes]
        # Outside the lock, and, other than by slices of views, without the GIL; nobody else fills these bytes, and the view keeps them.
        np.copyto(np.frombuffer(copy, np.uint8), np.frombuffer(segment.payload.cast("B"), np.uint8))
        with self.changed:
            super().put(ticket, Segment(segment.key, copy))
            child = min(share.loads, key=lambda c: share.loads[c])
            share.loads[child] += nbytes
            key = segment.key
            said = {"do": "put", "key": [key.group, key.tensor, *key.layers, *key.tokens, *key.heads], "at": at, "nbytes": nbytes}
            child.say(said | {"ticket": ticket.hex, "epoch": ticket.epoch})

    def finish(self, ticket: Ticket) -> None:
        """See Outbox.finish."""
        with self.changed:
            super().finish(ticket)
            self._tell(ticket, {"do": "finish"})

    def fail(self, ticket: Ticket, error: PrfaasError) -> None:
        """See Outbox.fail."""
        with self.changed:
            super().fail(ticket, error)
            held = self._held.get(ticket.id)
            if held is not None and held.error is error:
                self._tell(ticket, {"do": "fail", "error": str(error)})
                self._shares[ticket.id].end(error)

    def sweep(self) -> tuple[Ticket, ...]:
        """See Outbox.sweep; shared memory that nothing has been in for a while goes back to the system."""
        with self.changed:
            expired = super().sweep()
            self._collect()
            self._regions.trim(self.clock())
        return expired

    def _drop(self, held: Held) -> None:
        super()._drop(held)
        if held.ticket.id in self._shares:  # else it was never opened to the end
            self._tell(held.ticket, {"do": "release"})
            self._shares.pop(held.ticket.id).end(TransferError(f"ticket {held.ticket.hex} was released"))

    def _tell(self, ticket: Ticket, message: Message) -> None:
        for child in self._shares[ticket.id].loads:
            child.say(message | {"ticket": ticket.hex, "epoch": ticket.epoch})

    def _collect(self) -> None:
        """Takes back regions that this process has stopped to read."""
        while True:
            try:
                region: Any = self._memory.unused.get_nowait()
            except queue.Empty:
                return
            self._leave(region, None)

    def _leave(self, region: int, user: Child | None) -> None:
        offset, nbytes, users = self._users.get(region, (0, 0, set()))
        users.discard(user)
        if not users and self._users.pop(region, None) is not None:
            self._regions.give(offset, nbytes)

"""Receiver processes of a decode server: lanes end in other interpreters, which verify and decompress while this one computes.

A `RemoteLaneGroup` is used as a `LaneGroup` is; the group itself lives in one of the processes. Copies beyond those of `assembly.py`: one,
from gRPC's `bytes` into shared memory, where the engine reads it. A slot is used again once nothing here refers to it.
"""

import itertools
import threading
from collections.abc import Callable
from typing import Any

from prfaas_jax.errors import TransferError
from prfaas_jax.transfer import frames, wire
from prfaas_jax.transfer.child import Child, Crew, Message, security_fields
from prfaas_jax.transfer.lanes import LaneGroup, Receiver, check_lanes
from prfaas_jax.transfer.link import LinkEstimate
from prfaas_jax.transfer.security import NONE, Security
from prfaas_jax.transfer.shared_memory import SharedMemory

_MODULE = "prfaas_jax.transfer.receiver_process"
# Address space; what is in use is bounded by what transfers grant.
_SPACE_BYTES = 256 << 30
_JOIN_S = 5.0


class RemoteLaneGroup:
    """Lanes to one sender's address that end in a receiver process; see `LaneGroup`."""

    def __init__(self, process: "_Process", number: int, address: str):
        self._process, self._number, self.address = process, number, address
        self._changed = threading.Condition()
        self._receivers: dict[bytes, tuple[int, Receiver]] = {}
        self._estimate = LinkEstimate()
        self._warm: bool | None = None
        self._error: TransferError | None = None

    def open(self, request: frames.Open, receiver: Receiver) -> None:
        """See LaneGroup.open."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._receivers[request.ticket] = request.epoch, receiver
            self._tell({"do": "open", "frame": frames.encode(request).hex()})

    def grant(self, ticket: bytes, granted: int) -> None:
        """See LaneGroup.grant."""
        with self._changed:
            if ticket in self._receivers:
                self._tell({"do": "grant", "ticket": ticket.hex(), "granted": granted})

    def release(self, ticket: bytes) -> None:
        """See LaneGroup.release."""
        with self._changed:
            if self._receivers.pop(ticket, None) is not None:
                self._tell({"do": "release", "ticket": ticket.hex()})

    @property
    def alive(self) -> bool:
        """Whether transfers can be opened."""
        with self._changed:
            return self._error is None

    def warm(self, timeout_s: float = 5.0) -> bool:
        """See LaneGroup.warm."""
        with self._changed:
            self._warm = None
            self._tell({"do": "warm", "timeout_s": timeout_s})
            self._changed.wait_for(lambda: self._warm is not None or self._error is not None, timeout_s + 1.0)
            return bool(self._warm)

    def estimate(self) -> LinkEstimate:
        """The link from that sender to here, as of a moment ago."""
        with self._changed:
            return self._estimate

    def close(self) -> None:
        """Ends every lane; transfers that are open fail."""
        self.die(TransferError(f"lanes to {self.address} were closed"))

    def hear(self, message: Message) -> None:
        """What its process says of it; called from one thread."""
        if not message.get("alive", True):
            self.die(TransferError(message.get("error", f"lanes to {self.address} are given up")))
            return
        receiver = None
        with self._changed:
            if "link" in message:
                self._estimate = LinkEstimate(*message["link"])
            if "warm" in message:
                self._warm = message["warm"]
            if name := message.get("ended") or message.get("failed"):
                _, receiver = self._receivers.get(bytes.fromhex(name), (0, None))
            self._changed.notify_all()
        if receiver is not None and "error" in message:
            receiver.failed(TransferError(message["error"]))
        elif receiver is not None:
            receiver.ended()

    def take(self, header: wire.Header, payload: memoryview, wire_bytes: int) -> None:
        """A payload of one of its transfers; of one that was released meanwhile it is forgotten."""
        with self._changed:
            epoch, receiver = self._receivers.get(header.ticket, (0, None))
        if receiver is not None and epoch == header.epoch:
            receiver.take(header, payload, wire_bytes)

    def die(self, error: TransferError) -> None:
        """Nothing comes any more."""
        with self._changed:
            if self._error is None:
                self._error = error
                self._tell({"do": "close"})
            receivers = [receiver for _, receiver in self._receivers.values()]
            self._receivers.clear()
            self._changed.notify_all()
        for receiver in receivers:
            receiver.failed(error)
        self._process.forget(self._number)

    def _tell(self, message: Message) -> None:
        self._process.child.say(message | {"group": self._number})


AnyLaneGroup = LaneGroup | RemoteLaneGroup


class _Process:
    """One receiver process and its groups."""

    def __init__(self, index: int, security: Security, on_end: Callable[[], None]):
        self._end = on_end
        self._groups: dict[int, RemoteLaneGroup] = {}
        self._numbers = itertools.count(1)
        self._memory = SharedMemory.create(_SPACE_BYTES)
        first = {"security": security_fields(security)}
        try:
            self.child = Child("receiver", index, _MODULE, self._memory, first, self._on_message, self._on_end)
        except BaseException:
            self._memory.close()
            raise
        self.name = self.child.name
        self._returner = threading.Thread(target=self._return_slots, name=f"{self.name} slots", daemon=True)
        self._returner.start()

    @property
    def ended(self) -> threading.Event:
        """Set when the process is gone."""
        return self.child.ended

    @property
    def groups(self) -> int:
        """How many there are."""
        return len(self._groups)

    def connect(self, address: str, lanes: int, dead_s: float, probe: bool) -> RemoteLaneGroup:
        """A new group."""
        number = next(self._numbers)
        group = self._groups[number] = RemoteLaneGroup(self, number, address)
        said = {"do": "connect", "group": number, "address": address, "lanes": lanes, "dead_s": dead_s, "probe": probe}
        self.child.say(said)
        if self.ended.is_set():
            group.die(TransferError(f"{self.name} ended"))
        return group

    def forget(self, number: int) -> None:
        """A group is dead."""
        self._groups.pop(number, None)

    def silent(self) -> bool:
        """See Child.silent."""
        return self.child.silent()

    def kill(self) -> None:
        """See Child.kill."""
        self.child.kill()

    def stop(self, grace_s: float) -> None:
        """Ends the process."""
        self.child.stop(grace_s)
        self._memory.unused.put(None)
        self._returner.join(_JOIN_S)
        self._memory.close()

    def _on_message(self, child: Child, message: Message) -> None:
        group = self._groups.get(message["group"])
        if "slot" in message:
            offset, nbytes = message["slot"]
            # Whatever becomes of it, the slot goes back once nobody refers to it any more.
            payload = self._memory.lease((offset, nbytes), offset, nbytes).toreadonly()
            if group is not None:
                group.take(wire.header_of(bytes.fromhex(message["header"])), payload, message["wire_bytes"])
        elif group is not None:
            group.hear(message)

    def _on_end(self, child: Child) -> None:
        self._end()
        for group in list(self._groups.values()):
            group.die(TransferError(f"{child.name} ended"))

    def _return_slots(self) -> None:
        slots: list[Any] = []
        while None not in slots:
            slots = [self._memory.unused.get()]
            while not self._memory.unused.empty():
                slots.append(self._memory.unused.get())
            self.child.say({"do": "unused", "slots": [slot for slot in slots if slot is not None]})


class Receivers:
    """The receiver processes of one server. In place of one that ends another is started; its groups are dead."""

    def __init__(self, processes: int, security: Security = NONE):
        """Starts nothing yet; raises InvalidInput for a number out of range."""
        self._crew = Crew(processes, lambda index, on_end: _Process(index, security, on_end))

    def start(self) -> None:
        """Starts them; raises TransferError when one does not come up."""
        self._crew.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of those that run."""
        return tuple(process.child.pid for process in self._crew.up)

    def connect(self, address: str, lanes: int = 1, dead_s: float = 5.0, probe: bool = True) -> RemoteLaneGroup:
        """Lanes to an address, in the process that has fewest groups.

        Arguments are as `LaneGroup`'s. Raises InvalidInput for numbers out of range, TransferError while no process is up.
        """
        check_lanes(lanes, dead_s)
        processes = self._crew.up
        if not processes:
            raise TransferError("no receiver process is up; they are being started")
        return min(processes, key=lambda p: p.groups).connect(address, lanes, dead_s, probe)

    def close(self) -> None:
        """Ends every process; transfers that are open fail."""
        self._crew.stop(0.0)

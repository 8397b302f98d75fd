"""A receiver process: lane groups whose verified payloads go into shared memory, a slot each. See `receivers.py`."""

import contextlib
import dataclasses
import threading
import time

from prfaas_jax.errors import Exhausted, TransferError
from prfaas_jax.transfer import frames, wire
from prfaas_jax.transfer.child import Message, Parent, run_child
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.shared_memory import Regions

# Slots that nobody uses keep their memory up to this, for as long as transfers follow each other.
_SPARE_BYTES = 1 << 30
_REPORT_S = 0.1


class _Ear:
    """A transfer of the server, as the lanes here see it."""

    def __init__(self, receiver: "_Receiver", group: int, ticket: bytes):
        self._receiver, self._group, self._ticket = receiver, group, ticket

    def take(self, header: wire.Header, payload: memoryview, wire_bytes: int) -> None:
        """See Receiver.take."""
        try:
            self._receiver.hand_on(self._group, header, payload, wire_bytes)
        except Exhausted as error:
            self.failed(TransferError(str(error)))

    def ended(self) -> None:
        """See Receiver.ended."""
        self._receiver.say({"group": self._group, "ended": self._ticket.hex()})

    def failed(self, error: TransferError) -> None:
        """See Receiver.failed."""
        alive = self._receiver.alive(self._group)
        self._receiver.say({"group": self._group, "failed": self._ticket.hex(), "error": str(error), "alive": alive})


class _Receiver:
    """Follows the server: connects, opens, grants and releases as it says."""

    def __init__(self, parent: Parent):
        self._parent, self._security = parent, parent.security
        self._lock = threading.Lock()
        self._regions = Regions(parent.memory, _SPARE_BYTES)
        self._groups: dict[int, LaneGroup] = {}

    def say(self, message: Message) -> None:
        """Without the server this process ends anyway."""
        with contextlib.suppress(OSError):
            self._parent.pipe.say(message)

    def hand_on(self, group: int, header: wire.Header, payload: memoryview, wire_bytes: int) -> None:
        """Copies a payload into a slot, which is the server's until it says that it is unused; raises Exhausted."""
        nbytes = payload.nbytes
        with self._lock:
            offset = self._regions.take(nbytes)
        self._parent.memory.view(offset, nbytes)[:] = payload
        self.say({"group": group, "header": wire.pack(header, nbytes).hex(), "slot": [offset, nbytes], "wire_bytes": wire_bytes})

    def alive(self, group: int) -> bool:
        """Whether its lanes are not given up."""
        lanes = self._groups.get(group)
        return lanes is not None and lanes.alive

    @property
    def ready(self) -> Message:
        """There is nothing more to say."""
        return {"ready": True}

    def report(self) -> None:
        """See Follower.report."""
        threading.Thread(target=self._report, daemon=True).start()

    def follow(self, message: Message) -> None:
        """Does what the server says."""
        number = message.get("group", 0)
        group = self._groups.get(number)
        match message["do"]:
            case "unused":
                with self._lock:
                    for offset, nbytes in message["slots"]:
                        self._regions.give(offset, nbytes)
            case "connect":
                self._groups[number] = LaneGroup(message["address"], message["lanes"], self._security, message["dead_s"], message["probe"])
            case _ if group is None:
                pass  # closed: whoever still speaks of it has heard so, or is about to
            case "warm":
                threading.Thread(target=self._warm, args=(number, group, message["timeout_s"]), daemon=True).start()
            case "open":
                request = frames.decode(bytes.fromhex(message["frame"]))
                assert isinstance(request, frames.Open)
                ear = _Ear(self, number, request.ticket)
                try:
                    group.open(request, ear)
                except TransferError as error:
                    ear.failed(error)
            case "grant":
                group.grant(bytes.fromhex(message["ticket"]), message["granted"])
            case "release":
                group.release(bytes.fromhex(message["ticket"]))
            case "close":
                del self._groups[number]
                # It waits for its threads: meanwhile the others go on.
                threading.Thread(target=group.close, daemon=True).start()

    def _warm(self, number: int, group: LaneGroup, timeout_s: float) -> None:
        self.say({"group": number, "warm": group.warm(timeout_s)})

    def _report(self) -> None:
        """Says that this process is alive and how the links are, until the server is gone; gives memory back when nothing comes."""
        while True:
            time.sleep(_REPORT_S)
            with self._lock:
                self._regions.trim(time.monotonic())
            self.say({"group": 0})
            for number, group in list(self._groups.items()):
                self.say({"group": number, "link": dataclasses.astuple(group.estimate()), "alive": group.alive})

    def stop(self) -> None:
        """Closes every group."""
        for group in list(self._groups.values()):
            group.close()


if __name__ == "__main__":
    run_child(_Receiver)

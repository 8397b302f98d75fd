"""A sender process: a lane server over its share of a server's tickets, whose segments lie in shared memory. See `senders.py`."""

import contextlib
import math
import threading
import time

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.segments import Segment, SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer.child import Message, Parent, run_child
from prfaas_jax.transfer.lane import LaneServer
from prfaas_jax.transfer.outbox import Outbox, Ticket

# The server bounds what is staged, and ends leases.
_UNBOUNDED_BYTES = 2**62
# A lease hears of progress this often.
_PROGRESS_S = 0.25


class _Sender:
    """Follows the server: what it opens, puts, finishes, fails and releases, this process sends."""

    def __init__(self, parent: Parent):
        self._parent, options = parent, parent.first
        self._outbox = Outbox(CacheSpec(()), _UNBOUNDED_BYTES, math.inf)
        self._server = LaneServer(self._outbox, security=parent.security, **options["lane"])
        self._server.start()
        self._leases: dict[bytes, memoryview] = {}
        self._stopping: threading.Thread | None = None

    @property
    def ready(self) -> Message:
        """Where the lanes are."""
        return {"address": self._server.address}

    def report(self) -> None:
        """See Follower.report."""
        for target in (self._report_regions, self._report_progress):
            threading.Thread(target=target, daemon=True).start()

    def follow(self, message: Message) -> None:
        """Does what the server says."""
        if message["do"] == "stop":
            self._stopping = threading.Thread(target=self._server.stop, args=(message["grace_s"],), daemon=True)
            self._stopping.start()
            return
        ticket = Ticket(bytes.fromhex(message["ticket"]), message["epoch"])
        match message["do"]:
            case "open":
                spec = CacheSpec.from_fields(message["spec"])
                self._outbox.open(message["length"], ticket, spec=spec, prefix=message["prefix"])
                self._leases[ticket.id] = self._parent.memory.lease(message["region"], message["offset"], message["nbytes"])
                self._parent.pipe.say({"opened": ticket.hex})
            case "put":
                group, tensor, a, b, c, d, e, f = message["key"]
                at = message["at"]
                payload = self._leases[ticket.id][at : at + message["nbytes"]]
                self._outbox.put(ticket, Segment(SegmentKey(group, tensor, (a, b), (c, d), (e, f)), payload))
            case "finish":
                self._outbox.finish(ticket)
            case "fail":
                self._outbox.fail(ticket, TransferError(message["error"]))
                self._leases.pop(ticket.id, None)
            case "release":
                self._outbox.release(ticket.id, ticket.epoch)
                self._leases.pop(ticket.id, None)

    def _report_regions(self) -> None:
        """Says of each region when nothing here reads it any more, until the server is gone."""
        with contextlib.suppress(OSError):
            while True:
                self._parent.pipe.say({"unused": self._parent.memory.unused.get()})

    def _report_progress(self) -> None:
        """Says which tickets something has been acknowledged of, and that this process is alive, until the server is gone."""
        since = 0.0
        with contextlib.suppress(OSError):
            while True:
                time.sleep(_PROGRESS_S)
                now = time.monotonic()
                self._parent.pipe.say({"progress": [[ticket.hex, ticket.epoch] for ticket in self._outbox.touched_since(since)]})
                since = now

    def stop(self) -> None:
        """Ends the server."""
        if self._stopping is not None:
            self._stopping.join()
        self._server.stop(0)


if __name__ == "__main__":
    run_child(_Sender)

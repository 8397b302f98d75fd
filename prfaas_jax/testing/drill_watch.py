"""What a fault drill sees of the system: the router's view of its servers as it changes, what requests left behind, what processes hold."""

import dataclasses
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import grpc
import psutil

from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc, prefill_pb2
from prfaas_jax.testing.live_cluster import LiveCluster, Status
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS
from prfaas_jax.transfer.security import NONE, Security, open_channel

# A watched router says how its servers are at least this often.
_PERIOD_S = 0.02
_AGAIN_S = 0.02
_JOIN_S, _STATUS_S = 5.0, 5.0


@dataclasses.dataclass(frozen=True)
class Change:
    """The router's view of a server changed; at a monotonic second. `address` is empty for the router itself."""

    at_s: float
    address: str
    healthy: bool
    why: str


class RouterWatch:
    """Watches a router of this machine on a thread of its own while the block runs."""

    def __init__(self, router: str, security: Security = NONE):
        self._router, self._security = router, security
        self._lock = threading.Lock()
        self._changes: list[Change] = []
        self._latest: dict[str, Change] = {}
        self._heard_s = 0.0
        self._status: generation_pb2.GenerationStatus | None = None
        self._done = False
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="router watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._done = True
            if self._call is not None:
                self._call.cancel()
        self._thread.join(_JOIN_S)

    def detected_s(self, address: str, since_s: float) -> float | None:
        """When the server was first seen to be unhealthy after a monotonic second, as seconds from then; None: not yet."""
        with self._lock:
            return next((c.at_s - since_s for c in self._changes if c.address == address and not c.healthy and c.at_s >= since_s), None)

    def backends(self) -> Mapping[str, generation_pb2.Backend]:
        """The router's servers by address, as last said; none while it does not answer."""
        with self._lock:
            return {b.address: b for b in self._status.backends} if self._status is not None else {}

    def _run(self) -> None:
        while not self._done:
            # A fresh channel each time: one that failed waits before it connects again.
            with open_channel(self._router, FRONT_CHANNEL_OPTIONS, self._security) as channel:
                stub: Any = generation_pb2_grpc.GenerationStub(channel)
                call = stub.Watch(common_pb2.WatchRequest(period_s=_PERIOD_S))
                with self._lock:
                    self._call = call
                    if self._done:
                        call.cancel()
                try:
                    for status in call:
                        self._heard(status)
                    why = "it has ended its reports"
                except grpc.RpcError as error:
                    why = f"{error.code().name}: {error.details()}"
            self._lost(why)
            time.sleep(_AGAIN_S)

    def _heard(self, status: generation_pb2.GenerationStatus) -> None:
        now = time.monotonic()
        with self._lock:
            self._status = status
            self._note(Change(now, "", not status.draining, "draining" if status.draining else ""))
            for backend in status.backends:
                # The router knows best when that was, but not before it last said otherwise: breakers open without its servers' word.
                self._note(Change(max(self._heard_s, backend.turned_s), backend.address, backend.healthy, backend.why))
            self._heard_s = now

    def _lost(self, why: str) -> None:
        with self._lock:
            self._status = None
            self._note(Change(time.monotonic(), "", False, why))

    def _note(self, change: Change) -> None:
        before = self._latest.get(change.address)
        if before is None or before.healthy != change.healthy:
            self._latest[change.address] = change
            self._changes.append(change)


def leftovers(status: Status) -> dict[str, int]:
    """What requests have left in a server that should have none: pages, slots, tickets, staged bytes, requests; only what is not zero."""
    engine = status.engine
    found = {
        "pages": engine.pages_total - engine.pages_free,
        "slots": engine.state_slots_total - engine.state_slots_free,
        "requests": max(status.streams, engine.running + engine.waiting),
    }
    if isinstance(status, prefill_pb2.PrefillStatus):
        found |= {"tickets": status.tickets, "staged bytes": status.staged_bytes}
    return {what: count for what, count in found.items() if count}


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process holds: open file descriptors and threads."""

    fds: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Held":
        """Of a running process, its own only."""
        process = psutil.Process(pid)
        return cls(process.num_fds(), process.num_threads())

    def __sub__(self, other: "Held") -> "Held":
        return Held(self.fds - other.fds, self.threads - other.threads)


class Inventory:
    """What the servers of a live system have left of requests, and hold, when nothing runs."""

    def __init__(self, live: LiveCluster):
        self._live = live
        self._first: dict[int, Held] = {}  # by process id

    def left(self, within_s: float) -> dict[str, dict[str, int]]:
        """Waits until no server has anything left of any request; what is left, by server, after so many seconds."""
        deadline = time.monotonic() + within_s
        while True:
            left = {name: self._left_at(name) for name in self._live.addresses}
            if not any(left.values()) or time.monotonic() > deadline:
                return {name: found for name, found in left.items() if found}
            time.sleep(_AGAIN_S)

    def growth(self) -> dict[str, Held]:
        """By process, how much more it holds than when it was first asked about."""
        found = {}
        for name, process in self._live.processes.items():
            held = Held.of(process.pid)
            found[name] = held - self._first.setdefault(process.pid, held)
        return found

    def _left_at(self, name: str) -> dict[str, int]:
        try:
            return leftovers(self._live.status(name, _STATUS_S))
        except grpc.RpcError as error:
            return {f"answers that are {error.code().name}": 1}

"""Our lanes among the transports of `transfer_transports`: an outbox behind a lane server, and a puller that keeps every block.

And what lies beneath them: a gRPC stream of bare bytes, which no header, window or check slows down.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import psutil

from prfaas_jax.kvcache.segments import Segment, SegmentKey
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.testing.transfer_transports import Role, Transport
from prfaas_jax.transfer.channel import LANE_CHANNEL_OPTIONS, LANE_SERVER_OPTIONS
from prfaas_jax.transfer.lane import LaneServer
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.outbox import Outbox, Ticket
from prfaas_jax.transfer.puller import Puller
from prfaas_jax.transfer.receivers import AnyLaneGroup, Receivers
from prfaas_jax.transfer.security import NONE, Security, add_port, open_channel, server_interceptors
from prfaas_jax.transfer.senders import SharedOutbox

# A KV cache of 2 KiB per token: its segments are ranges of the buffer.
_TOKEN_BYTES = 2048
_SPEC = CacheSpec((CacheGroup(LayerCache("paged", (TensorSpec("k", 8, 128, "bfloat16"),)), (0,)),))
_EPOCH = 1
_IDLE_S = 60.0


def _ticket(run: int) -> Ticket:
    return Ticket(run.to_bytes(16, "little"), _EPOCH)


class Lanes(Transport):
    """Options: lanes, message_kib, checksum, compressed, via (connect there instead), processes, security ({role: Security fields}).

    With `processes` on each side, what is put into their shared memory, and taken from it, is part of the transfer.
    """

    def __init__(self, role: Role, buffer: np.ndarray, options: dict[str, Any]):
        """Starts the lane server at the sender, and the processes of either end."""
        super().__init__(role, buffer, options)
        self._security = Security(**options.get("security", {}).get(role, {}))
        self._open: Ticket | None = None
        self._blocks: dict[int, np.ndarray] = {}
        self._segment, processes = options["message_kib"] << 10, options["processes"]
        lane: dict[str, Any] = {"address": options["address"], "message_bytes": self._segment, "security": self._security}
        self._outbox: Outbox
        self._server: LaneServer | SharedOutbox
        self._receivers: Receivers | None = None
        if role == "sender" and processes:
            self._outbox = self._server = SharedOutbox(_SPEC, 4 * buffer.nbytes, 600.0, processes=processes, **lane)
        elif role == "sender":
            self._outbox = Outbox(_SPEC, 4 * buffer.nbytes, 600.0)
            self._server = LaneServer(self._outbox, **lane)
        elif processes:
            self._receivers = Receivers(processes, self._security)
            self._receivers.start()
        if role == "sender":
            self._server.start()

    def hello(self) -> dict[str, Any]:
        """Where the lanes are."""
        return {"lanes": self._server.addresses} if self.role == "sender" else {}

    def meet(self, peer: dict[str, Any]) -> None:
        """Connects, and waits until every lane has carried its first probe."""
        if self.role == "receiver":
            addresses = [self.options["via"]] if self.options["via"] else peer["lanes"]
            if self._receivers is None:
                self._groups: list[AnyLaneGroup] = [
                    LaneGroup(address, self.options["lanes"], self._security, probe=False) for address in addresses
                ]
            else:
                self._groups = [self._receivers.connect(address, self.options["lanes"], probe=False) for address in addresses]
            for group in self._groups:
                if not group.warm(30.0):
                    raise OSError(f"lanes to {group.address} did not come up")

    def prepare(self, nbytes: int, run: int) -> None:
        """Opens a ticket, whose segments are the buffer's first bytes: ready, unless they have to be put into shared memory."""
        if self._open is not None:
            self._outbox.release(self._open.id, self._open.epoch)
        self._open = self._outbox.open(nbytes // _TOKEN_BYTES, _ticket(run))
        self._server.shares(self._open).result(_IDLE_S)
        if not self.options["processes"]:
            self.send(nbytes)

    def send(self, nbytes: int) -> None:
        """Makes them ready."""
        assert self._open is not None
        view = self.buffer.data
        for start in range(0, nbytes, self._segment):
            stop = min(nbytes, start + self._segment)
            key = SegmentKey(0, 0, (0, 1), (start // _TOKEN_BYTES, stop // _TOKEN_BYTES), (0, 8))
            self._outbox.put(self._open, Segment(key, view[start:stop]))
        self._outbox.finish(self._open)

    def receive(self, nbytes: int, run: int, ask: Callable[[], None]) -> None:
        """Pulls that ticket; every block is kept, as a view of what came."""
        self._blocks.clear()

        def keep(key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
            # A view of its message is nobody else's; a buffer is used again after `done`.
            self._blocks[key.tokens[0]] = block.copy() if block.flags.writeable else block
            done()

        checked, compressed = self.options["checksum"], self.options["compressed"]
        puller = Puller(_SPEC, nbytes // _TOKEN_BYTES, keep, checked=checked, compressed=compressed, idle_s=_IDLE_S)
        ticket = _ticket(run)
        puller.start(ticket.id, ticket.epoch, self._groups)
        if self.options["processes"]:
            ask()
        puller.finish(nbytes)

    def received(self, nbytes: int) -> np.ndarray:
        """The blocks, one after the other."""
        return np.concatenate([self._blocks[start].reshape(-1).view(np.uint8) for start in sorted(self._blocks)])

    def cpu_s(self) -> float:
        """See Transport.cpu_s."""
        own = self._receivers if self.role == "receiver" else self._server
        pids = own.pids if isinstance(own, SharedOutbox | Receivers) else ()
        return super().cpu_s() + sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


class GrpcStream(Transport):
    """A server stream of slices of the buffer, kept by the receiver: what gRPC's Python layer itself can do. Option: message_kib."""

    _METHOD = "/prfaas.Bare/Read"

    def __init__(self, role: Role, buffer: np.ndarray, options: dict[str, Any]):
        """Starts the server at the sender."""
        super().__init__(role, buffer, options)
        self._size = options["message_kib"] << 10
        self._messages: list[bytes] = []
        if role == "sender":
            pool = futures.ThreadPoolExecutor(2)
            self._server = grpc.server(pool, options=LANE_SERVER_OPTIONS, interceptors=server_interceptors(NONE))
            method = grpc.unary_stream_rpc_method_handler(self._read)
            _, service, name = self._METHOD.split("/")
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
            self._address = add_port(self._server, "address", options["address"], NONE)
            self._server.start()

    def hello(self) -> dict[str, Any]:
        """Where it listens."""
        return {"address": self._address} if self.role == "sender" else {}

    def meet(self, peer: dict[str, Any]) -> None:
        """Makes the channel, which connects with the first transfer."""
        if self.role == "receiver":
            self._channel = open_channel(self.options["via"] or peer["address"], LANE_CHANNEL_OPTIONS)

    def receive(self, nbytes: int, run: int, ask: Callable[[], None]) -> None:
        """Reads the stream to its end."""
        self._messages.clear()
        self._messages += self._channel.unary_stream(self._METHOD)(str(nbytes).encode(), timeout=_IDLE_S)

    def received(self, nbytes: int) -> np.ndarray:
        """The messages, one after the other."""
        return np.frombuffer(b"".join(self._messages), np.uint8)

    def _read(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for start in range(0, nbytes := int(request), self._size):
            yield self.buffer[start : min(nbytes, start + self._size)].tobytes()

"""Our lanes among the transports of `transfer_transports`: an outbox behind a lane server, and a puller that keeps every block.

And what lies beneath them: a gRPC stream of bare bytes, which no header, window or check slows down.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np

from prfaas_jax.kvcache.segments import Segment, SegmentKey
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.testing.transfer_transports import Role, Transport
from prfaas_jax.transfer.channel import LANE_CHANNEL_OPTIONS, LANE_SERVER_OPTIONS
from prfaas_jax.transfer.lane import LaneServer
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.outbox import Outbox, Ticket
from prfaas_jax.transfer.puller import Puller
from prfaas_jax.transfer.security import NONE, Security, add_port, open_channel, server_interceptors

# A KV cache of 2 KiB per token: its segments are ranges of the buffer.
_TOKEN_BYTES = 2048
_SPEC = CacheSpec((CacheGroup(LayerCache("paged", (TensorSpec("k", 8, 128, "bfloat16"),)), (0,)),))
_EPOCH = 1
_IDLE_S = 60.0


def _ticket(run: int) -> Ticket:
    return Ticket(run.to_bytes(16, "little"), _EPOCH)


class Lanes(Transport):
    """Options: lanes, message_kib, checksum, compressed, via (connect there instead), tls ({role: Security fields})."""

    def __init__(self, role: Role, buffer: np.ndarray, options: dict[str, Any]):
        """Starts the lane server at the sender."""
        super().__init__(role, buffer, options)
        self._security = Security(**options.get("security", {}).get(role, {}))
        self._open: Ticket | None = None
        self._blocks: dict[int, np.ndarray] = {}
        self._segment = options["message_kib"] << 10
        if role == "sender":
            self._outbox = Outbox(_SPEC, 4 * buffer.nbytes, lease_s=600.0)
            self._server = LaneServer(self._outbox, options["address"], message_bytes=self._segment, security=self._security)
            self._server.start()

    def hello(self) -> dict[str, Any]:
        """Where the lanes are."""
        return {"lane": self._server.address} if self.role == "sender" else {}

    def meet(self, peer: dict[str, Any]) -> None:
        """Connects, and waits until every lane has carried its first probe."""
        if self.role == "receiver":
            self._group = LaneGroup(self.options["via"] or peer["lane"], self.options["lanes"], self._security, probe=False)
            if not self._group.warm(30.0):
                raise OSError(f"lanes to {self._group.address} did not come up")

    def prepare(self, nbytes: int, run: int) -> None:
        """Opens a ticket whose segments are the buffer's first bytes, all ready."""
        if self._open is not None:
            self._outbox.release(self._open.id, self._open.epoch)
        self._open = self._outbox.open(nbytes // _TOKEN_BYTES, _ticket(run))
        view = self.buffer.data
        for start in range(0, nbytes, self._segment):
            stop = min(nbytes, start + self._segment)
            key = SegmentKey(0, 0, (0, 1), (start // _TOKEN_BYTES, stop // _TOKEN_BYTES), (0, 8))
            self._outbox.put(self._open, Segment(key, view[start:stop]))
        self._outbox.finish(self._open)

    def receive(self, nbytes: int, run: int, ask: Callable[[], None]) -> None:
        """Pulls that ticket; every block is kept, as a view of what came."""
        del ask
        self._blocks.clear()

        def keep(key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
            # A view of its message is nobody else's; a buffer is used again after `done`.
            self._blocks[key.tokens[0]] = block.copy() if block.flags.writeable else block
            done()

        checked, compressed = self.options["checksum"], self.options["compressed"]
        puller = Puller(_SPEC, nbytes // _TOKEN_BYTES, keep, checked=checked, compressed=compressed, idle_s=_IDLE_S)
        ticket = _ticket(run)
        puller.start(ticket.id, ticket.epoch, [self._group])
        puller.finish(nbytes)

    def received(self, nbytes: int) -> np.ndarray:
        """The blocks, one after the other."""
        return np.concatenate([self._blocks[start].reshape(-1).view(np.uint8) for start in sorted(self._blocks)])


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

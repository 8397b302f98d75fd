"""The sending end of lanes: a synchronous gRPC server on its own port that streams an outbox's messages.

Synchronous and apart from the control plane, so that it can move into processes of its own.

Copies of a payload on this side, after the engine's export: one into the message with its header, because gRPC's Python layer takes
nothing but whole `bytes`; one from there into gRPC's own slice; one into the kernel. The last two are not ours to save.
"""

import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc

from prfaas_jax.errors import InvalidInput, PeerMismatch, PrfaasError, TransferError
from prfaas_jax.transfer import frames, wire
from prfaas_jax.transfer.channel import LANE_SERVER_OPTIONS
from prfaas_jax.transfer.dispatch import Dispatcher, Stream
from prfaas_jax.transfer.outbox import Outbox, Ticket
from prfaas_jax.transfer.security import NONE, Security, add_port, server_interceptors

SERVICE = "prfaas.Lane"
METHOD = f"/{SERVICE}/Stream"

_HELLO_S = 5.0
_PONGS, _LEAST_PONG_BYTES, _MOST_PONG_BYTES = 8, 4 << 10, 64 << 10
_PADDING = bytes(_MOST_PONG_BYTES)


@dataclasses.dataclass(eq=False)
class _Served:
    """One stream being served; `stream` and `heard` are set by its threads and read by the watchdog."""

    heard: float
    stream: Stream | None = None
    error: Exception | None = None


class LaneServer:
    """Serves lanes: frames of the reader in, data messages and frames out, for as long as the reader stays.

    Status codes: INVALID_ARGUMENT malformed frame; FAILED_PRECONDITION other protocol version; DATA_LOSS checksum of a frame;
    RESOURCE_EXHAUSTED more than `max_streams` streams; CANCELLED a reader that says no hello, nothing more, or acknowledges nothing.
    What concerns one ticket is a `Failed` frame and leaves the stream alone.
    """

    def __init__(
        self,
        outbox: Outbox,
        address: str = "127.0.0.1:0",
        max_streams: int = 16,
        idle_s: float = 30.0,
        stall_s: float = 30.0,
        message_bytes: int = wire.MESSAGE_BYTES,
        bytes_per_s: float | None = None,
        security: Security = NONE,
    ):
        """Binds at once; port 0 takes a free one.

        Args:
            outbox: where segments come from.
            address: "host:port" to listen on.
            max_streams: streams at a time; each pins two threads.
            idle_s: a stream ends when its reader says nothing for this long; readers ping every second.
            stall_s: a stream is cancelled when its reader acknowledges nothing for this long.
            message_bytes: largest payload of a message.
            bytes_per_s: pace of all streams together; None leaves it to TCP and the windows.
            security: TLS and token; without TLS the address must be a loopback one unless `security.insecure`.

        Raises InvalidInput when the address cannot be bound or a size is out of range.
        """
        if max_streams < 1:
            raise InvalidInput("max_streams", max_streams, "a positive integer")
        self._dispatcher = Dispatcher(outbox, message_bytes, bytes_per_s)
        self._idle_s, self._stall_s = idle_s, stall_s
        self._lock = threading.Lock()
        self._served: dict[grpc.ServicerContext, _Served] = {}
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="lane-watchdog", daemon=True)
        self._threads = futures.ThreadPoolExecutor(max_streams, thread_name_prefix="lane")
        self._server = grpc.server(
            self._threads,
            options=LANE_SERVER_OPTIONS,
            maximum_concurrent_rpcs=max_streams,
            interceptors=server_interceptors(security),
        )
        # No serialisers: a message is bytes already.
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Stream": method}),))
        self.address = add_port(self._server, "lane_address", address, security)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The one address, as others have several."""
        return (self.address,)

    def shares(self, ticket: Ticket) -> futures.Future[dict[int, str]]:
        """See SharedOutbox.shares: the one address brings all, and knows of it."""
        known: futures.Future[dict[int, str]] = futures.Future()
        known.set_result({0: self.address})
        return known

    @property
    def streams(self) -> int:
        """Streams being served now."""
        with self._lock:
            return len(self._served)

    def start(self) -> None:
        """Begins to serve."""
        self._server.start()
        self._watchdog.start()

    def stop(self, grace_s: float) -> None:
        """Refuses new streams at once, lets running ones finish their tickets for up to `grace_s`, then cancels them."""
        self._draining.set()
        done = self._server.stop(grace_s)
        done.wait(grace_s + 5.0)
        self._threads.shutdown(wait=False)  # gRPC leaves it to the garbage collector
        self._stopping.set()
        if self._watchdog.is_alive():
            self._watchdog.join(5.0)

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        served = _Served(time.monotonic())
        with self._lock:
            self._served[context] = served
        try:
            yield from self._stream(served, requests, context)
        except InvalidInput as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except PeerMismatch as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except TransferError as error:
            context.abort(grpc.StatusCode.DATA_LOSS, str(error))
        finally:
            if served.stream is not None:
                self._dispatcher.leave(served.stream)
            with self._lock:
                del self._served[context]

    def _stream(self, served: _Served, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        hello = frames.decode(next(requests, b""))
        if not isinstance(hello, frames.Hello):
            raise InvalidInput("first frame", type(hello).__name__, "Hello")
        served.stream = stream = self._dispatcher.join(hello.session, hello.stream)
        threading.Thread(target=self._listen, args=(served, stream, requests), name="lane-listener", daemon=True).start()
        while True:
            item, alive = self._dispatcher.next(stream)
            if served.error is not None:
                raise served.error
            if not alive or not context.is_active():
                return
            if item is not None:
                yield item if isinstance(item, bytes) else frames.encode(item)
            elif self._draining.is_set() and not self._dispatcher.wanted(stream):
                return

    def _listen(self, served: _Served, stream: Stream, requests: Iterator[bytes]) -> None:
        """Reads the reader's frames until its half of the stream ends; whatever ends it ends the stream."""
        try:
            for request in requests:
                served.heard = time.monotonic()
                self._on_frame(stream, frames.decode(request))
        except PrfaasError as error:
            served.error = error
        except Exception as error:  # gRPC raises a bare exception when the call is over; ours would be a bug that must not hang a reader
            served.error = TransferError(f"{type(error).__name__}: {error}")
        finally:
            self._dispatcher.leave(stream)

    def _on_frame(self, stream: Stream, frame: frames.Frame) -> None:
        match frame:
            case frames.Ack(received):
                self._dispatcher.acknowledge(stream, received)
            case frames.Grant(ticket, epoch, granted):
                self._dispatcher.grant(stream, ticket, epoch, granted)
            case frames.Open():
                self._dispatcher.open(stream, frame)
            case frames.Close(ticket, epoch):
                self._dispatcher.close(stream, ticket, epoch)
            case frames.Lost(number, received):
                self._dispatcher.lost(stream, number, received)
            case frames.Ping(token, nbytes):
                # Several, or there would be no time between their arrivals to measure a rate by.
                size = min(max(nbytes // _PONGS, _LEAST_PONG_BYTES), _MOST_PONG_BYTES)
                for at in range(0, max(1, nbytes), size):
                    left = nbytes - at
                    self._dispatcher.answer(stream, frames.Pong(token, left > size, _PADDING[: min(size, max(0, left))]))
            case _:
                raise InvalidInput("frame", type(frame).__name__, "one that a reader says")

    def _watch(self) -> None:
        """A reader that stops would pin its threads for ever: HTTP/2 flow control has no deadline."""
        while not self._stopping.wait(min(1.0, self._stall_s / 4, self._idle_s / 4)):
            self._dispatcher.forget_orphans()
            now = time.monotonic()
            with self._lock:
                served = list(self._served.items())
            for context, one in served:
                silent = now - one.heard > (self._idle_s if one.stream else min(_HELLO_S, self._idle_s))
                if silent or (one.stream is not None and self._dispatcher.stalled(one.stream, self._stall_s)):
                    context.cancel()

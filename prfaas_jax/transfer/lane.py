"""The sending end of a lane: a synchronous gRPC server on its own port that streams an outbox's messages.

Synchronous and apart from the control plane, so that it can move into processes of its own.
"""

import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc

from prfaas_jax.errors import InvalidInput, PeerMismatch, TransferError
from prfaas_jax.transfer.channel import LANE_SERVER_OPTIONS
from prfaas_jax.transfer.outbox import Outbox, StaleEpoch, UnknownTicket
from prfaas_jax.transfer.security import NONE, Security, add_port, server_interceptors
from prfaas_jax.transfer.wire import FetchRequest

SERVICE = "prfaas.Lane"
METHOD = f"/{SERVICE}/FetchKV"


class LaneServer:
    """Serves FetchKV: a `FetchRequest` in, raw messages out.

    Status codes: INVALID_ARGUMENT malformed request; NOT_FOUND unknown ticket; FAILED_PRECONDITION stale epoch or other protocol
    version; RESOURCE_EXHAUSTED more than `max_streams` streams; ABORTED the prefill failed or fell silent; CANCELLED the reader took
    nothing for `stall_s`.
    """

    def __init__(
        self,
        outbox: Outbox,
        address: str = "127.0.0.1:0",
        max_streams: int = 16,
        idle_s: float = 30.0,
        stall_s: float = 30.0,
        security: Security = NONE,
    ):
        """Binds at once; port 0 takes a free one.

        Args:
            outbox: where messages come from.
            address: "host:port" to listen on.
            max_streams: streams at a time; each pins one thread.
            idle_s: a stream ends when its prefill shows no sign of life for this long.
            stall_s: a stream is cancelled when its reader accepts no message for this long.
            security: what the port asks of peers.

        Raises InvalidInput when the address cannot be bound.
        """
        if max_streams < 1:
            raise InvalidInput("max_streams", max_streams, "a positive integer")
        self._outbox, self._idle_s, self._stall_s = outbox, idle_s, stall_s
        self._lock = threading.Lock()
        # When each stream handed over the message that its reader has yet to accept; None while it waits for the prefill.
        self._handed: dict[grpc.ServicerContext, float | None] = {}
        self._stopping = threading.Event()
        self._watchdog = threading.Thread(target=self._cancel_stalled, name="lane-watchdog", daemon=True)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_streams, thread_name_prefix="lane"),
            interceptors=server_interceptors(security),
            options=LANE_SERVER_OPTIONS,
            maximum_concurrent_rpcs=max_streams,
        )
        # No serialisers: a message is bytes already.
        method = grpc.unary_stream_rpc_method_handler(self._fetch)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"FetchKV": method}),))
        self.address = add_port(self._server, "lane_address", address, security)

    @property
    def streams(self) -> int:
        """Streams being served now."""
        with self._lock:
            return len(self._handed)

    def start(self) -> None:
        """Begins to serve."""
        self._server.start()
        self._watchdog.start()

    def stop(self, grace_s: float) -> None:
        """Refuses new streams at once, lets running ones go on for `grace_s`, then cancels them."""
        done = self._server.stop(grace_s)
        done.wait(grace_s + 5.0)
        self._stopping.set()
        if self._watchdog.is_alive():
            self._watchdog.join(5.0)

    def _fetch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._lock:
            self._handed[context] = None
        try:
            fetch = FetchRequest.decode(request)
            for message in self._outbox.messages(fetch.ticket, fetch.epoch, fetch.from_sequence, context.is_active, self._idle_s):
                with self._lock:
                    self._handed[context] = time.monotonic()
                yield message
                with self._lock:
                    self._handed[context] = None
        except InvalidInput as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except (PeerMismatch, StaleEpoch) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except UnknownTicket as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except TransferError as error:
            context.abort(grpc.StatusCode.ABORTED, str(error))
        finally:
            with self._lock:
                del self._handed[context]

    def _cancel_stalled(self) -> None:
        """A reader that stops reading would pin its thread for ever: HTTP/2 flow control has no deadline."""
        while not self._stopping.wait(min(1.0, self._stall_s / 4)):
            with self._lock:
                limit = time.monotonic() - self._stall_s
                stalled = [context for context, handed in self._handed.items() if handed is not None and handed < limit]
            for context in stalled:
                context.cancel()

"""The HTTP port that Prometheus scrapes: /metrics and nothing else, in threads of its own."""

import contextlib
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from absl import logging
from prometheus_client import CollectorRegistry, make_wsgi_app

from prfaas_jax.errors import InvalidInput
from prfaas_jax.transfer.security import Security, check_listen

_FIELD: Final = "metrics_address"
_PATH: Final = "/metrics"
# Silence of a client, in the handshake too.
_IDLE_S: Final = 5.0
_SCRAPE_S: Final = 20.0
_MAX_SCRAPES: Final = 16
_POLL_S: Final = 0.05
_JOIN_S: Final = 2.0
_TEXT: Final = [("Content-Type", "text/plain; charset=utf-8")]


class MetricsEndpoint:
    """Serves a registry while started.

    With TLS, a client shows a certificate, as at every port. A bearer token is not asked for: as with health checks, whoever watches over
    a server need not be able to use it.
    """

    def __init__(self, address: str, registry: CollectorRegistry, security: Security):
        """`address` is host:port, port 0 takes any free one; raises InvalidInput as `check_listen` does."""
        self._host, self._port = check_listen(_FIELD, address, security)
        self.address = address
        self._app, self._security = _only_metrics(make_wsgi_app(registry)), security
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Binds and serves; `address` is then as bound. Raises InvalidInput for one that cannot be bound."""
        tls = _tls(self._security)
        try:
            self._server = _Server(self._host.strip("[]"), self._port, tls)
        except OSError as error:
            raise InvalidInput(_FIELD, self.address, f"an address of this machine whose port is free ({error.strerror})") from error
        self._server.set_app(self._app)
        self.address = f"{self._host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Takes no more scrapes; waits a little for those under way. Idempotent."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join(_JOIN_S)
        self._server.end(_JOIN_S)
        self._server = self._thread = None


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no news."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread per scrape, up to a number of them; more are hung up on.

    The library's own server makes the TLS handshake in the thread that accepts: one silent client would end all scrapes.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 4 * _MAX_SCRAPES

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._tls, self._free = tls, threading.BoundedSemaphore(_MAX_SCRAPES)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without a look-up of the host's name, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """On the accepting thread."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """On the scrape's own, for a while at most: who sends a byte now and then keeps no place."""
        watchdog = threading.Timer(_SCRAPE_S, _hang_up, (request,))
        watchdog.daemon = True
        watchdog.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            watchdog.cancel()
            self._free.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The handshake, where there is one, then the request."""
        request.settimeout(_IDLE_S)
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        with self._tls.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up, was silent or is a stranger: its trouble."""
        logging.info("a scrape of the metrics failed", exc_info=True)

    def end(self, wait_s: float) -> None:
        """Closes the port once scrapes under way are answered, or after `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        for _ in range(_MAX_SCRAPES):
            if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
                break
        self.server_close()


def _hang_up(request: Any) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


def _tls(security: Security) -> ssl.SSLContext | None:
    """As for the gRPC ports: own certificate, and the client's must descend from the same CA."""
    if security.tls_ca is None or security.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(security.tls_cert, security.tls_key)
    context.load_verify_locations(security.tls_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _only_metrics(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """`app` at its one path; 503 while the server cannot say what it would have to."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != _PATH:
            start_response("404 Not Found", _TEXT)
            return [f"there is only {_PATH}\n".encode()]
        try:
            return app(environ, start_response)
        except Exception:
            logging.warning("metrics could not be read", exc_info=True)
            start_response("503 Service Unavailable", _TEXT)
            return [b"the server does not say how it is\n"]

    return answer

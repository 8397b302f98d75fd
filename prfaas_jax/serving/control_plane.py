"""What the control plane of every server has: a port, health, and an orderly end."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
from absl import logging
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from prfaas_jax.transfer.channel import CHANNEL_OPTIONS, SERVER_OPTIONS, Options
from prfaas_jax.transfer.security import Security, add_port, aio_server_interceptors, open_aio_channel

# A server that comes back is found within a second; the default backs off to two minutes.
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 1000), ("grpc.max_reconnect_backoff_ms", 1000))
_DRAIN_POLL_S = 0.02
# For handlers that are being cancelled to say so to their clients.
_LAST_WRITES_S = 0.5


def control_channel(address: str, security: Security) -> Any:
    """A grpc.aio channel to another server's control plane; it connects on first use and reconnects by itself."""
    return open_aio_channel(address, (*CHANNEL_OPTIONS, *_RECONNECT), security)


class ControlPlane:
    """A grpc.aio server with health checking. `draining` is set before anything else changes."""

    def __init__(self, address: str, service: str, security: Security, options: Options = SERVER_OPTIONS):
        """`service` is the full name of the gRPC service that is served, for health checks by name; `options` are gRPC's."""
        self.address = address
        self._options, self._security = options, security
        self.draining = False
        self._services = ("", service)
        self._health = health.aio.HealthServicer()
        self._server: Any = None

    def bind(self, add: Callable[[Any], None]) -> None:
        """Makes the server, lets `add` put its servicers on it, and binds; raises InvalidInput naming an address that is taken."""
        # No maximum_concurrent_rpcs: it would refuse health checks too. Servicers bound their own calls.
        self._server = grpc.aio.server(options=self._options, interceptors=aio_server_interceptors(self._security))
        add(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.address = add_port(self._server, "address", self.address, self._security)

    async def start(self) -> None:
        """Serves, and says so."""
        await self._server.start()
        for service in self._services:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float, busy: Callable[[], int]) -> None:
        """NOT_SERVING at once, then up to `grace_s` seconds until nothing is `busy`, then every call is cut."""
        self.draining = True
        await self._health.enter_graceful_shutdown()
        deadline = time.monotonic() + grace_s
        while busy() and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
        if left := busy():
            logging.warning("the grace of %.1f s is over: %d requests are cut", grace_s, left)
        await self._server.stop(_LAST_WRITES_S)

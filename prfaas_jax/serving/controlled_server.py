"""What every server has: a control plane with health checks, a status that it tells whoever asks or watches, an orderly end."""

import abc
import asyncio
import time
import uuid
from typing import Any

import grpc
from absl import logging
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.bulletin import Bulletin
from prfaas_jax.serving.metrics import ServerMetrics
from prfaas_jax.serving.proto import common_pb2
from prfaas_jax.transfer.channel import SERVER_OPTIONS, Options
from prfaas_jax.transfer.security import Security, add_port, aio_server_interceptors

_DRAIN_POLL_S = 0.02
# For handlers that are being cancelled to say so to their clients.
_LAST_WRITES_S = 0.5


class ControlledServer(abc.ABC):
    """Base of PrefillServer and GenerationFront, which give `busy`, `_add` and `_status`.

    Attributes:
        address: host:port of the control plane, as bound once it is.
        draining: it is shutting down and takes nothing new; set before anything else changes.
    """

    def __init__(self, address: str, service: str, metrics: ServerMetrics, security: Security, options: Options = SERVER_OPTIONS):
        """`service` is the full name of the gRPC service that is served, for health checks by name; `options` are gRPC's."""
        self.address = address
        self.draining = False
        self._standby = False
        self._boot = uuid.uuid4().hex
        self._bulletin = Bulletin(self._status)
        self._metrics = metrics
        self._grpc_options, self._security = options, security
        self._services = ("", service)
        self._health = health.aio.HealthServicer()
        self._server: Any = None

    @property
    def metrics_address(self) -> str:
        """host:port of the metrics as bound; empty without any."""
        return self._metrics.address

    @property
    def addresses(self) -> dict[str, Any]:
        """Where it is found, as READY lines say it."""
        return {"address": self.address, "metrics_address": self.metrics_address}

    async def start(self) -> None:
        """Binds and serves; raises InvalidInput naming an address that cannot be bound."""
        await self._metrics.start()
        try:
            self._bind()
        except InvalidInput:
            await self._metrics.stop()
            raise
        await self._server.start()
        for service in self._services:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING at once, then up to `grace_s` seconds until nothing is `busy`, then every call is cut."""
        self.draining = True
        self._bulletin.changed()
        await self._health.enter_graceful_shutdown()
        deadline = time.monotonic() + grace_s
        while self.busy and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
        if left := self.busy:
            logging.warning("the grace of %.1f s is over: %d requests are cut", grace_s, left)
        await self._server.stop(_LAST_WRITES_S)
        await self._metrics.stop()

    def stand_by(self, standby: bool) -> None:
        """Takes nothing new from now on, or takes it again; what is here is finished."""
        self._standby = standby
        self._bulletin.changed()

    @property
    @abc.abstractmethod
    def busy(self) -> int:
        """Requests that are not done."""

    async def Status(self, request: common_pb2.StatusRequest, context: Any) -> Any:
        """See the service's own proto."""
        return self._status()

    async def Watch(self, request: common_pb2.WatchRequest, context: Any) -> None:
        """See the service's own proto."""
        await self._bulletin.watch(request, context)

    @abc.abstractmethod
    def _status(self) -> Any:
        """A fresh status message."""

    @abc.abstractmethod
    def _add(self, server: Any) -> None:
        """Puts its servicers on a grpc.aio server."""

    def _bind(self) -> None:
        # No maximum_concurrent_rpcs: it would refuse health checks too. Servicers bound their own calls.
        server = grpc.aio.server(options=self._grpc_options, interceptors=aio_server_interceptors(self._security))
        self._add(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.address = add_port(server, "address", self.address, self._security)
        # Only now: gRPC's thread lives for as long as a server that was not bound is held.
        self._server = server

"""How a server makes itself known to routers that were not told of it, and again to one that was restarted."""

import asyncio
import dataclasses
from typing import Any, Literal

import grpc
from absl import logging

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.control_plane import control_channel
from prfaas_jax.serving.proto import fleet_pb2, fleet_pb2_grpc
from prfaas_jax.transfer.endpoint import parse_address
from prfaas_jax.transfer.security import Security

_PERIOD_S = 2.0
_CALL_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """Which routers a server joins, and as what.

    Attributes:
        join: addresses of routers, comma separated; empty: whoever uses this server was told its address.
        cluster: the cluster that it joins, by the routers' deployment.
        advertise: where routers and decode servers reach its control plane, if not at the address that it listens on.
    """

    join: str = ""
    cluster: str = ""
    advertise: str = ""

    def __post_init__(self) -> None:
        for router in self.routers:
            parse_address("join", router)
        if self.join and not self.cluster:
            raise InvalidInput("cluster", self.cluster, "the name of the cluster to join")
        if self.advertise:
            parse_address("advertise", self.advertise)

    def check_reachable(self, address: str) -> None:
        """Raises InvalidInput where routers would be told to reach a server at `address`, on which it listens everywhere."""
        if self.join and not self.advertise and address.rpartition(":")[0] in ("0.0.0.0", "[::]"):
            raise InvalidInput("advertise", self.advertise, f"where routers reach this server, which listens on {address}")

    @property
    def routers(self) -> tuple[str, ...]:
        """One by one."""
        return tuple(part.strip() for part in self.join.split(",") if part.strip())


class Membership:
    """Says to every router, every few seconds, that a server is there, and when it goes. On the server's event loop."""

    def __init__(self, options: JoinOptions, role: Literal["prefill", "decode"], security: Security):
        self._options, self._role, self._security = options, role, security
        self._channels: list[Any] = []
        self._task: asyncio.Task[None] | None = None
        self._address = ""

    def start(self, address: str) -> None:
        """From now on; `address` is where the server listens."""
        self._address = self._options.advertise or address
        if self._options.routers:
            self._channels = [control_channel(router, self._security) for router in self._options.routers]
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """The server goes; routers that cannot be reached see it by themselves."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait({self._task})
        stubs: list[Any] = [fleet_pb2_grpc.FleetStub(channel) for channel in self._channels]
        message = fleet_pb2.LeaveRequest(address=self._address)
        await asyncio.gather(*(stub.Leave(message, timeout=_CALL_S) for stub in stubs), return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _run(self) -> None:
        while True:
            await asyncio.gather(*(self._join(channel) for channel in self._channels))
            await asyncio.sleep(_PERIOD_S)

    async def _join(self, channel: Any) -> None:
        stub: Any = fleet_pb2_grpc.FleetStub(channel)
        message = fleet_pb2.JoinRequest(role=self._role, address=self._address, cluster=self._options.cluster)
        try:
            await stub.Join(message, timeout=_CALL_S)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:  # a router that is not there is no news
                logging.warning("a router refuses this server: %s: %s", error.code().name, error.details())

"""What a router knows of the servers behind it: their last status, asked for periodically."""

import asyncio
import dataclasses
import time
from typing import Any, Literal

import grpc
from absl import logging

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.view import ClusterView, Servers, ServerStatus
from prfaas_jax.serving.control_plane import control_channel
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc, prefill_pb2_grpc
from prfaas_jax.transfer.endpoint import parse_address
from prfaas_jax.transfer.security import Security

Role = Literal["prefill", "decode"]


@dataclasses.dataclass
class Backend:
    """One server and its last report. `forwarded` counts requests sent there that the report cannot know of yet."""

    role: Role
    address: str
    channel: Any
    healthy: bool = False
    why: str = "not asked yet"
    status: Any = None
    forwarded: int = 0

    @property
    def queue(self) -> int:
        """Requests there: what it reported, or what this router has sent, whichever is more."""
        engine = self.status.engine if self.status is not None else None
        reported = engine.running + engine.waiting if engine is not None else 0
        return max(reported, self.forwarded)

    async def ask(self, timeout_s: float) -> None:
        """Refreshes `healthy`, `why` and `status`; a server that does not answer in time, or drains, is not healthy."""
        stub: Any = (prefill_pb2_grpc.PrefillStub if self.role == "prefill" else generation_pb2_grpc.GenerationStub)(self.channel)
        before = self.healthy
        try:
            self.status = await stub.Status(common_pb2.StatusRequest(), timeout=timeout_s)
            self.healthy, self.why = not self.status.draining, "draining" if self.status.draining else ""
        except grpc.RpcError as error:
            self.healthy, self.why = False, f"{error.code().name}: {error.details()}"
        if self.healthy != before:
            logging.info("%s server %s is %s", self.role, self.address, "healthy" if self.healthy else f"unhealthy: {self.why}")


class Backends:
    """All servers of a router, polled every `period_s` seconds."""

    def __init__(self, prefill: tuple[str, ...], decode: tuple[str, ...], period_s: float, security: Security):
        """Raises InvalidInput for malformed or repeated addresses, or no decode server."""
        if not decode:
            raise InvalidInput("decode", decode, "at least one decode server")
        for field, addresses in (("prefill", prefill), ("decode", decode)):
            for address in addresses:
                parse_address(field, address)
            if len(set(addresses)) != len(addresses):
                raise InvalidInput(field, addresses, "each address once")
        self._addresses: dict[Role, tuple[str, ...]] = {"prefill": prefill, "decode": decode}
        self._period_s, self._security = period_s, security
        self._all: dict[tuple[Role, str], Backend] = {}
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Asks every server once, then periodically in the background."""
        for role, addresses in self._addresses.items():
            for address in addresses:
                self._all[role, address] = Backend(role, address, control_channel(address, self._security))
        await self._ask_all()
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Ends the polling and closes every channel."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait({self._poller})
        for backend in self._all.values():
            await backend.channel.close()

    def get(self, role: Role, address: str) -> Backend:
        """The backend that a policy has named."""
        return self._all[role, address]

    def view(self) -> ClusterView:
        """A snapshot for a policy."""
        rows = {
            role: Servers.of(ServerStatus(b.address, b.healthy, b.queue) for b in self._all.values() if b.role == role)
            for role in self._addresses
        }
        return ClusterView(rows["prefill"], rows["decode"])

    def report(self) -> list[generation_pb2.Backend]:
        """For the router's own status."""
        return [
            generation_pb2.Backend(
                role=b.role, address=b.address, healthy=b.healthy, why=b.why, engine=b.status.engine if b.status is not None else None
            )
            for b in self._all.values()
        ]

    async def _ask_all(self) -> None:
        await asyncio.gather(*(backend.ask(timeout_s=max(1.0, 2 * self._period_s)) for backend in self._all.values()))

    async def _poll(self) -> None:
        while True:
            begun = time.monotonic()
            await self._ask_all()
            await asyncio.sleep(max(0.05, self._period_s - (time.monotonic() - begun)))

"""A decode server's connections to prefill servers: one control channel and one group of lanes each, warm and shared by all requests."""

import asyncio
import dataclasses
import time
from typing import Any

import grpc

from prfaas_jax.serving.control_plane import control_channel
from prfaas_jax.serving.proto import common_pb2, generation_pb2, prefill_pb2, prefill_pb2_grpc
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.link import LinkEstimate
from prfaas_jax.transfer.security import Security

# Release is a courtesy: the lease of the other side ends what this does not reach.
_RELEASE_S = 2.0
# What a server can do changes only when it is restarted.
_ABILITIES_S = 30.0
_STATUS_S = 2.0


class PrefillPeers:
    """Connections by address; lanes are opened with the same `security`, `lanes` of them to each sender."""

    def __init__(self, security: Security, lanes: int = 1) -> None:
        self.security, self._lanes = security, lanes
        self._channels: dict[str, Any] = {}
        self._groups: dict[str, LaneGroup] = {}
        self._senders: dict[str, str] = {}  # lane address -> prefill server that named it last
        self._codecs: dict[str, tuple[float, tuple[str, ...]]] = {}  # when asked, what was answered
        self._releases: set[asyncio.Task[None]] = set()

    def stub(self, address: str) -> prefill_pb2_grpc.PrefillStub:
        """The stub for an address; the channel connects on first use and reconnects by itself."""
        if address not in self._channels:
            self._channels[address] = control_channel(address, self.security)
        return prefill_pb2_grpc.PrefillStub(self._channels[address])

    def groups(self, prefill_address: str, lane_addresses: list[str]) -> list[LaneGroup]:
        """Lanes to each address that a prefill server named, new ones where the old are dead."""
        for address in lane_addresses:
            self._senders[address] = prefill_address
            if address not in self._groups or not self._groups[address].alive:
                self._groups[address] = LaneGroup(address, self._lanes, self.security)
        return [self._groups[address] for address in dict.fromkeys(lane_addresses)]

    def link(self, prefill_address: str) -> LinkEstimate | None:
        """The link from a prefill server as it is measured now; None before its lanes are known."""
        for address, group in self._groups.items():
            if self._senders[address] == prefill_address and group.alive:
                return group.estimate()
        return None

    async def codecs(self, prefill_address: str) -> tuple[str, ...]:
        """Names of device codecs that a prefill server has programs for; none while it does not answer."""
        now = time.monotonic()
        known = self._codecs.get(prefill_address)
        if known is None or now - known[0] > _ABILITIES_S:
            try:
                status = await self.stub(prefill_address).Status(common_pb2.StatusRequest(), timeout=_STATUS_S)
            except grpc.RpcError:
                return ()  # the prefill itself will say why
            known = self._codecs[prefill_address] = now, tuple(status.codecs)
        return known[1]

    def links(self) -> list[generation_pb2.Link]:
        """Every link as it is measured now."""
        return [link_to_proto(self._senders[at], group.estimate()) for at, group in self._groups.items() if group.alive]

    def release(self, address: str, ticket: bytes, epoch: int) -> None:
        """Tells the other side, in the background and for a bounded time, that its staging is not needed any more."""
        task = asyncio.create_task(self._release(address, ticket, epoch))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def close(self) -> None:
        """Waits for releases under way and closes every connection."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=_RELEASE_S)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        await asyncio.gather(*(asyncio.to_thread(group.close) for group in self._groups.values()))
        self._groups.clear()

    async def _release(self, address: str, ticket: bytes, epoch: int) -> None:
        try:
            await self.stub(address).Release(prefill_pb2.ReleaseRequest(ticket=ticket, epoch=epoch), timeout=_RELEASE_S)
        except grpc.RpcError:
            return  # gone or unreachable: the lease ends it there


def link_to_proto(prefill_address: str, estimate: LinkEstimate) -> generation_pb2.Link:
    """Field by field."""
    return generation_pb2.Link(prefill_address=prefill_address, **dataclasses.asdict(estimate))

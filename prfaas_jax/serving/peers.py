"""A decode server's connections to prefill servers: one control channel and one group of lanes each, warm and shared by all requests."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from prfaas_jax.serving.control_plane import control_channel
from prfaas_jax.serving.proto import common_pb2, generation_pb2, prefill_pb2, prefill_pb2_grpc
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.link import LinkEstimate, together
from prfaas_jax.transfer.receivers import AnyLaneGroup, Receivers
from prfaas_jax.transfer.security import Security

# Release is a courtesy: the lease of the other side ends what this does not reach.
_RELEASE_S = 2.0
# What a server can do changes only when it is restarted.
_ABILITIES_S = 30.0
_STATUS_S = 2.0
# A receiver process that has ended is up again sooner.
_RESTARTED_S = 3.0
# Where a request's KV comes from, a prefill server's address, and how many bytes of it are not here yet.
Coming = Callable[[], tuple[str, float]]


class PrefillPeers:
    """Connections by address; lanes are opened with the same `security`, `lanes` of them to each sender.

    They end in so many `processes`, which are up between `start` and `close`, or, without any, in this one.
    """

    def __init__(self, security: Security, lanes: int = 1, processes: int = 0) -> None:
        self.security, self._lanes = security, lanes
        self._receivers = Receivers(processes, security) if processes else None
        self._channels: dict[str, Any] = {}
        self._groups: dict[str, AnyLaneGroup] = {}
        self._senders: dict[str, str] = {}  # lane address -> prefill server that named it last
        self._codecs: dict[str, tuple[float, tuple[str, ...]]] = {}  # when asked, what was answered
        self._releases: set[asyncio.Task[None]] = set()
        self._coming: set[Coming] = set()

    def stub(self, address: str) -> prefill_pb2_grpc.PrefillStub:
        """The stub for an address; the channel connects on first use and reconnects by itself."""
        if address not in self._channels:
            self._channels[address] = control_channel(address, self.security)
        return prefill_pb2_grpc.PrefillStub(self._channels[address])

    def start(self) -> None:
        """Starts the processes, if any; raises TransferError when one does not come up."""
        if self._receivers is not None:
            self._receivers.start()

    async def groups(self, prefill_address: str, lane_addresses: list[str]) -> list[AnyLaneGroup]:
        """Lanes to each address that a prefill server named, new ones where the old are dead.

        Waits a little for a receiver process that is being started again; raises TransferError when none comes up.
        """
        if self._receivers is not None:
            deadline = time.monotonic() + _RESTARTED_S
            while not self._receivers.pids and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        # A sender process that was started again has another address; a server that is gone may never come back.
        for address in [at for at, group in self._groups.items() if not group.alive]:
            del self._groups[address], self._senders[address]
        for address in lane_addresses:
            self._senders[address] = prefill_address
            if address not in self._groups:
                # One probe measures the link that all of a server's addresses share.
                probe = address == lane_addresses[0]
                if self._receivers is None:
                    self._groups[address] = LaneGroup(address, self._lanes, self.security, probe=probe)
                else:
                    self._groups[address] = self._receivers.connect(address, self._lanes, probe=probe)
        return [self._groups[address] for address in dict.fromkeys(lane_addresses)]

    def link(self, prefill_address: str) -> LinkEstimate | None:
        """The link from a prefill server as it is measured now; None before its lanes are known."""
        groups = [group for address, group in self._groups.items() if self._senders[address] == prefill_address and group.alive]
        return together([group.estimate() for group in groups]) if groups else None

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

    @contextlib.contextmanager
    def expecting(self, coming: Coming) -> Iterator[None]:
        """KV is to come, while the block runs."""
        self._coming.add(coming)
        try:
            yield
        finally:
            self._coming.discard(coming)

    def links(self) -> list[generation_pb2.Link]:
        """Every link as it is measured now, and what is to come over it."""
        measured = {address: self.link(address) for address in self._senders.values()}
        found = {address: link_to_proto(address, link) for address, link in measured.items() if link is not None}
        for coming in self._coming:
            address, left_bytes = coming()
            link = found.setdefault(address, generation_pb2.Link(prefill_address=address))
            link.pending += 1
            link.pending_bytes += left_bytes
        return list(found.values())

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
        if self._receivers is not None:
            await asyncio.to_thread(self._receivers.close)

    async def _release(self, address: str, ticket: bytes, epoch: int) -> None:
        try:
            await self.stub(address).Release(prefill_pb2.ReleaseRequest(ticket=ticket, epoch=epoch), timeout=_RELEASE_S)
        except grpc.RpcError:
            return  # gone or unreachable: the lease ends it there


def link_to_proto(prefill_address: str, estimate: LinkEstimate) -> generation_pb2.Link:
    """Field by field."""
    return generation_pb2.Link(prefill_address=prefill_address, **dataclasses.asdict(estimate))

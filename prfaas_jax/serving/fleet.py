"""The servers behind a router: they stream their status, come and go, and are left alone while they fail."""

import asyncio
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import grpc
from absl import logging

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.breaker import Breaker, BreakerOptions
from prfaas_jax.serving.control_plane import control_channel
from prfaas_jax.serving.deployment import ClusterServers
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc, prefill_pb2_grpc
from prfaas_jax.transfer.endpoint import parse_address
from prfaas_jax.transfer.security import Security

Role = Literal["prefill", "decode"]
# A server that cannot be reached is tried again this soon; its channel backs off by itself.
_AGAIN_S = 0.2
# Parts of the time after which a server is silent.
_SLICES = 4
# A router that starts waits so long for servers that do not answer, before it begins without them.
_FIRST_S = 5.0
# One that joined and has not been heard of for so long is forgotten; if it is there after all it joins again.
_FORGET_S = 60.0


@dataclasses.dataclass(frozen=True)
class FleetOptions(BreakerOptions):
    """How servers are watched.

    Attributes:
        report_s: a server says how it is at least this often, and at once when that changes.
        silence_s: one that has said nothing for so long, frozen, cut off or too busy, gets nothing new.
        lost_s: and after so long what it has goes elsewhere; sooner where its connection breaks. None: three times silence_s.
    """

    report_s: float = 0.25
    silence_s: float = 1.0
    lost_s: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.02 <= self.report_s <= 60:
            raise InvalidInput("report_s", self.report_s, "0.02..60 seconds")
        if not self.silence_s >= 2 * self.report_s:
            raise InvalidInput("silence_s", self.silence_s, f"at least twice report_s, {2 * self.report_s} s")
        if self.lost_s is not None and not self.lost_s >= self.silence_s:
            raise InvalidInput("lost_s", self.lost_s, f"at least silence_s, {self.silence_s} s")

    @property
    def given_up_s(self) -> float:
        """`lost_s`, with its default filled in."""
        return 3 * self.silence_s if self.lost_s is None else self.lost_s


@dataclasses.dataclass(eq=False)
class Server:
    """One server, as its last report left it, and what this router has sent there since.

    Attributes:
        cluster: the one that it belongs to.
        role: what it is asked to do.
        address: where it is reached from here.
        channel: to its control plane.
        breaker: of the requests that this router sends to it.
        up: it answers and takes work; `why` says what is wrong otherwise; so since `turned_s`, monotonic seconds.
        there: it is not lost: what it has it may still do.
        status: its last report, which came at `heard_s`, monotonic seconds.
        sent: account -> prefill seconds (as the model has them) of requests that no report has counted yet.
        coming: account -> prefill cluster and bytes (of the model) of KV that is to come to it, likewise.
        here: requests that this router has there now.
        calls: the streams of these, of a decode server.
        joined: it came by itself, at run time.
        leaving: it goes; what it has is finished, and when it is not heard of any more it is forgotten.
    """

    cluster: str
    role: Role
    address: str
    channel: Any
    breaker: Breaker
    up: bool = False
    why: str = "not asked yet"
    turned_s: float = 0.0
    there: bool = False
    status: Any = None
    heard_s: float = 0.0
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    coming: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    here: int = 0
    calls: set[Any] = dataclasses.field(default_factory=set)
    leaving: bool = False
    joined: bool = False

    def takes(self, now: float) -> bool:
        """Whether a request may be sent there; `now` in monotonic seconds."""
        return self.up and not self.leaving and self.breaker.allows(now)

    @property
    def queue(self) -> int:
        """Requests there: what it reported, or what this router has sent, whichever is more."""
        engine = self.status.engine if self.status is not None else None
        return max(engine.running + engine.waiting if engine is not None else 0, self.here)


class Fleet:
    """All servers by cluster; `changed(cluster)` is called after anything about one of a cluster's servers has changed.

    Everything runs on one event loop.

    Attributes:
        clusters: by name.
        turns: how often a server has come to take work, or ceased to.
    """

    def __init__(self, clusters: Sequence[ClusterServers], options: FleetOptions, security: Security, changed: Callable[[str], None]):
        """Connects to nothing yet; raises InvalidInput for malformed or repeated addresses, or no decode server."""
        self.clusters = {c.name: c for c in clusters}
        self.turns = 0
        self._options, self._security, self._changed = options, security, changed
        self._servers: dict[tuple[Role, str], Server] = {}
        self._watchers: dict[Server, asyncio.Task[None]] = {}
        self._fingerprint: tuple[str, str] | None = None
        if not any(c.decode for c in clusters):
            raise InvalidInput("decode", (), "at least one decode server")
        for role in ("prefill", "decode"):
            addresses = [a for c in clusters for a in getattr(c, role)]
            for address in addresses:
                parse_address(role, address)
            if len(set(addresses)) != len(addresses):
                raise InvalidInput(role, addresses, "each address once")

    async def start(self) -> None:
        """Asks every server, and returns when each has answered, or has had its time."""
        first = [self._add(c.name, "prefill", address) for c in self.clusters.values() for address in c.prefill]
        first += [self._add(c.name, "decode", address) for c in self.clusters.values() for address in c.decode]
        await asyncio.wait(first, timeout=max(_FIRST_S, self._options.silence_s))
        for server in self:
            if server.status is not None:  # by now it is known what the decode servers serve
                self._heard(server, server.status)

    async def stop(self) -> None:
        """Ends the watching and closes every channel."""
        for task in self._watchers.values():
            task.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        for server in self._servers.values():
            await server.channel.close()

    # --- who there is ----------------------------------------------------------------------------------------------------------

    def of(self, cluster: str, role: Role) -> list[Server]:
        """The servers of a cluster."""
        return [s for s in self._servers.values() if s.cluster == cluster and s.role == role]

    def get(self, role: Role, address: str) -> Server | None:
        """The server at an address, as it is reached from here."""
        return self._servers.get((role, address))

    def __iter__(self) -> Iterator[Server]:
        return iter(list(self._servers.values()))

    def join(self, cluster: str, role: str, address: str) -> None:
        """A server comes, or says again that it is there; raises InvalidInput for a cluster that is not known, or a role it has not."""
        if cluster not in self.clusters:
            raise InvalidInput("cluster", cluster, f"one of {', '.join(self.clusters)}")
        if role != "prefill" and (role != "decode" or self.clusters[cluster].kind != "region"):
            raise InvalidInput("role", role, f"a role of {cluster}, which is a {self.clusters[cluster].kind} cluster")
        parse_address("address", address)
        as_role: Role = "prefill" if role == "prefill" else "decode"
        known = self._servers.get((as_role, address))
        if known is None:
            logging.info("%s server %s joins %s", role, address, cluster)
            self._add(cluster, as_role, address)
            self._servers[as_role, address].joined, self._servers[as_role, address].heard_s = True, time.monotonic()
        elif known.cluster != cluster:
            raise InvalidInput("cluster", cluster, f"{known.cluster}, which {address} is of already")
        elif known.leaving:
            known.leaving = False
            self.turns += 1
            self._changed(cluster)

    def leave(self, address: str) -> None:
        """A server that joined goes: it gets nothing new. Other addresses are ignored: what the deployment names, nobody can take away."""
        for server in self._servers.values():
            if server.address == address and server.joined and not server.leaving:
                server.leaving, server.why = True, "it has left"
                self._changed(server.cluster)

    # --- watching --------------------------------------------------------------------------------------------------------------

    def _add(self, cluster: str, role: Role, address: str) -> "asyncio.Future[None]":
        server = Server(cluster, role, address, control_channel(address, self._security), Breaker(self._options))
        self._servers[role, address] = server
        heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers[server] = asyncio.create_task(self._watch(server, heard))
        return heard

    async def _watch(self, server: Server, heard: "asyncio.Future[None]") -> None:
        """Reads what the server says for as long as the router runs."""
        stub: Any = (prefill_pb2_grpc.PrefillStub if server.role == "prefill" else generation_pb2_grpc.GenerationStub)(server.channel)
        while True:
            call = stub.Watch(common_pb2.WatchRequest(period_s=self._options.report_s))
            try:
                while True:
                    lost_s = self._options.given_up_s if heard.done() else max(_FIRST_S, self._options.given_up_s)
                    status = await _read(call, self._options.silence_s, lost_s, functools.partial(self._silent, server))
                    if status is grpc.aio.EOF:
                        raise ConnectionError("it has ended its reports")
                    self._heard(server, status)
                    if not heard.done():
                        heard.set_result(None)
            except TimeoutError:
                self._lost(server, f"silent for {lost_s} s")
            except grpc.RpcError as error:
                self._lost(server, f"{error.code().name}: {error.details()}")
            except ConnectionError as error:
                self._lost(server, str(error))
            finally:
                call.cancel()
            if not heard.done():
                heard.set_result(None)
            if server.leaving or (server.joined and time.monotonic() - server.heard_s > _FORGET_S):
                logging.info("%s server %s of %s has left", server.role, server.address, server.cluster)
                del self._servers[server.role, server.address], self._watchers[server]
                await server.channel.close()
                return
            await asyncio.sleep(_AGAIN_S)

    def _heard(self, server: Server, status: Any) -> None:
        if server.status is not None and server.status.boot != status.boot:
            server.sent.clear()  # another process, which has none of it
            server.coming.clear()
        server.status, server.heard_s, server.there = status, time.monotonic(), True
        for account in status.accepted:
            server.sent.pop(account, None)
            server.coming.pop(account, None)
        self._set(server, self._objection(server, status))
        self._changed(server.cluster)

    def _objection(self, server: Server, status: Any) -> str:
        """Why a server that answers gets no work; empty when it does."""
        if status.draining:
            return "draining"
        if status.standby:
            return "standby: its instances have another role"
        mine = (status.model_fingerprint, status.cache_fingerprint)
        others = any(s.up and s.role == "decode" and s is not server for s in self)
        # A stranger that joins while the others are down does not say what is right.
        if server.role == "decode" and not others and not (server.joined and self._fingerprint):
            self._fingerprint = mine
        if self._fingerprint is not None and mine != self._fingerprint:
            return f"another model: fingerprints {mine}, where the decode servers have {self._fingerprint}"
        return ""

    def _silent(self, server: Server) -> None:
        """Frozen, or busy: it gets nothing new, and what it has it keeps for now."""
        self._set(server, f"silent for {self._options.silence_s} s")
        self._changed(server.cluster)

    def _lost(self, server: Server, why: str) -> None:
        server.there = False
        self._set(server, why)
        # Whoever waits for a token of it must not wait for a deadline.
        for call in list(server.calls):
            call.cancel()
        self._changed(server.cluster)

    def suspect(self, server: Server, why: str, sent: float) -> None:
        """Somebody whose request was sent then could not reach it: it gets nothing until it reports again."""
        server.there = False
        self._set(server, why)
        server.breaker.failed(time.monotonic(), sent)
        self._changed(server.cluster)

    def _set(self, server: Server, why: str) -> None:
        up = not why
        if up != server.up or (why and why != server.why and server.why == "not asked yet"):
            logging.info("%s server %s of %s is %s", server.role, server.address, server.cluster, "healthy" if up else f"unhealthy: {why}")
        if up != server.up:
            self.turns += 1
            server.turned_s = time.monotonic()
        server.up, server.why = up, why

    def report(self, now: float) -> list[generation_pb2.Backend]:
        """For the router's own status; `now` in monotonic seconds."""
        return [
            generation_pb2.Backend(
                role=s.role,
                address=s.address,
                cluster=s.cluster,
                healthy=s.takes(now),
                why=s.why if not s.up or s.leaving else "" if s.breaker.allows(now) else "its breaker is open",
                engine=s.status.engine if s.status is not None else None,
                breaker=s.breaker.state(now) if s.role == "decode" else "",
                turned_s=s.turned_s,
            )
            for s in self._servers.values()
        ]


async def _read(call: Any, silence_s: float, lost_s: float, silent: Callable[[], None]) -> Any:
    """The next word of a call; calls `silent` after `silence_s` without one, and raises TimeoutError after `lost_s`.

    In slices: a router that was frozen itself finds one of them over, and reads in the next what was said meanwhile.
    """
    read = asyncio.ensure_future(call.read())
    try:
        for waited in range(1, math.ceil(lost_s / silence_s * _SLICES) + 1):
            if (await asyncio.wait({read}, timeout=silence_s / _SLICES))[0]:
                return read.result()
            if waited == _SLICES:
                silent()
        raise TimeoutError
    finally:
        read.cancel()

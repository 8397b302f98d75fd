"""What policies and controllers see of a live system: reports of servers, and what was placed since, as scheduling's numpy rows.

All in the model's units: with a profiled system that runs `Scale.time` times as fast, a wall second is that many of the view's. The same
`ClusterView` stays as long as the clusters do; its columns are written into, so a policy may keep what it has bound to it.
"""

import dataclasses
import math
import time
from collections.abc import Container, Mapping, Sequence

import numpy as np

from prfaas_jax.scheduling.profiles import Instance, prefill_s
from prfaas_jax.scheduling.topology import Link, Topology
from prfaas_jax.scheduling.view import ClusterView, Links, Load, Servers
from prfaas_jax.serving.breaker import Breaker
from prfaas_jax.serving.deployment import ClusterServers, Scale
from prfaas_jax.serving.fleet import Fleet, Server

# What a server says of a link tells nothing any more when it is older than this: the link is taken for what the deployment says.
_MEMORY_S = 30.0


@dataclasses.dataclass(slots=True)
class _Instance:
    """When a prefill instance will have done what it has, in seconds of the view."""

    free_at_s: float
    jobs: int
    fresh: int


class LiveView:
    """Keeps a `ClusterView` up to date. On one event loop.

    `touch(cluster)` says that something about it has changed; `at(now)` brings rows that were touched up to date and returns the view.
    """

    def __init__(
        self, clusters: Sequence[ClusterServers], links: Sequence[Link] | None, topology: Topology | None, scale: Scale, fleet: Fleet
    ):
        """`links` are the routes; None: every prefill cluster reaches every region, at a rate that is not known."""
        self._fleet, self._scale = fleet, scale
        self._far = [c for c in clusters if c.kind == "prefill"]
        self._near = [c for c in clusters if c.kind == "region"]
        self.far_row = {c.name: i for i, c in enumerate(self._far)}
        self.near_row = {c.name: i for i, c in enumerate(self._near)}
        self._profiles: Mapping[str, Instance] = {c.name: c.instance for c in topology.clusters} if topology is not None else {}
        self._routes = {(x.prefill, x.decode): x for x in links} if links is not None else None
        self.breakers: dict[tuple[str, str], Breaker] = {}  # region, prefill server: of the way there
        self._links = Links.none(len(self._far), len(self._near))
        self._view = ClusterView(_servers(self._far), _servers(self._near), self._links)
        self._touched = set(self.far_row) | set(self.near_row)
        self._settled_until = -math.inf  # monotonic seconds; then some breaker lets requests through again

    @property
    def now(self) -> float:
        """The view's clock, seconds."""
        return time.monotonic() * self._scale.time

    def touch(self, cluster: str) -> None:
        """A report came, a request went or came, a server was lost."""
        self._touched.add(cluster)

    def unsettled(self) -> None:
        """A breaker has changed its mind, or a server has come or gone."""
        self._settled_until = -math.inf
        self._touched |= self.far_row.keys() | self.near_row.keys()

    def at(self, now: float) -> ClusterView:
        """The view; `now` on its own clock."""
        if (wall := time.monotonic()) >= self._settled_until:
            self.unsettled()
            there = {server.address for server in self._fleet}
            self.breakers = {way: breaker for way, breaker in self.breakers.items() if way[1] in there}
            breakers = [*self.breakers.values(), *(server.breaker for server in self._fleet)]
            self._settled_until = min((breaker.turns_at(wall) for breaker in breakers), default=math.inf)
        for name in self._touched:
            self._write(name, now)
        self._touched.clear()
        return self._view

    def route(self, prefill: str, region: str) -> bool:
        """Whether the prefill cluster can serve the region at all."""
        return self._routes is None or (prefill, region) in self._routes

    def open_servers(self, cluster: str, region: str) -> list[Server]:
        """Prefill servers of a cluster that decode servers of the region may be sent to now, least work first; none without a route."""
        if cluster != region and not self.route(cluster, region):
            return []
        now = time.monotonic()
        servers = [s for s in self._fleet.of(cluster, "prefill") if s.takes(now) and self._way(region, s, now)]
        return sorted(servers, key=lambda s: (self._free_at(s), s.queue)) if len(servers) > 1 else servers

    def decode_server(self, region: str, full: Container[str] = ()) -> Server | None:
        """The decode server of the region that has most room, none of those in `full`."""
        now = time.monotonic()
        servers = [s for s in self._fleet.of(region, "decode") if s.takes(now) and s.address not in full]
        return min(servers, key=lambda s: s.queue / max(1, s.status.engine.decode_slots), default=None)

    def with_room(self, view: ClusterView, full: Container[str]) -> ClusterView:
        """`view` without the regions whose decode servers that take requests are all in `full`; columns are shared, not health."""
        near = view.decode
        room = np.array([self.decode_server(name, full) is not None for name in near.names], bool)
        return ClusterView(view.prefill, Servers(near.names, near.healthy & room, near.queue, near.load), view.links)

    def work_s(self, cluster: str, tokens: int) -> float:
        """Prefill seconds of a prompt on an instance of the cluster; 0 where it has no profile."""
        profile = self._profiles.get(cluster)
        return 0.0 if profile is None else prefill_s(profile.prefill, tokens)

    # --- rows ------------------------------------------------------------------------------------------------------------------

    def _write(self, name: str, now: float) -> None:
        if name in self.far_row:
            row, wall = self.far_row[name], time.monotonic()
            servers = [s for s in self._fleet.of(name, "prefill") if s.takes(wall)]
            ways = [c.name for c in self._near if self.route(name, c.name) and any(self._way(c.name, s, wall) for s in servers)]
            self._write_row(self._view.prefill, row, servers if ways else [], now)
            self._view.prefill.healthy[row] = bool(ways)
            for region, column in self.near_row.items():
                self._write_link(name, region, (row, column), region in ways)
            return
        row, wall = self.near_row[name], time.monotonic()
        decode = [s for s in self._fleet.of(name, "decode") if s.takes(wall)]
        prefill = [s for s in self._fleet.of(name, "prefill") if s.takes(wall) and self._way(name, s, wall)]
        # Without a prefill server beside them, decode servers prefill themselves.
        self._write_row(self._view.decode, row, prefill or decode, now)
        load = self._view.decode.load
        assert load is not None  # _servers
        self._view.decode.healthy[row] = bool(decode)
        self._view.decode.queue[row] = sum(s.queue for s in decode)
        load.slots[row] = sum(s.status.engine.decode_slots for s in decode)
        load.waiting[row] = sum(s.status.engine.decode_waiting for s in decode)
        for far, i in self.far_row.items():  # their rates are measured by this region's decode servers
            self._write_link(far, name, (i, row), bool(self._links.transfer_bytes_per_s[i, row]))

    def _write_row(self, servers: Servers, row: int, of: Sequence[Server], now: float) -> None:
        """Queue and prefill load of one row."""
        load = servers.load
        assert load is not None  # _servers
        instances = [x for server in of for x in self._instances(server)]
        best = min(instances, key=lambda x: x.free_at_s, default=None)
        servers.queue[row] = sum(s.queue for s in of)
        load.instances[row] = len(instances)
        load.free_at_s[row] = max(now, best.free_at_s) if best else now
        load.drained_at_s[row] = now + sum(max(0.0, x.free_at_s - now) for x in instances) / max(1, len(instances))
        load.jobs[row], load.fresh[row] = (best.jobs, best.fresh) if best else (0, 0)

    def _instances(self, server: Server) -> list[_Instance]:
        """A server's prefill instances: as reported, and with what was sent there that the report does not count yet."""
        base = server.heard_s * self._scale.time
        found = [_Instance(base + x.free_in_s * self._scale.time, x.jobs, x.fresh) for x in server.status.engine.instances]
        if not found:
            return []
        for seconds in server.sent.values():
            # To the one with least work, as the server itself will do it.
            least = min(found, key=lambda x: (x.free_at_s, x.jobs))
            least.free_at_s = max(base, least.free_at_s) + seconds
            least.jobs += 1
            least.fresh += 1
        return found

    def _free_at(self, server: Server) -> float:
        return min((x.free_at_s for x in self._instances(server)), default=math.inf)

    def _way(self, region: str, server: Server, now: float) -> bool:
        breaker = self.breakers.get((region, server.address))
        return breaker is None or breaker.allows(now)

    def _write_link(self, far: str, region: str, pair: tuple[int, int], open_: bool) -> None:
        """Measured where it was lately, else as the deployment has it; 0 where there is no way."""
        known = self._routes.get((far, region)) if self._routes is not None else None
        seen, wall = self._seen(far, region), time.monotonic()
        measured = [
            link
            for decode in self._fleet.of(region, "decode")
            if decode.status is not None
            for link in decode.status.links
            if link.prefill_address in seen and link.bytes_per_s > 0 and 0 <= link.age_s < _MEMORY_S - (wall - decode.heard_s)
        ]
        speed = self._scale.bytes * self._scale.time
        rate = max((link.bytes_per_s for link in measured), default=0.0) / speed or (known.bytes_per_s if known else 0.0)
        per_transfer = min(rate, known.window_bytes_per_s) if known else rate
        rtt = min((link.rtt_s for link in measured if link.rtt_s), default=0.0) * self._scale.time or (known.rtt_s if known else 0.0)
        links = self._links
        links.pending[pair], links.pending_bytes[pair] = self._pending(far, region, seen)
        links.bytes_per_s[pair], links.transfer_bytes_per_s[pair], links.rtt_s[pair] = (
            (rate, per_transfer, rtt) if open_ and self.route(far, region) else (0.0, 0.0, 0.0)
        )

    def _pending(self, far: str, region: str, seen: Container[str]) -> tuple[int, float]:
        """Requests and bytes of the model that are to come over a link: as reported, and what was sent that no report counts yet."""
        count, nbytes, wall = 0, 0.0, time.monotonic()
        for decode in self._fleet.of(region, "decode"):
            fresh = decode.status is not None and wall - decode.heard_s < _MEMORY_S
            reported = [link for link in decode.status.links if link.prefill_address in seen] if fresh else []
            sent = [more for cluster, more in decode.coming.values() if cluster == far]
            count += sum(link.pending for link in reported) + len(sent)
            nbytes += sum(link.pending_bytes for link in reported) / self._scale.bytes + sum(sent)
        return count, nbytes

    def _seen(self, far: str, region: str) -> set[str]:
        """Addresses at which the region's decode servers reach the cluster's prefill servers."""
        cluster = self._fleet.clusters[far]
        return {cluster.seen_from(region, s.address) for s in self._fleet.of(far, "prefill")}


def _servers(clusters: Sequence[ClusterServers]) -> Servers:
    count = len(clusters)
    return Servers(tuple(c.name for c in clusters), np.zeros(count, bool), np.zeros(count, np.int64), Load.idle(count))

"""The clusters of a study and the links between them: what planner, simulator and policies are told."""

import dataclasses
import math

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.profiles import Instance

GBPS = 1e9 / 8


@dataclasses.dataclass(frozen=True)
class PrefillCluster:
    """A PrfaaS cluster: `instances` (N_prfaas) of one kind that only prefill."""

    name: str
    instance: Instance
    instances: int


@dataclasses.dataclass(frozen=True)
class Region:
    """A PD cluster: `prefill` (N_p) and `decode` (N_d) instances of one kind, whose roles can be exchanged.

    `local_bytes_per_s` is the network between its prefill and its decode instances.
    """

    name: str
    instance: Instance
    prefill: int
    decode: int
    local_bytes_per_s: float = 800 * GBPS

    @property
    def instances(self) -> int:
        """Instances of both roles."""
        return self.prefill + self.decode


@dataclasses.dataclass(frozen=True)
class Link:
    """The network from a prefill cluster to a region.

    Attributes:
        prefill: name of the PrefillCluster.
        decode: name of the Region.
        bytes_per_s: capacity.
        rtt_s: round trip time.
        window_bytes: most bytes that one transfer has in flight, so that it gets at most `window_bytes / rtt_s`.
    """

    prefill: str
    decode: str
    bytes_per_s: float
    rtt_s: float = 0.0
    window_bytes: float = math.inf

    @property
    def window_bytes_per_s(self) -> float:
        """What one transfer gets at most, whatever the link has: a window per round trip; infinite where neither is given."""
        return self.window_bytes / self.rtt_s if self.rtt_s else math.inf

    @property
    def transfer_bytes_per_s(self) -> float:
        """The most that one transfer gets."""
        return min(self.bytes_per_s, self.window_bytes_per_s)


@dataclasses.dataclass(frozen=True)
class Topology:
    """All of it. Every prefill cluster may have a link to every region; where there is none it cannot serve that region.

    Raises:
        InvalidInput: a count, capacity or time that makes no system, names that are not unique, a link between unknown clusters, or no
            instance that decodes or that prefills.
    """

    kv: KvFootprint
    prefill: tuple[PrefillCluster, ...]
    regions: tuple[Region, ...]
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        names = [c.name for c in self.clusters]
        if len(set(names)) != len(names):
            raise InvalidInput("topology names", names, "unique names")
        for cluster in self.prefill:
            _at_least(f"{cluster.name}.instances", cluster.instances, 1)
        for region in self.regions:
            _at_least(f"{region.name}.prefill", region.prefill, 0)
            _at_least(f"{region.name}.decode", region.decode, 1)
            _positive(f"{region.name}.local_bytes_per_s", region.local_bytes_per_s)
            if region.instance.decode is None:
                raise InvalidInput(f"{region.name}.instance.decode", None, "decode times: a region decodes")
        if not self.regions:
            raise InvalidInput("topology.regions", self.regions, "at least one region, where requests are decoded")
        clusters, regions = {c.name for c in self.prefill}, {r.name for r in self.regions}
        for link in self.links:
            where = f"link {link.prefill}->{link.decode}"
            if link.prefill not in clusters or link.decode not in regions:
                known = f"from one of {sorted(clusters)} to one of {sorted(regions)}"
                raise InvalidInput("topology.links", (link.prefill, link.decode), known)
            if not 0 < link.bytes_per_s < math.inf:
                raise InvalidInput(f"{where}.bytes_per_s", link.bytes_per_s, "a finite number above zero")
            _positive(f"{where}.window_bytes", link.window_bytes)
            if not 0 <= link.rtt_s < math.inf:
                raise InvalidInput(f"{where}.rtt_s", link.rtt_s, "finite seconds >= 0")
        pairs = [(link.prefill, link.decode) for link in self.links]
        if len(set(pairs)) != len(pairs):
            raise InvalidInput("topology.links", pairs, "at most one link between two clusters")
        for region in self.regions:
            if not region.prefill and not any(link.decode == region.name for link in self.links):
                raise InvalidInput(f"{region.name}.prefill", 0, "at least 1 where no prefill cluster has a link to the region")

    @property
    def clusters(self) -> "tuple[PrefillCluster | Region, ...]":
        """Prefill clusters, then regions."""
        return (*self.prefill, *self.regions)

    def link(self, prefill: str, decode: str) -> Link | None:
        """The link between two clusters, None where there is none."""
        return next((x for x in self.links if (x.prefill, x.decode) == (prefill, decode)), None)

    @property
    def cost_per_hour(self) -> float:
        """Of all instances; links are not priced."""
        return sum(c.instances * c.instance.cost_per_hour for c in self.clusters)


def _at_least(field: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise InvalidInput(field, value, f"a whole number >= {least}")


def _positive(field: str, value: float) -> None:
    if not value > 0:
        raise InvalidInput(field, value, "a number above zero")

"""Shadow prices for placement: what prefill seconds and link bytes are worth, from the throughput program."""

import dataclasses
from collections.abc import Mapping

from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import Optimum, optimum
from prfaas_jax.scheduling.predictive import Prices
from prfaas_jax.scheduling.topology import GBPS, Topology

# Decode instances that never bind. Where decode binds, every path of a region is worth the same, and no prefill would have a price.
_AMPLE = 10**6


def placement_prices(topology: Topology, mix: Mix, bytes_per_s: Mapping[tuple[str, str], float] | None = None, bins: int = 32) -> Prices:
    """Prices at the most that prefill and links sustain of the mix, decode aside.

    Args:
        topology: clusters with the roles that they have now.
        mix: of the requests to come.
        bytes_per_s: (prefill cluster, region) -> what the link moves now, where that is not what the topology says; 0 for a link that is
            down. Such a link has no price: nobody can take it.
        bins: resolution of the program.
    """
    found = optimum(_placement_only(topology, bytes_per_s or {}), mix, bins)
    prefill: dict[str, float] = {}
    links: dict[tuple[str, str], float] = {}
    for resource in found.resources:
        if resource.kind in ("prfaas_compute", "local_prefill"):
            prefill[resource.name] = resource.price
        elif resource.kind == "egress" and "->" in resource.name:
            cluster, _, region = resource.name.partition("->")
            links[cluster, region] = resource.price / GBPS
    return Prices(prefill, links)


def placement_optimum(topology: Topology, mix: Mix, bytes_per_s: Mapping[tuple[str, str], float] | None = None, bins: int = 32) -> Optimum:
    """The optimum with decode that never binds; arguments as of `placement_prices`."""
    return optimum(_placement_only(topology, bytes_per_s or {}), mix, bins)


def _placement_only(topology: Topology, bytes_per_s: Mapping[tuple[str, str], float]) -> Topology:
    rates = {(x.prefill, x.decode): bytes_per_s.get((x.prefill, x.decode), x.bytes_per_s) for x in topology.links}
    links = tuple(dataclasses.replace(x, bytes_per_s=rates[x.prefill, x.decode]) for x in topology.links if rates[x.prefill, x.decode] > 0)
    reached = {x.decode for x in links}
    regions = tuple(dataclasses.replace(r, decode=_AMPLE) for r in topology.regions if r.prefill or r.name in reached)
    return dataclasses.replace(topology, regions=regions, links=links)

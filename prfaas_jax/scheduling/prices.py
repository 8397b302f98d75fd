"""Shadow prices for placement: what prefill seconds and link bytes are worth, from the throughput program."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64

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
            down, as is one of less than a byte/s. Such a link has no price: nobody can take it.
        bins: resolution of the program.
    """
    found = placement_optimum(topology, mix, bytes_per_s, bins)
    if found is None:
        return Prices({}, {})
    prefill: dict[str, float] = {}
    links: dict[tuple[str, str], float] = {}
    for resource in found.resources:
        if resource.kind in ("prfaas_compute", "local_prefill"):
            prefill[resource.name] = resource.price
        elif resource.kind == "egress" and "->" in resource.name:
            cluster, _, region = resource.name.partition("->")
            links[cluster, region] = resource.price / GBPS
    return Prices(prefill, links)


def placement_optimum(
    topology: Topology, mix: Mix, bytes_per_s: Mapping[tuple[str, str], float] | None = None, bins: int = 32
) -> Optimum | None:
    """The optimum with decode that never binds, None where nothing can prefill for any region; arguments as of `placement_prices`."""
    rates = {(x.prefill, x.decode): (bytes_per_s or {}).get((x.prefill, x.decode), x.bytes_per_s) for x in topology.links}
    # A mean over a long outage falls without end; the program fails at numbers out of all range.
    links = tuple(dataclasses.replace(x, bytes_per_s=rates[x.prefill, x.decode]) for x in topology.links if rates[x.prefill, x.decode] >= 1)
    reached = {x.decode for x in links}
    regions = tuple(dataclasses.replace(r, decode=_AMPLE) for r in topology.regions if r.prefill or r.name in reached)
    if not regions:
        return None
    now = dataclasses.replace(topology, regions=regions, links=links)
    return optimum(now, after_copies(now, mix), bins)


def after_copies(topology: Topology, mix: Mix) -> Mix:
    """The mix with the prefixes that each side has once the other has sent it, on the fastest link, what takes longer to compute.

    That is what policies which predict count on; without links nothing is sent.
    """
    link = max(topology.links, key=lambda x: x.transfer_bytes_per_s, default=None)
    if link is None:
        return mix
    deepest = np.maximum(mix.cached_pd, mix.cached_prfaas)

    def held(name: str, own: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        time = next(c.instance.prefill for c in topology.clusters if c.name == name)
        copy_s = topology.kv.bytes_of(deepest, own) / link.transfer_bytes_per_s + link.rtt_s / 2
        return np.where(time.growth_of(deepest) - time.growth_of(own) > copy_s, deepest, own)

    return Mix.of(mix.tokens, mix.output, mix.weight, held(link.decode, mix.cached_pd), held(link.prefill, mix.cached_prfaas))

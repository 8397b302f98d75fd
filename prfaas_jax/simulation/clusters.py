"""What a topology describes, built for a run: the view, the network, the prefix caches."""

from collections.abc import Callable, Sequence

import numpy as np

from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import ClusterView, Links, Load, Servers
from prfaas_jax.simulation.kernel import Kernel
from prfaas_jax.simulation.links import Network, Pair, Transfer
from prfaas_jax.simulation.prefix_cache import PrefixCache
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.workloads import Sessions, Workload

# By rows of the view: prefill cluster, region; None where there is no link.
PairTable = list[list[Pair | None]]


def idle_view(topology: Topology) -> tuple[ClusterView, Links]:
    """The view that a run writes into, and its links; everything idle and healthy."""

    def servers(names: Sequence[str]) -> Servers:
        return Servers(tuple(names), np.ones(len(names), bool), np.zeros(len(names), np.int64), Load.idle(len(names)))

    prefill, decode = servers([c.name for c in topology.prefill]), servers([r.name for r in topology.regions])
    shape = len(prefill.names), len(decode.names)
    links = Links.none(*shape)
    for link in topology.links:
        pair = prefill.names.index(link.prefill), decode.names.index(link.decode)
        links.bytes_per_s[pair], links.transfer_bytes_per_s[pair] = link.bytes_per_s, link.transfer_bytes_per_s
        links.rtt_s[pair] = link.rtt_s
    return ClusterView(prefill, decode, links), links


def pair_tables(
    kernel: Kernel, topology: Topology, ordered: bool, delivered: Callable[[Transfer], None], copied: Callable[[Transfer], None]
) -> tuple[PairTable, PairTable]:
    """Pairs towards the regions, which carry KV, and back, which carry copied prefixes only. Hosts send and receive at once.

    What the hosts of a region can take is that of its decode instances, to which the KV goes, as the topology has them.
    """
    hosts = {c.name: c.instances * c.instance.nic_bytes_per_s for c in topology.prefill}
    hosts |= {r.name: r.decode * r.instance.nic_bytes_per_s for r in topology.regions}
    network = Network(kernel, {f"{way} {name}": cap for name, cap in hosts.items() for way in ("out", "in")}, ordered)
    clusters, regions = [c.name for c in topology.prefill], [r.name for r in topology.regions]

    def table(over: Callable[[Transfer], None], forward: bool) -> PairTable:
        pairs: PairTable = [[None] * len(regions) for _ in clusters]
        for x in topology.links:
            source, target = (x.prefill, x.decode) if forward else (x.decode, x.prefill)
            pair = network.add(x.bytes_per_s, over, x.window_bytes_per_s, x.rtt_s / 2, f"out {source}", f"in {target}")
            pairs[clusters.index(x.prefill)][regions.index(x.decode)] = pair
        return pairs

    return table(delivered, True), table(copied, False)


def prefix_caches(topology: Topology, options: SimOptions, workload: Workload, seed: int) -> tuple[list[PrefixCache], list[PrefixCache]]:
    """One per prefill cluster and one per region; none where they have no room, or the workload has no blocks.

    All begin with what the workload says is `held`, whatever the policy: nobody is to blame for what happened before the run.
    """

    def caches(count: int, size: float) -> list[PrefixCache]:
        wanted = count if size and workload.block_tokens else 0
        return [PrefixCache(topology.kv, workload.block_tokens, size, options.checkpoint_blocks) for _ in range(wanted)]

    far, near = caches(len(topology.prefill), options.prefill_cache_bytes), caches(len(topology.regions), options.decode_cache_bytes)
    if isinstance(workload, Sessions) and workload.lead_s and (far or near):
        for prompt in workload.held(seed):
            for cache in (*far, *near):
                cache.insert(prompt.blocks, prompt.tokens, prompt.tokens)
    return far, near

"""What a request would take if it were alone: the yardstick of its SLO."""

import math

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.profiles import PrefillTime
from prfaas_jax.scheduling.topology import Topology


def tail_bytes(kv: KvFootprint, tokens: int, held: int, chunk: int, overlap: bool) -> float:
    """What cannot leave before the prefill ends: the last chunk's tokens, windows, states; everything without overlap."""
    if overlap:
        held = max(held, (tokens - 1) // chunk * chunk)
    return kv.bytes(tokens, held)


class Unloaded:
    """TTFT on the best path of an idle system, with nothing cached and links as the topology has them, for any prompt."""

    def __init__(self, topology: Topology, chunk: int, overlap: bool):
        self._kv, self._chunk, self._overlap = topology.kv, chunk, overlap
        self._local = [(r.instance.prefill, r.local_bytes_per_s) for r in topology.regions if r.prefill]
        clusters, regions = {c.name: c for c in topology.prefill}, {r.name: r for r in topology.regions}
        self._remote: list[tuple[PrefillTime, float, float]] = []
        for link in topology.links:
            cluster, region = clusters[link.prefill], regions[link.decode]
            hosts = min(cluster.instances * cluster.instance.nic_bytes_per_s, region.decode * region.instance.nic_bytes_per_s)
            self._remote.append((cluster.instance.prefill, min(link.transfer_bytes_per_s, hosts), link.rtt_s / 2))

    def ttft(self, tokens: int) -> float:
        """Seconds from arrival to the first token; raises InvalidInput for a prompt beyond every profile."""
        kv, chunk, best = self._kv, self._chunk, math.inf
        full = (tokens - 1) // chunk * chunk if self._overlap else 0  # tokens that leave while the last chunk is computed
        tail = kv.bytes(tokens, full)
        for time, rate in self._local:
            if tokens <= time.max_tokens:
                best = min(best, time.start_s + time.growth(tokens) + tail / rate)
        for time, rate, delay_s in self._remote:
            if tokens <= time.max_tokens:
                sent = time.growth(tokens) + tail / rate
                if full:
                    # A slow link is busy from the first chunk on; or from the last whole one, where the rest is short.
                    first = time.growth(chunk) + kv.bytes(tokens) / rate
                    sent = max(sent, first, time.growth(full) + kv.bytes(tokens, full - chunk) / rate)
                best = min(best, time.start_s + sent + delay_s)
        if best == math.inf:
            raise InvalidInput("prompt", tokens, "a length that some prefill profile covers")
        return best

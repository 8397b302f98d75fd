"""How many instances a rate takes: the cheapest numbers of them that sustain it, any placement and any roles allowed."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import BINS, Optimum, optimum
from prfaas_jax.scheduling.planner import best_roles, role_choices
from prfaas_jax.scheduling.throughput import decode_batch, decode_step_s
from prfaas_jax.scheduling.topology import Topology

# Most combinations of numbers that are searched: some seconds.
MAX_SIZES = 256


def with_counts(topology: Topology, counts: Mapping[str, int]) -> Topology:
    """The topology with other numbers of instances per cluster name; a prefill cluster of none goes, with its links.

    A region's instances decode until roles are chosen, but for one where nothing else would prefill for it. InvalidInput where that is its
    only one.
    """
    prefill = tuple(dataclasses.replace(c, instances=n) for c in topology.prefill if (n := counts.get(c.name, c.instances)))
    names = {c.name for c in prefill}
    links = tuple(link for link in topology.links if link.prefill in names)
    linked = {link.decode for link in links}
    sizes = ((r, counts.get(r.name, r.instances), 0 if r.name in linked else 1) for r in topology.regions)
    regions = tuple(dataclasses.replace(r, prefill=n_p, decode=n - n_p) for r, n, n_p in sizes)
    return dataclasses.replace(topology, prefill=prefill, regions=regions, links=links)


def cheapest(topology: Topology, mix: Mix, requests_per_s: float, most: Mapping[str, int]) -> tuple[Topology, Optimum] | None:
    """The cheapest numbers of instances, up to `most` per cluster, that sustain `requests_per_s`; None where even all of them do not.

    Prefill clusters may go altogether. Of systems that cost the same it is the one with fewer prefill instances; roles are the best for it.

    Raises:
        InvalidInput: a rate or a number that is not above zero, a cluster without one, more than `MAX_SIZES` combinations, prompts beyond
            a profile.
    """
    names = [c.name for c in topology.clusters]
    if set(most) != set(names) or min(most.values()) < 1:
        raise InvalidInput("most", most, f"a number of instances >= 1 for each of {names}")
    if not requests_per_s > 0:
        raise InvalidInput("requests_per_s", requests_per_s, "a rate above zero")
    ranges = [range(0 if n in {c.name for c in topology.prefill} else 1, most[n] + 1) for n in names]
    if (count := math.prod(map(len, ranges))) > MAX_SIZES:
        raise InvalidInput("most", most, f"at most {MAX_SIZES} combinations, not {count}")
    rows = mix.binned(BINS)
    if best_roles(with_counts(topology, most), rows)[1].lambda_max < requests_per_s:
        return None
    costs = [c.instance.cost_per_hour for c in topology.clusters]
    for counts in sorted(itertools.product(*ranges), key=lambda counts: sum(map(operator.mul, counts, costs))):
        try:
            candidate = with_counts(topology, dict(zip(names, counts, strict=True)))
        except InvalidInput:
            continue  # one instance cannot prefill and decode
        if any(_sustains(roles, rows, requests_per_s) for roles in role_choices(candidate)):
            return best_roles(candidate, rows)
    return None


def _sustains(topology: Topology, mix: Mix, requests_per_s: float) -> bool:
    """Whether it does, without the program where too few decode."""
    decoded = 0.0
    for region in topology.regions:
        batch = decode_batch(region.instance, topology.kv, mix)
        decoded += region.decode * batch / (decode_step_s(region.instance, batch, mix) * mix.mean(mix.output))
    # Where memory binds, regions may share long and short contexts better than on average: only slots are certain.
    certain = all(r.instance.kv_memory_bytes == math.inf for r in topology.regions)
    return not (certain and decoded < requests_per_s) and optimum(topology, mix).lambda_max >= requests_per_s

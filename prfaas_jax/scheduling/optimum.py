"""The most that any placement rule could sustain on a topology: a linear program over (kind of request, path), with shadow prices.

A path is a region's own prefill instances, or a prefill cluster and its link. The program gives each path a rate of each kind of request
so that no instance, link, decode slot or byte of decode memory is used more than it is there, and the total, in the proportions of the
mix, is largest. A decode step takes what it takes at the batch that the whole mix allows. Every static rule (threshold, length-blind, ..)
is one of its feasible points, so it bounds them all, in the exact reading of the throughput model. The duals say what one more unit of
each resource would buy: the planner's advice, and prices for policies. Several clusters, regions and links are nothing special here.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from prfaas_jax.errors import PrfaasError
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.profiles import prefill_s_of
from prfaas_jax.scheduling.throughput import check_longest, decode_batch, decode_step_s
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology

BINS = 64


@dataclasses.dataclass(frozen=True)
class Resource:
    """One thing that there is only so much of, as the optimum uses it.

    Attributes:
        kind: "prfaas_compute", "egress", "local_prefill", "decode" or "decode_memory".
        name: the cluster, region or link.
        unit: of one more: "instance" or "Gbps".
        capacity: in units.
        used: share of it that the optimum uses.
        price: requests/s that one more unit would buy.
    """

    kind: str
    name: str
    unit: str
    capacity: float
    used: float
    price: float


@dataclasses.dataclass(frozen=True, eq=False)
class Optimum:
    """`lambda_max` in requests/s; `rates[i, k]` of it are of `mix` row i on path k, a (prefill cluster or None for local, region)."""

    lambda_max: float
    mix: Mix
    paths: tuple[tuple[str | None, str], ...]
    rates: Float64[np.ndarray, "rows paths"]
    resources: tuple[Resource, ...]

    @property
    def bottleneck(self) -> Resource:
        """What binds most: of the resources in use whole, the one whose extension by a percent buys most."""
        return max(self.resources, key=lambda r: (r.price * r.capacity, r.used))

    @property
    def egress(self) -> float:
        """Bytes/s that leave all prefill clusters."""
        return sum(r.used * r.capacity * GBPS for r in self.resources if r.kind == "egress" and "->" in r.name)

    def offloaded(self) -> Float64[np.ndarray, " rows"]:
        """Share of each mix row that is prefilled remotely."""
        remote = np.array([cluster is not None for cluster, _ in self.paths])
        total = self.rates.sum(1)
        return np.divide(self.rates[:, remote].sum(1), total, out=np.zeros_like(total), where=total > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Constraint:
    """`use[i, k]` units of capacity per request/s of row i on path k."""

    kind: str
    name: str
    unit: str
    capacity: float
    unit_size: float
    use: Float64[np.ndarray, "rows paths"]


class Infeasible(PrfaasError):
    """The solver found no optimum; a defect or numbers out of all range, since all-zero rates are always feasible."""


def optimum(topology: Topology, mix: Mix, bins: int = BINS) -> Optimum:
    """Solves the program on at most `bins` rows of the mix (exact for what is linear inside a bin; 64 bins err by less than 0.1 %).

    Raises:
        InvalidInput: prompts longer than the profile of an instance that would have to prefill them.
        Infeasible: the solver failed.
    """
    from scipy.optimize import linprog  # here: it takes half a second, which not every user of the package owes

    check_lengths(topology, mix)
    rows = mix.binned(bins)
    paths = _paths(topology)
    constraints = _constraints(topology, rows, paths)
    n, k = len(rows.tokens), len(paths)
    # Variables: rates[n, k], then the total rate.
    a_ub = np.array([[*c.use.ravel() / c.capacity, 0.0] for c in constraints])
    a_eq = np.hstack([np.kron(np.eye(n), np.ones(k)), -rows.weight[:, None]])
    objective = np.zeros(n * k + 1)
    objective[-1] = -1.0
    solved = linprog(objective, a_ub, np.ones(len(constraints)), a_eq, np.zeros(n), method="highs")
    if solved.status != 0:
        raise Infeasible(f"throughput program: {solved.message}")
    duals = -solved.ineqlin.marginals  # requests/s per whole extra capacity
    resources = tuple(
        Resource(c.kind, c.name, c.unit, c.capacity / c.unit_size, float(1 - slack), float(max(dual, 0.0) * c.unit_size / c.capacity))
        for c, slack, dual in zip(constraints, solved.ineqlin.residual, duals, strict=True)
    )
    names = tuple((c.name if c else None, r.name) for c, r, _ in paths)
    return Optimum(float(solved.x[-1]), rows, names, solved.x[:-1].reshape(n, k), resources)


def check_lengths(topology: Topology, mix: Mix) -> None:
    """Raises InvalidInput when the mix has prompts beyond the range of a profile in the topology."""
    longest = float(mix.tokens.max())
    for cluster in topology.clusters:
        if isinstance(cluster, PrefillCluster) or cluster.prefill > 0:
            check_longest(cluster.instance, longest)


def _paths(topology: Topology) -> list[tuple[PrefillCluster | None, Region, Link | None]]:
    local = [(None, region, None) for region in topology.regions if region.prefill]
    remote = [(c, r, link) for c in topology.prefill for r in topology.regions if (link := topology.link(c.name, r.name))]
    return [*local, *remote]


def _constraints(topology: Topology, rows: Mix, paths: Sequence[tuple[PrefillCluster | None, Region, Link | None]]) -> list[_Constraint]:
    found: list[_Constraint] = []
    shipped = topology.kv.bytes_of(rows.tokens, rows.cached_pd)

    def add(kind: str, name: str, unit: str, capacity: float, unit_size: float, use: Float64[np.ndarray, " n"], on: list[bool]) -> None:
        if np.isfinite(capacity):
            found.append(_Constraint(kind, name, unit, capacity, unit_size, use[:, None] * np.array(on, np.float64)))

    for cluster in topology.prefill:
        here = [c is cluster for c, _, _ in paths]
        seconds = prefill_s_of(cluster.instance.prefill, rows.tokens - rows.cached_prfaas, rows.cached_prfaas)
        add("prfaas_compute", cluster.name, "instance", cluster.instances, 1.0, seconds, here)
        nic = cluster.instance.nic_bytes_per_s
        add("egress", cluster.name, "instance", cluster.instances * nic, nic, shipped, here)
    for link in topology.links:
        add("egress", f"{link.prefill}->{link.decode}", "Gbps", link.bytes_per_s, GBPS, shipped, [x is link for _, _, x in paths])
    for region in topology.regions:
        ours = [r is region for _, r, _ in paths]
        if region.prefill:
            seconds = prefill_s_of(region.instance.prefill, rows.uncached, rows.cached_pd)
            add("local_prefill", region.name, "instance", region.prefill, 1.0, seconds, [c is None and r is region for c, r, _ in paths])
        stay_s = rows.output * decode_step_s(region.instance, decode_batch(region.instance, topology.kv, rows), rows)
        batch, memory = region.instance.max_batch, region.instance.kv_memory_bytes
        add("decode", region.name, "instance", region.decode * batch, batch, stay_s, ours)
        # Beside the slots: a region that is given the long contexts runs out of memory first, one that is given the short ones of slots.
        held = topology.kv.bytes_of(rows.tokens + rows.output)
        add("decode_memory", region.name, "instance", region.decode * memory, memory, held * stay_s, ours)
        nic = region.instance.nic_bytes_per_s
        remote = [c is not None and r is region for c, r, _ in paths]
        add("egress", f"{region.name} ingress", "instance", region.decode * nic, nic, shipped, remote)
    return found

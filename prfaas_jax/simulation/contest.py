"""The contest of policies: cells of (link, workload), every baseline tuned for its cell on other seeds, the same hardware for all.

Rules. SLO: TTFT <= slo_scale * unloaded T(l) + slo_base_s and TPOT <= slo_tpot_s. Load: a share of what the planner's best roles sustain in
the cell (averaged over the link's states where it has several), and those roles for everybody. Goodput: requests within the SLO, over the
time until the last first token (`Summary.result` says why). A baseline's parameter is the best of its grid by goodput, on tuning seeds; the
best static baseline is the one with most goodput there. Ours has no parameter to tune per cell; its constants were chosen on the cells that
are not held out.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import Optimum, optimum
from prfaas_jax.scheduling.planner import best_roles, role_choices
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.simulation.contenders import CONTENDERS, Ground
from prfaas_jax.simulation.runs import Estimate, Run, sweep
from prfaas_jax.simulation.scenario import LinkPlan, SimOptions
from prfaas_jax.simulation.workloads import Workload

OURS = "shadow_price"
PAPER = ("threshold", "paper_prefix")

# Tuning never sees the seeds of the evaluation.
TUNING_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        name: "link/workload".
        hard: at most 12 Gbps, bursts or sessions: where a policy can make a difference.
        held_out: never looked at while our constants were chosen.
        topology: with any roles; `plan_cell` chooses them.
        mix: of the workload, for planner and grids.
        rate: of the workload in requests/s, before it is scaled to the load.
        workload: arrivals at `rate`.
        links: how links change.
        states: the bytes/s of the first link and the share of time that it has them, for the planner.
    """

    name: str
    hard: bool
    held_out: bool
    topology: Topology
    mix: Mix
    rate: float
    workload: Workload
    links: Mapping[tuple[str, str], LinkPlan]
    states: tuple[tuple[float, float], ...]


def plan_cell(cell: Cell) -> tuple[Topology, float]:
    """The roles that sustain most of the cell's mix, on average over the link's states, and that rate in requests/s."""

    def rate(roles: Topology) -> float:
        total = 0.0
        for bytes_per_s, share in cell.states:
            links = tuple(dataclasses.replace(x, bytes_per_s=bytes_per_s) for x in roles.links) if bytes_per_s else ()
            if links or roles.regions[0].prefill:  # else nothing prefills
                total += share * optimum(dataclasses.replace(roles, links=links), cell.mix).lambda_max
        return total

    rates = [(roles, rate(roles)) for roles in role_choices(cell.topology)]
    return max(rates, key=lambda pair: pair[1])


def equal_cost(topology: Topology, mix: Mix) -> Topology:
    """A homogeneous region for the money of the whole topology (rounded down), in the roles that sustain most of the mix."""
    (region,) = topology.regions
    count = max(2, int(topology.cost_per_hour / region.instance.cost_per_hour + 1e-9))
    alone = dataclasses.replace(region, prefill=1, decode=count - 1)
    return best_roles(dataclasses.replace(topology, prefill=(), regions=(alone,), links=()), mix)[0]


# Around the planner's own answer, as factors.
AROUND = (0.6, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)


def parameters(name: str, planned: Optimum, mix: Mix, points: int) -> list[float]:
    """The grid over which a baseline is tuned: around what the planner offloads, and `points` quantiles of the uncached lengths or shares.

    The controlled threshold starts from the planner's; it finds its own.
    """
    kind = CONTENDERS[name][0]
    if not kind:
        return [0.0]
    offloaded = planned.offloaded()
    if kind == "share":
        share = planned.mix.mean(offloaded)
        return sorted({*(min(1.0, share * x) for x in AROUND[1:-1]), *map(float, np.linspace(0.1, 0.9, points))})
    remote = planned.mix.uncached[offloaded >= 0.5]
    t = float(remote.min()) if remote.size else float(mix.uncached.max())
    if name == "paper_controlled":
        return [float(round(t))]
    quantiles = (mix.quantile(mix.uncached, q) for q in np.linspace(0.1, 0.95, points))
    return sorted({float(round(x)) for x in (*(t * factor for factor in AROUND), *quantiles)})


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A cell's outcome; goodputs in requests/s and P90 TTFTs in seconds as means over seeds, ratios per seed and then averaged.

    `best_static` was chosen on tuning seeds; `vs_best` is our goodput over its, `vs_paper` over the paper's rule, `p90_vs_paper` our P90
    TTFT over the paper's. `equal_cost`: a homogeneous cluster for the same money at the same arrivals.
    """

    cell: str
    hard: bool
    held_out: bool
    load_rps: float
    n_p: int
    best_static: str
    vs_best: Estimate
    vs_paper: Estimate
    p90_vs_paper: Estimate
    policies: Mapping[str, Mapping[str, float]]
    equal_cost: Mapping[str, float]

    @property
    def ahead(self) -> bool:
        """At least 10 % more goodput or 25 % lower P90 TTFT than the paper's rule."""
        return self.vs_paper.mean >= 1.10 or self.p90_vs_paper.mean <= 0.75


@dataclasses.dataclass(frozen=True)
class Contest:
    """How thorough: requests per run, seeds of the evaluation, seeds and grid points of the tuning, load, processes."""

    options: SimOptions
    requests: int
    seeds: int = 5
    tuning_seeds: int = 1
    points: int = 8
    load: float = 0.9
    processes: int = 1

    def __post_init__(self) -> None:
        for field in ("requests", "seeds", "tuning_seeds", "points", "processes"):
            if getattr(self, field) < 1:
                raise InvalidInput(f"contest.{field}", getattr(self, field), "at least 1")
        if not 0 < self.load < math.inf:
            raise InvalidInput("contest.load", self.load, "a share of the planner's optimum above zero")

    def judge(self, cells: Sequence[Cell]) -> Iterator[Verdict]:
        """Tunes and evaluates cell by cell."""
        for number, cell in enumerate(cells):
            yield self._judge(cell, f"{number + 1}/{len(cells)} {cell.name}")

    def _judge(self, cell: Cell, label: str) -> Verdict:
        topology, most = plan_cell(cell)
        ground = Ground(topology, cell.mix, self.options)
        workload = cell.workload.scaled(self.load * most / cell.rate)

        def run(name: str, parameter: float, seed: int) -> Run:
            return Run(ground, workload, name, parameter, seed, self.requests, cell.links)

        # Without prefixes the paper's two rules are one.
        baselines = [name for name in CONTENDERS if name != OURS and (name != "paper_prefix" or workload.block_tokens)]
        planned = optimum(topology, cell.mix)
        tuning = [
            run(name, x, TUNING_SEED + s)
            for name in baselines
            for x in parameters(name, planned, cell.mix, self.points)
            for s in range(self.tuning_seeds)
        ]
        tuned: dict[tuple[str, float], float] = {}
        for one, result in zip(tuning, sweep(tuning, self.processes, f"{label}: tuning"), strict=True):
            tuned[one.policy, one.parameter] = tuned.get((one.policy, one.parameter), 0.0) + result["goodput_rps"]
        best = {name: max((x for n, x in tuned if n == name), key=lambda x: tuned[name, x]) for name in baselines}
        static = max(best, key=lambda name: tuned[name, best[name]])

        chosen = {**best, OURS: 0.0}
        runs = [run(name, x, seed) for name, x in chosen.items() for seed in range(self.seeds)]
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for one, result in zip(runs, sweep(runs, self.processes, f"{label}: evaluating"), strict=True):
            results[one.policy].append(result)
        same_money = Ground(equal_cost(topology, cell.mix), cell.mix, self.options)
        alone = [Run(same_money, workload, "always_local", 0.0, seed, self.requests) for seed in range(self.seeds)]
        others = list(sweep(alone, self.processes, f"{label}: equal cost"))
        return self._verdict(cell, topology, self.load * most, static, chosen, results, others)

    def _verdict(
        self,
        cell: Cell,
        topology: Topology,
        rate: float,
        static: str,
        chosen: Mapping[str, float],
        results: Mapping[str, Sequence[Mapping[str, Any]]],
        others: Sequence[Mapping[str, Any]],
    ) -> Verdict:
        paper = max((name for name in PAPER if name in results), key=lambda name: sum(r["goodput_rps"] for r in results[name]))

        def ratio(over: str, field: str) -> Estimate:
            pairs = zip(results[OURS], results[over], strict=True)
            return Estimate.of([mine[field] / max(theirs[field], 1e-9) for mine, theirs in pairs])

        def means(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
            fields = ("goodput_rps", "slo_share", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "offload_share", "egress_gbps")
            return {field: Estimate.of([r[field] for r in found]).mean for field in fields}

        return Verdict(
            cell=cell.name,
            hard=cell.hard,
            held_out=cell.held_out,
            load_rps=rate,
            n_p=topology.regions[0].prefill,
            best_static=static,
            vs_best=ratio(static, "goodput_rps"),
            vs_paper=ratio(paper, "goodput_rps"),
            p90_vs_paper=ratio(paper, "ttft_p90_s"),
            policies={name: {"parameter": chosen[name], **means(found)} for name, found in results.items()},
            equal_cost=means(others),
        )

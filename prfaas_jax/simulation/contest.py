"""The contest of policies: cells of (link, workload), every baseline tuned for its cell on other seeds, the same hardware for all.

Rules. SLO: TTFT <= slo_scale * unloaded T(l) + slo_base_s and TPOT <= slo_tpot_s. Load: a share of what the planner's best roles sustain in
the cell (averaged over the link's states where it has several), and those roles for everybody. Goodput: requests within the SLO, over the
time until the last first token (`Summary.result` says why). Tuning: a baseline's parameter is the best of its grid by goodput; the best
static baseline, the best of the paper's rules, and the baseline and parameter with the highest SLO share are those on the tuning seeds. The
evaluation has other seeds, and of a trace another part. Ours has no parameter to tune per cell; its constants were chosen on the cells that
are not held out, with low seeds, which neither tuning nor evaluation has. Equal cost: a homogeneous cluster, judged with the SLO of ours.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
# Ours, and instances change their roles: evaluated beside the others, neither a baseline nor ours.
ROLES = "shadow_price_roles"
PAPER = ("threshold", "paper_prefix", "paper_controlled")

# Tuning never sees the seeds of the evaluation; our policy's constants were chosen on seeds below both.
TUNING_SEED = 1000
EVALUATION_SEED = 2000


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
        workload: arrivals at `rate`, for the evaluation.
        tuning: arrivals at `rate`, for the tuning: another part of a trace, else `workload` itself.
        tuning_mix: of `tuning`; it is played at the same share of what the roles sustain of this.
        links: how links change.
        states: the bytes/s of the first link and the share of time that it has them, for the planner.
        requests: of each run; the contest's, or fewer where a trace is too short for a window of its own per seed.
    """

    name: str
    hard: bool
    held_out: bool
    topology: Topology
    mix: Mix
    rate: float
    workload: Workload
    tuning: Workload
    tuning_mix: Mix
    links: Mapping[tuple[str, str], LinkPlan]
    states: tuple[tuple[float, float], ...]
    requests: int


def plan_cell(cell: Cell) -> tuple[Topology, float]:
    """The roles that sustain most of the cell's mix, on average over the link's states, and that rate in requests/s."""
    rates = [(roles, sustained(cell, roles, cell.mix)) for roles in role_choices(cell.topology)]
    return max(rates, key=lambda pair: pair[1])


def sustained(cell: Cell, roles: Topology, mix: Mix) -> float:
    """Requests/s of a mix in these roles, by the program, on average over the link's states."""
    total = 0.0
    for bytes_per_s, share in cell.states:
        links = tuple(dataclasses.replace(x, bytes_per_s=bytes_per_s) for x in roles.links) if bytes_per_s else ()
        if links or roles.regions[0].prefill:  # else nothing prefills
            total += share * optimum(dataclasses.replace(roles, links=links), mix).lambda_max
    return total


def equal_cost(topology: Topology, mix: Mix) -> tuple[Topology, float]:
    """A homogeneous region for the money of the whole topology (rounded down), in the roles that sustain most of the mix, and that rate."""
    (region,) = topology.regions
    count = max(2, int(topology.cost_per_hour / region.instance.cost_per_hour + 1e-9))
    alone = dataclasses.replace(region, prefill=1, decode=count - 1)
    found, planned = best_roles(dataclasses.replace(topology, prefill=(), regions=(alone,), links=()), mix)
    return found, planned.lambda_max


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


Contender = tuple[str, float]  # a policy and its parameter
Results = Mapping[Contender, Sequence[Mapping[str, Any]]]  # of a run per seed

FIGURES = (
    *("goodput_rps", "slo_share", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s"),
    *("drain_s", "offload_share", "egress_gbps", "conversions"),
)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning chose: per baseline its parameter, then who has most goodput of all and of the paper's rules, and the highest SLO share.

    `share` may have another parameter than its policy's in `parameters`: that is the best by goodput.
    """

    parameters: Mapping[str, float]
    static: Contender
    paper: Contender
    share: Contender

    @classmethod
    def of(cls, results: Results) -> "Tuned":
        """From the runs on the tuning seeds; of equals the first counts, and of equal SLO shares the one with more goodput."""
        goodput = {one: mean(found, "goodput_rps") for one, found in results.items()}
        best = [max((one for one in results if one[0] == name), key=goodput.__getitem__) for name in dict.fromkeys(n for n, _ in results)]
        return cls(
            parameters=dict(best),
            static=max(best, key=goodput.__getitem__),
            paper=max((one for one in best if one[0] in PAPER), key=goodput.__getitem__),
            share=max(results, key=lambda one: (mean(results[one], "slo_share"), goodput[one])),
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A cell's outcome; goodputs in requests/s and times in seconds as means over seeds, ratios per seed and then averaged.

    Attributes:
        cell: its name.
        hard: see Cell.
        held_out: see Cell.
        load_rps: arrivals per second.
        requests: of each run.
        n_p: prefill instances of the region.
        best_static: the baseline with most goodput on the tuning seeds.
        paper: the paper's rule with most goodput on the tuning seeds.
        best_share: the baseline with the highest SLO share on the tuning seeds, at any parameter.
        vs_best: our goodput over that of `best_static`.
        vs_paper: our goodput over that of `paper`.
        p90_vs_paper: our P90 TTFT over that of `paper`.
        share_vs_best: our SLO share over that of `best_share`.
        roles_vs_ours: goodput of ours with a RoleController over ours.
        policies: figures of everybody, each with its parameter.
        share: figures of `best_share`, with its parameter: what its SLO share costs those whom it lets wait.
        equal_cost: a homogeneous cluster for the same money at the same arrivals, judged with our SLO.
        equal_cost_own: the same at the contest's share of its own planner's optimum, with `load_rps`.
    """

    cell: str
    hard: bool
    held_out: bool
    load_rps: float
    requests: int
    n_p: int
    best_static: str
    paper: str
    best_share: str
    vs_best: Estimate
    vs_paper: Estimate
    p90_vs_paper: Estimate
    share_vs_best: Estimate
    roles_vs_ours: Estimate
    policies: Mapping[str, Mapping[str, float]]
    share: Mapping[str, float]
    equal_cost: Mapping[str, float]
    equal_cost_own: Mapping[str, float]

    @property
    def ahead(self) -> bool:
        """At least 10 % more goodput or 25 % lower P90 TTFT than the paper's rule, and the 95 % interval of that ratio excludes 1."""
        more, p90 = self.vs_paper, self.p90_vs_paper
        return (more.mean >= 1.10 and more.mean - more.half_width > 1) or (p90.mean <= 0.75 and p90.mean + p90.half_width < 1)

    @property
    def behind(self) -> bool:
        """More than 1 % less goodput than the best static baseline."""
        return self.vs_best.mean < 0.99


@dataclasses.dataclass(frozen=True)
class Contest:
    """How thorough: requests per run of new cells, seeds of the evaluation, seeds and points of the tuning, load, processes."""

    options: SimOptions
    requests: int
    seeds: int = 5
    tuning_seeds: int = 3
    points: int = 8
    load: float = 0.9
    processes: int = 1

    def __post_init__(self) -> None:
        for field in ("requests", "seeds", "tuning_seeds", "points", "processes"):
            if getattr(self, field) < 1:
                raise InvalidInput(f"contest.{field}", getattr(self, field), "at least 1")
        if self.tuning_seeds > EVALUATION_SEED - TUNING_SEED:
            expected = f"at most {EVALUATION_SEED - TUNING_SEED}, then those of the evaluation begin"
            raise InvalidInput("contest.tuning_seeds", self.tuning_seeds, expected)
        if not 0 < self.load < math.inf:
            raise InvalidInput("contest.load", self.load, "a share of the planner's optimum above zero")

    def judge(self, cells: Sequence[Cell]) -> Iterator[Verdict]:
        """Tunes and evaluates cell by cell."""
        for number, cell in enumerate(cells):
            yield self._judge(cell, f"{number + 1}/{len(cells)} {cell.name}")

    def _judge(self, cell: Cell, label: str) -> Verdict:
        topology, most = plan_cell(cell)
        ground = Ground(topology, cell.mix, self.options)
        rate = self.load * most

        def run(workload: Workload) -> Callable[[Contender, int], Run]:
            return lambda one, seed: Run(ground, workload, *one, seed, cell.requests, cell.links)

        # Without prefixes two of the paper's rules are one.
        baselines = [n for n in CONTENDERS if n not in (OURS, ROLES) and (n != "paper_prefix" or cell.workload.block_tokens)]
        planned = optimum(topology, cell.mix)
        grid = [(name, x) for name in baselines for x in parameters(name, planned, cell.mix, self.points)]
        # Another part of a trace has other prompts: as many requests/s of those would be another load.
        tuning = cell.tuning.scaled(self.load * sustained(cell, topology, cell.tuning_mix) / cell.rate)
        seeds = range(TUNING_SEED, TUNING_SEED + self.tuning_seeds)
        tuned = Tuned.of(self._run(grid, seeds, run(tuning), f"{label}: tuning"))

        workload = cell.workload.scaled(rate / cell.rate)
        seeds = range(EVALUATION_SEED, EVALUATION_SEED + self.seeds)
        chosen = list(dict.fromkeys([*tuned.parameters.items(), tuned.share, (OURS, 0.0), (ROLES, 0.0)]))
        results = self._run(chosen, seeds, run(workload), f"{label}: evaluating")

        alone, most_alone = equal_cost(topology, cell.mix)
        same_money = Ground(alone, cell.mix, self.options)
        loads = {"theirs": rate, "own": self.load * most_alone}

        def homogeneous(one: Contender, seed: int) -> Run:
            at = cell.workload.scaled(one[1] / cell.rate)
            return Run(same_money, at, "always_local", 0.0, seed, cell.requests, slo_topology=topology)

        others = self._run(list(loads.items()), seeds, homogeneous, f"{label}: equal cost")
        theirs, own = ({"load_rps": one[1], **means(others[one])} for one in loads.items())
        return _verdict(cell, topology, rate, tuned, results, theirs, own)

    def _run(self, contenders: Sequence[Contender], seeds: Sequence[int], run: Callable[[Contender, int], Run], label: str) -> Results:
        """The results of each on all seeds."""
        found = list(sweep([run(one, seed) for one in contenders for seed in seeds], self.processes, label))
        return {one: found[i * len(seeds) : (i + 1) * len(seeds)] for i, one in enumerate(contenders)}


def mean(found: Sequence[Mapping[str, Any]], field: str) -> float:
    """Of one figure over the seeds."""
    return Estimate.of([r[field] for r in found]).mean


def means(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of all figures that a verdict keeps."""
    return {field: mean(found, field) for field in FIGURES}


def _verdict(
    cell: Cell, topology: Topology, rate: float, tuned: Tuned, results: Results, theirs: Mapping[str, float], own: Mapping[str, float]
) -> Verdict:
    ours = (OURS, 0.0)

    def ratio(mine: Contender, over: Contender, field: str) -> Estimate:
        pairs = zip(results[mine], results[over], strict=True)
        return Estimate.of([a[field] / max(b[field], 1e-9) for a, b in pairs])

    return Verdict(
        cell=cell.name,
        hard=cell.hard,
        held_out=cell.held_out,
        load_rps=rate,
        requests=cell.requests,
        n_p=topology.regions[0].prefill,
        best_static=tuned.static[0],
        paper=tuned.paper[0],
        best_share=tuned.share[0],
        vs_best=ratio(ours, tuned.static, "goodput_rps"),
        vs_paper=ratio(ours, tuned.paper, "goodput_rps"),
        p90_vs_paper=ratio(ours, tuned.paper, "ttft_p90_s"),
        share_vs_best=ratio(ours, tuned.share, "slo_share"),
        roles_vs_ours=ratio((ROLES, 0.0), ours, "goodput_rps"),
        policies={name: {"parameter": x, **means(results[name, x])} for name, x in (*tuned.parameters.items(), ours, (ROLES, 0.0))},
        share={"parameter": tuned.share[1], **means(results[tuned.share])},
        equal_cost=theirs,
        equal_cost_own=own,
    )

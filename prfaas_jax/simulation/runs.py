"""Many simulations: one run from plain values, sweeps over processes with progress, means with confidence intervals over seeds."""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.simulation.contenders import Ground, build
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.scenario import LinkPlan, Outage
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.summary import Summary
from prfaas_jax.simulation.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Run:
    """One simulation; everything that it needs, so that it can be sent to another process.

    Attributes:
        ground: system, planner's mix, options.
        workload: arrivals, at their rate.
        policy: a name of `contenders.CONTENDERS`.
        parameter: its threshold or share, where it has one.
        seed: of the workload.
        requests: arrivals to simulate; None for all that the workload has.
        links: how links change.
        outages: instances that fail.
        slo_topology: whose unloaded TTFT the SLO counts; None: the run's own.
    """

    ground: Ground
    workload: Workload
    policy: str
    parameter: float = 0.0
    seed: int = 0
    requests: int | None = None
    links: Mapping[tuple[str, str], LinkPlan] = dataclasses.field(default_factory=dict)
    outages: tuple[Outage, ...] = ()
    slo_topology: Topology | None = None


def prepare(run: Run, finished: Callable[[Job], None] | None = None) -> tuple[Simulation, Summary]:
    """The simulation of a run, not started, and the summary that it fills; `finished` sees every request too."""
    policy, controller = build(run.policy, run.ground, run.parameter)
    requests = run.requests if run.requests is not None else run.workload.requests
    summary = Summary(run.ground.options, requests)

    def both(job: Job) -> None:
        summary.add(job)
        if finished is not None:
            finished(job)

    simulation = Simulation(
        run.ground.topology,
        run.workload,
        policy,
        run.ground.options,
        run.seed,
        both if finished is not None else summary.add,
        links=run.links,
        outages=run.outages,
        controller=controller,
        slo_topology=run.slo_topology,
    )
    return simulation, summary


def simulate(run: Run) -> dict[str, Any]:
    """The figures of a run (`Summary.result`), with the wall seconds that it took and simulated requests per wall second."""
    began = time.perf_counter()
    simulation, summary = prepare(run)
    simulation.run(run.requests)
    wall_s = time.perf_counter() - began
    return {**summary.result(simulation), "wall_s": wall_s, "requests_per_s": simulation.completed / wall_s}


def sweep(runs: Sequence[Run], processes: int = 1, label: str = "simulating", deadline_s: float = 24 * 3600.0) -> Iterator[dict[str, Any]]:
    """The results of `runs`, in their order, with a progress bar; a run that fails ends the sweep with its error.

    Raises:
        InvalidInput: fewer than one process.
        TimeoutError: the sweep took longer than `deadline_s`.
    """
    if processes < 1:
        raise InvalidInput("processes", processes, "at least 1")
    began = time.monotonic()
    with tqdm(total=len(runs), desc=label, unit="run", disable=None) as bar:
        if processes == 1:
            for run in runs:
                if time.monotonic() - began > deadline_s:
                    raise TimeoutError(f"{label}: {len(runs) - bar.n} of {len(runs)} runs are left after {deadline_s} s")
                yield simulate(run)
                bar.update()
            return
        # Spawned: a fork would copy locks of whatever threads the caller has.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            try:
                for result in pool.map(simulate, runs, timeout=deadline_s):
                    yield result
                    bar.update()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its 95 % confidence interval (Student's t; infinite for a single seed)."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Of one value per seed."""
        if not values:
            raise InvalidInput("values", values, "at least one")
        n, mean = len(values), math.fsum(values) / len(values)
        if n == 1:
            return cls(mean, math.inf)
        from scipy.stats import t

        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        return cls(mean, float(t.ppf(0.975, n - 1)) * math.sqrt(variance / n))

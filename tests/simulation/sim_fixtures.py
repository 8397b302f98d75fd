"""Small systems, workloads that list their arrivals, and the checks that hold after every run."""

import dataclasses
from collections.abc import Iterator

import pytest

from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill, Instance
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology
from prfaas_jax.scheduling.view import Placement
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.workloads import Arrival

KV = KvFootprint(182353920, 17280)
H200 = Instance("h200", FittedPrefill(0.39035, 0.42233, 0.00936))
H20 = Instance("h20", FittedPrefill(0.46425, 1.30599, 0.02806), FittedDecode(0.025), max_batch=20)
PAPER = Topology(KV, (PrefillCluster("h200", H200, 4),), (Region("pd", H20, 3, 5),), (Link("h200", "pd", 100 * GBPS),))


def wide(n_far: int = 2) -> Topology:
    """Two clusters, two regions, four kinds of links: one slow, one far, one with a small window; a region that cannot prefill."""
    slow = dataclasses.replace(H200, nic_bytes_per_s=4 * GBPS)
    busy = dataclasses.replace(H20, decode=FittedDecode(0.010, 0.0005, 1e-8), kv_memory_bytes=8e9, max_batch=6)
    return Topology(
        KV,
        (PrefillCluster("a", slow, n_far), PrefillCluster("b", H200, 1)),
        (Region("x", busy, 2, 2), Region("y", dataclasses.replace(H20, nic_bytes_per_s=20 * GBPS), 0, 2)),
        (Link("a", "x", 10 * GBPS, 0.02, 5e7), Link("a", "y", 5 * GBPS), Link("b", "y", 50 * GBPS, 0.1)),
    )


@dataclasses.dataclass(frozen=True)
class Listed:
    """A workload that is a list."""

    rows: tuple[Arrival, ...]
    block_tokens: int = 0

    @property
    def requests(self) -> int:
        return len(self.rows)

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        return iter(self.rows)

    def scaled(self, factor: float) -> "Listed":
        return dataclasses.replace(self, rows=tuple(r._replace(time_s=r.time_s / factor) for r in self.rows))


@dataclasses.dataclass(frozen=True)
class Always:
    """Always the same placement."""

    placement: Placement

    def place(self, request, view, now) -> Placement:
        return self.placement


def simulate(topology, workload, policy, options=None, seed=0, until_s=None, check=True, **disturbances) -> tuple[list[Job], Simulation]:
    """Runs to the end, checks what must hold after every run; jobs in the order in which they were finished."""
    jobs: list[Job] = []
    sim = Simulation(topology, workload, policy, options or SimOptions(), seed, jobs.append, **disturbances)
    sim.run() if until_s is None else sim.run(until_s=until_s)
    if check:
        check_finished(sim, jobs)
    return jobs, sim


def check_finished(sim: Simulation, jobs: list[Job]) -> None:
    """Nobody lost or finished twice, times in order, tokens and bytes conserved, the system as idle as it began."""
    assert sorted(j.id for j in jobs) == list(range(sim.arrived)) and sim.completed == len(jobs)
    assert not sim.jobs and not sim.parked
    for job in jobs:
        a = job.arrival
        assert a.time_s <= job.first_s <= job.done_s <= sim.last_s
        assert job.tokens + job.output == a.tokens + a.output_tokens and job.output >= 1
        assert job.tokens == a.tokens or job.fallbacks
        assert job.prefill is None and job.source is None and job.decode is None and job.transfer is None and job.pending_bytes == 0
        row = job.row(sim.clusters, sim.regions)
        parts = [row[f"{part}_s"] for part in ("before", "queue", "prefill", "transfer", "admit")]
        assert min(parts) >= -1e-9 and sum(parts) == pytest.approx(row["ttft_s"], abs=1e-9)
        assert 0 <= job.cached < job.tokens and 0 <= job.held < job.tokens
    sent = sum(j.sent_bytes for j in jobs)
    for table, carried in ((sim.pairs, sent), (sim.reverse, sum(j.returned_bytes for j in jobs))):
        pairs = [pair for row in table for pair in row if pair is not None]
        assert sum(pair.moved for pair in pairs) == pytest.approx(carried, abs=1.0 + 1e-9 * carried)
        assert all(not p.open and p.active == 0 and p.backlog == 0 and p.pending == 0 and p.to_come == 0 for p in pairs)
    view = sim.view
    assert view.links is not None and not view.links.pending.any() and not view.links.pending_bytes.any()
    for servers in (view.prefill, view.decode):
        assert servers.load is not None and not servers.queue.any()
        assert not servers.load.jobs.any() and not servers.load.fresh.any() and not servers.load.waiting.any()
    for pool in (*sim.prefill, *sim.local):
        for prefill in pool.instances:
            assert prefill.jobs == 0 and prefill.free_at <= sim.kernel.now + 1e-9 and prefill.busy_s >= -1e-9
    for decode in sim.decode:
        assert not decode.waiting
        for batch in decode.instances:
            assert batch.running == 0 and batch.free_bytes == decode.instance.kv_memory_bytes
    for cache in (*sim.far_caches, *sim.near_caches):
        assert 0 <= cache.used_bytes <= cache.capacity_bytes

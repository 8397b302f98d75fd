"""What a run leaves on disk: a row per request as it finishes, use of pools and links over time, a timeline for Perfetto."""

import csv
import os
from pathlib import Path
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.chrome_trace import US, write_trace
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.records import Samples
from prfaas_jax.simulation.simulator import Simulation


class RequestTable:
    """requests.csv, written as requests finish, so that memory stays flat; the file appears under its name when it is complete."""

    def __init__(self, path: Path):
        self._path, self._partial = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._partial.open("w", newline="", encoding="utf-8")
        self._writer: csv.DictWriter[str] | None = None

    def __enter__(self) -> "RequestTable":
        return self

    def add(self, job: Job, simulation: Simulation) -> None:
        """Writes the row of a finished request."""
        row = job.row(simulation.clusters, simulation.regions)
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(row), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(row)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)


class Usage:
    """Use of every pool and link over time: samples from the first arrival on, while there are requests.

    Columns per cluster: `prefill <name>` share of its instances that work, `queue <name>` prompts there, `decode <name>` share of its
    slots in use, `waiting <name>` requests that wait for one; per link `<a>-><b>` the Gbit/s since the last sample.
    """

    def __init__(self, simulation: Simulation, period_s: float = 1.0):
        if not period_s > 0:
            raise InvalidInput("period_s", period_s, "seconds above zero")
        self._simulation = simulation
        self._moved: dict[str, float] = {}
        self._at = 0.0
        self.samples = Samples(period_s, self._read)
        simulation.kernel.at(period_s, self._sample)

    def _sample(self, _: object) -> None:
        kernel = self._simulation.kernel
        self.samples.take(kernel.now)
        # Where nothing else is to come the run is over, or stuck, and must end.
        if kernel.pending and (self._simulation.jobs or self._simulation.left):
            kernel.at(kernel.now + self.samples.period_s, self._sample)

    def _read(self) -> dict[str, float]:
        sim, row = self._simulation, {}
        for pool in (*sim.prefill, *sim.local):
            up = [i for i in pool.instances if i.up]
            row[f"prefill {pool.name}"] = sum(i.jobs > 0 for i in up) / len(up) if up else 0.0
            row[f"queue {pool.name}"] = sum(i.jobs for i in up)
        for decode in sim.decode:
            slots = sum(i.instance.max_batch for i in decode.instances if i.up)
            row[f"decode {decode.name}"] = sum(i.running for i in decode.instances) / slots if slots else 0.0
            row[f"waiting {decode.name}"] = len(decode.waiting)
        elapsed, self._at = sim.kernel.now - self._at, sim.kernel.now
        for i, cluster in enumerate(sim.clusters):
            for j, region in enumerate(sim.regions):
                pair = sim.pairs[i][j]
                if pair is None:
                    continue
                pair.advance()
                name = f"{cluster}->{region}"
                row[name] = (pair.moved - self._moved.get(name, 0.0)) / max(elapsed, 1e-9) / GBPS
                self._moved[name] = pair.moved
        return row


class Timeline:
    """A trace in the Chrome format, which ui.perfetto.dev opens: the stages of the first `most` requests, and counters of a `Usage`."""

    def __init__(self, most: int = 1000):
        self._most = most
        self._events: list[dict[str, Any]] = []

    def add(self, job: Job, simulation: Simulation) -> None:
        """Adds the stages of a finished request, each a row of the process that did it."""
        if job.id >= self._most:
            return
        where = simulation.clusters[job.cluster] if job.cluster >= 0 else simulation.regions[job.region]
        placed, begun, computed, kv = job.path
        about = {"tokens": job.arrival.tokens, "output_tokens": job.arrival.output_tokens, "reason": job.reason, "cached": job.cached}
        for name, process, start, end in (
            ("queue", where, placed, begun),
            ("prefill", where, begun, computed),
            ("transfer", where, computed, kv),
            ("admit", simulation.regions[job.region], kv, job.first_s),
            ("decode", simulation.regions[job.region], job.first_s, job.done_s),
        ):
            if end > start:
                common = {"name": name, "cat": "request", "id": job.id, "pid": process, "tid": name}
                self._events.append({**common, "ph": "b", "ts": start * US, "args": about})
                self._events.append({**common, "ph": "e", "ts": end * US})

    def write(self, path: Path, usage: Usage) -> None:
        """Writes the trace."""
        counters = [
            {"name": name, "ph": "C", "ts": row["time_s"] * US, "pid": "use", "args": {"value": value}}
            for row in usage.samples.rows
            for name, value in row.items()
            if name != "time_s"
        ]
        write_trace(path, [*self._events, *counters])

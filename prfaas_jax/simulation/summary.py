"""The figures of a run, simulated or live: latencies, goodput at the SLO, where requests ran, what the links carried.

Flat in the number of requests.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.records import Histogram
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.simulator import Simulation


class Finished(NamedTuple):
    """What counts of a finished request, in model seconds, tokens and bytes; `cluster` is below zero where its own region prefilled it."""

    arrived_s: float
    first_s: float
    done_s: float
    unloaded_s: float
    tokens: int
    output: int
    cached: int
    cluster: int
    fallbacks: int
    kv_bytes: float


class _Columns(NamedTuple):
    """Those of a block of requests."""

    arrived_s: Float64[np.ndarray, " n"]
    first_s: Float64[np.ndarray, " n"]
    done_s: Float64[np.ndarray, " n"]
    unloaded_s: Float64[np.ndarray, " n"]
    tokens: Float64[np.ndarray, " n"]
    output: Float64[np.ndarray, " n"]
    cached: Float64[np.ndarray, " n"]
    cluster: Float64[np.ndarray, " n"]
    fallbacks: Float64[np.ndarray, " n"]
    kv_bytes: Float64[np.ndarray, " n"]


class Summary:
    """Takes finished requests, and counts them by blocks; the first `options.warmup` share of `requests` (by arrival) does not count.

    Where the number of requests is not known, `skip` says how many do not count.
    """

    BLOCK = 1024

    def __init__(self, options: SimOptions, requests: int | None = None, skip: int | None = None):
        self._options = options
        self._skip = skip if skip is not None else int(options.warmup * requests) if requests else 0
        self._block: list[Finished] = []  # not counted yet
        self._ttft, self._tpot, self._e2e = Histogram(), Histogram(), Histogram()
        self._met = self._remote = self._fallbacks = 0
        self._kv_bytes = self._prompt_tokens = self._cached_tokens = 0.0
        self._first = math.inf
        self._last = self._served = -math.inf

    def add(self, job: Job) -> None:
        """Takes a finished request of a simulation."""
        if job.id < self._skip:
            return
        arrived, tokens, output, _, _ = job.arrival
        times = arrived, job.first_s, job.done_s, job.unloaded_s
        self.take(job.id, Finished(*times, tokens, output, job.cached, job.cluster, job.fallbacks, job.sent_bytes))

    def take(self, number: int, finished: Finished) -> None:
        """Takes a finished request of any run; `number` counts arrivals from 0."""
        if number < self._skip:
            return
        self._block.append(finished)
        if len(self._block) >= self.BLOCK:
            self._count()

    def _count(self) -> None:
        if not self._block:
            return
        new, o = _Columns(*np.array(self._block, np.float64).T), self._options
        self._block.clear()
        ttft, several = new.first_s - new.arrived_s, new.output > 1
        tpot = np.where(several, new.done_s - new.first_s, 0.0) / np.maximum(new.output - 1, 1)
        self._ttft.add(ttft)
        self._tpot.add(tpot[several])
        self._e2e.add(new.done_s - new.arrived_s)
        self._met += int(((ttft <= o.slo_scale * new.unloaded_s + o.slo_base_s) & (tpot <= o.slo_tpot_s)).sum())
        self._remote += int((new.cluster >= 0).sum())
        self._fallbacks += int(new.fallbacks.sum())
        self._kv_bytes += float(new.kv_bytes.sum())
        self._prompt_tokens += float(new.tokens.sum())
        self._cached_tokens += float(new.cached.sum())
        self._first, self._last = min(self._first, float(new.arrived_s.min())), max(self._last, float(new.arrived_s.max()))
        self._served = max(self._served, float(new.first_s.max()))

    @property
    def requests(self) -> int:
        """That count."""
        return self._ttft.count + len(self._block)

    def result(self, sim: Simulation) -> dict[str, Any]:
        """The figures, and what else there is to say of a simulation."""
        figures = self.figures()
        if not figures["requests"]:
            return figures
        return figures | {"conversions": sim.conversions, "simulated_s": sim.last_s, "events": sim.kernel.events}

    def figures(self) -> dict[str, Any]:
        """Seconds, requests per second of the model, shares. Rates are over the time in which the counted requests arrived.

        Except goodput: requests within the SLO over the time until the last counted request had its first token. This is how benchmarks of
        serving, such as vLLM's, count: good requests over the benchmark's duration, draining included. A policy which lets a queue grow
        without end, and keeps the SLO for others meanwhile, pays for draining it. `slo_share` does not show that; `drain_s` does: seconds
        from the last arrival to the last first token. `throughput_rps` counts all requests over goodput's time. A key is absent where
        nothing was counted for it.
        """
        self._count()
        if not self.requests:
            return {"requests": 0}
        span, served = max(self._last - self._first, 1e-9), max(self._served - self._first, 1e-9)
        result: dict[str, Any] = {"requests": self.requests}
        for name, histogram in (("ttft", self._ttft), ("tpot", self._tpot), ("e2e", self._e2e)):
            if not histogram.count:
                continue
            result[f"{name}_mean_s"] = histogram.mean
            result |= {f"{name}_p{q}_s": histogram.percentile(q) for q in (50, 90, 99)}
        return result | {
            "arrival_rps": self.requests / span,
            "throughput_rps": self.requests / served,
            "goodput_rps": self._met / served,
            "slo_share": self._met / self.requests,
            "drain_s": self._served - self._last,
            "offload_share": self._remote / self.requests,
            "fallbacks": self._fallbacks,
            "cached_share": self._cached_tokens / self._prompt_tokens,
            "egress_gbps": self._kv_bytes / span / GBPS,
        }

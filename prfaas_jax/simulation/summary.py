"""A simulation's figures: latencies, goodput at the SLO, where requests ran, what the links carried. Flat in the number of requests."""

import math
from typing import Any

from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.records import Histogram
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.simulator import Simulation


class Summary:
    """Takes finished requests; the first `options.warmup` share of `requests` (by arrival) does not count.

    Where the number of requests is not known, `skip` says how many do not count.
    """

    def __init__(self, options: SimOptions, requests: int | None = None, skip: int | None = None):
        self._options = options
        self._skip = skip if skip is not None else int(options.warmup * requests) if requests else 0
        self.ttft, self.tpot, self.e2e = Histogram(), Histogram(), Histogram()
        self.met = self.remote = self.fallbacks = 0
        self.kv_bytes = self.prompt_tokens = self.cached_tokens = self.output_tokens = 0.0
        self._first = math.inf
        self._last = self._served = -math.inf

    def add(self, job: Job) -> None:
        """Counts a finished request."""
        if job.id < self._skip:
            return
        o, ttft, tpot = self._options, job.ttft_s, job.tpot_s
        arrived, tokens, output, _, _ = job.arrival
        if arrived < self._first:
            self._first = arrived
        if arrived > self._last:
            self._last = arrived
        if job.first_s > self._served:
            self._served = job.first_s
        self.ttft.add(ttft)
        if output > 1:
            self.tpot.add(tpot)
        self.e2e.add(job.done_s - arrived)
        self.met += ttft <= o.slo_scale * job.unloaded_s + o.slo_base_s and tpot <= o.slo_tpot_s
        self.remote += job.cluster >= 0
        self.fallbacks += job.fallbacks
        self.kv_bytes += job.sent_bytes
        self.prompt_tokens += tokens
        self.cached_tokens += job.cached
        self.output_tokens += output

    @property
    def requests(self) -> int:
        """That count."""
        return self.ttft.count

    def result(self, sim: Simulation) -> dict[str, Any]:
        """Seconds, requests per simulated second, shares. Rates are over the time in which the counted requests arrived.

        Except goodput: requests within the SLO over the time until the last counted request had its first token. This is how benchmarks of
        serving, such as vLLM's, count: good requests over the benchmark's duration, draining included. A policy which lets a queue grow
        without end, and keeps the SLO for others meanwhile, pays for draining it. `slo_share` does not show that; `drain_s` does: seconds
        from the last arrival to the last first token. A key is absent where nothing was counted for it.
        """
        if not self.requests:
            return {"requests": 0}
        span = max(self._last - self._first, 1e-9)
        result: dict[str, Any] = {"requests": self.requests}
        for name, histogram in (("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e)):
            if not histogram.count:
                continue
            result[f"{name}_mean_s"] = histogram.mean
            result |= {f"{name}_p{q}_s": histogram.percentile(q) for q in (50, 90, 99)}
        result |= {
            "arrival_rps": self.requests / span,
            "goodput_rps": self.met / max(self._served - self._first, 1e-9),
            "slo_share": self.met / self.requests,
            "drain_s": self._served - self._last,
            "offload_share": self.remote / self.requests,
            "fallbacks": self.fallbacks,
            "conversions": sim.conversions,
            "cached_share": self.cached_tokens / self.prompt_tokens,
            "egress_gbps": self.kv_bytes / span / GBPS,
            "simulated_s": sim.last_s,
            "events": sim.kernel.events,
        }
        return result

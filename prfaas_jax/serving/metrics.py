"""What Prometheus reads of a server: its status as of the scrape, and what its finished requests have cost.

Names are vLLM's, with the prefix `prfaas:`, where they mean the same. Labels hold addresses, clusters and kinds of things: never a prompt,
a token, a tenant or a request.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric

from prfaas_jax.serving import metric_families as families
from prfaas_jax.serving.metric_families import Histogram, Labels
from prfaas_jax.serving.metrics_endpoint import MetricsEndpoint
from prfaas_jax.serving.proto import generation_pb2, prefill_pb2
from prfaas_jax.serving.report import PARTS
from prfaas_jax.transfer.security import Security

# A server whose event loop does not answer for so long has no metrics either.
_STATUS_S: Final = 5.0

_SECONDS: Final = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_PART_SECONDS: Final = (0.0001, 0.0003, 0.001, 0.003, *_SECONDS)
_TOKEN_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_DECISION_SECONDS: Final = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1, 1.0)

# Histograms over finished requests: name -> (buckets, help).
_LATENCIES: Final = {
    "time_to_first_token_seconds": (_SECONDS, "Arrival to the first token's hand-over to the client's stream."),
    "inter_token_latency_seconds": (_TOKEN_SECONDS, "Between consecutive tokens of a request."),
    "e2e_request_latency_seconds": (_SECONDS, "Arrival to the last token."),
    "request_queue_time_seconds": (_SECONDS, "Tokenising, waiting for pages and for the prefill engine."),
    "request_prefill_time_seconds": (_SECONDS, "Computing the prompt."),
    "request_decode_time_seconds": (_SECONDS, "First token to the last one."),
}
# Sums over finished requests: name -> (field of the usage, help).
_TOTALS: Final = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens."),
    "generation_tokens": ("output_tokens", "Tokens generated."),
    "kv_bytes_moved": ("kv_bytes_moved", "Canonical bytes of KV that came over a link."),
    "kv_bytes_skipped": ("kv_bytes_skipped", "Canonical bytes of KV that were here already."),
    "kv_bytes_resent": ("kv_bytes_resent", "Payload bytes that were sent again."),
    "tokens_recomputed": ("tokens_recomputed", "Prompt tokens that were prefilled a second time."),
    "resumes": ("resumes", "Prefill servers that went on where another had failed."),
}


class ServerMetrics:
    """Of one server, in a registry of its own: several servers may run in one process. A Collector, as the registry calls it."""

    def __init__(self, status: Callable[[], Any], empty: Any, address: str, security: Security):
        """Serves them while started, if there is an address.

        Args:
            status: what the server's Status says; called on its event loop.
            empty: such a message with nothing in it.
            address: host:port of the HTTP endpoint, port 0 takes any; empty for none. InvalidInput as `check_listen`.
            security: who may scrape.
        """
        self.registry = CollectorRegistry()
        self._status, self._empty = status, empty
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endpoint = MetricsEndpoint(address, self.registry, security) if address else None
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    @property
    def address(self) -> str:
        """host:port of the HTTP endpoint, as bound; empty without one."""
        return self._endpoint.address if self._endpoint is not None else ""

    async def start(self) -> None:
        """From now on scrapes are answered; raises InvalidInput naming an address that cannot be bound."""
        self._loop = asyncio.get_running_loop()
        if self._endpoint is not None:
            self._endpoint.start()

    async def stop(self) -> None:
        """Ends the endpoint, which answers until then. Idempotent."""
        if self._endpoint is not None:
            # Not on the loop, which answers the last scrapes.
            await asyncio.to_thread(self._endpoint.stop)

    def describe(self) -> Iterator[Metric]:
        """What there will be: asked for before there is a loop to ask the server on."""
        return self._families(self._empty)

    def collect(self) -> Iterator[Metric]:
        """On the scrape's thread. The server's state is its loop's, so that makes the message; raises TimeoutError if it does not."""
        if self._loop is None:
            raise RuntimeError("the server has not been started")

        async def ask() -> Any:
            return self._status()

        return self._families(asyncio.run_coroutine_threadsafe(ask(), self._loop).result(_STATUS_S))

    def _families(self, status: Any) -> Iterator[Metric]:
        raise NotImplementedError


class PrefillMetrics(ServerMetrics):
    """Of a prefill server, all from its status."""

    def __init__(self, status: Callable[[], prefill_pb2.PrefillStatus], address: str, security: Security):
        """Arguments as of ServerMetrics."""
        super().__init__(status, prefill_pb2.PrefillStatus(), address, security)

    def _families(self, status: prefill_pb2.PrefillStatus) -> Iterator[Metric]:
        yield from families.engine_families(status.engine)
        yield from families.server_families(status)
        yield families.gauge("tickets", "Prompts whose KV is not released yet.", status.tickets)
        yield families.gauge("staged_bytes", "KV of those prompts.", status.staged_bytes)


class GenerationMetrics(ServerMetrics):
    """Of a Generation service: its status, and the usages of its finished requests."""

    def __init__(self, status: Callable[[], generation_pb2.GenerationStatus], address: str, security: Security):
        """Arguments as of ServerMetrics."""
        self._latencies = {name: Histogram(bounds) for name, (bounds, _) in _LATENCIES.items()}
        self._parts: dict[Labels, Histogram] = {(part,): Histogram(_PART_SECONDS) for part in PARTS}
        self._totals = dict.fromkeys(_TOTALS, 0)
        self._finished: dict[Labels, list[int]] = {}
        self._link_bytes: dict[Labels, list[int]] = {}
        super().__init__(status, generation_pb2.GenerationStatus(), address, security)

    def observe(self, usage: generation_pb2.Usage) -> None:
        """Takes a finished request into account: once for each, on the server's loop."""
        if not usage.events_before:
            self._observe_latencies(usage)
        for name, (field, _) in _TOTALS.items():
            self._totals[name] += getattr(usage, field)
        families.bounded(self._finished, (usage.finish_reason,), lambda: [0])[0] += 1
        if usage.placement == "remote":
            families.bounded(self._link_bytes, (usage.prefill_address,), lambda: [0])[0] += usage.kv_bytes_wire

    def _observe_latencies(self, usage: generation_pb2.Usage) -> None:
        itl, parts = list(usage.itl_s), usage.parts
        decode_s = sum(itl)
        for name, seconds in (
            ("time_to_first_token_seconds", (usage.ttft_s,)),
            ("inter_token_latency_seconds", itl),
            ("e2e_request_latency_seconds", (usage.ttft_s + decode_s,)),
            ("request_queue_time_seconds", (parts.queue,)),
            ("request_prefill_time_seconds", (parts.prefill,)),
            ("request_decode_time_seconds", (decode_s,)),
        ):
            self._latencies[name].observe(seconds)
        for (part,), histogram in self._parts.items():
            histogram.observe((getattr(parts, part),))

    def _families(self, status: generation_pb2.GenerationStatus) -> Iterator[Metric]:
        # A router has no engine of its own.
        if status.HasField("engine") or status is self._empty:
            yield from families.engine_families(status.engine)
        yield from families.server_families(status)
        yield families.counter("requests", "Finished requests.", families.by_kind(status.served, 2), ("placement", "reason"))
        yield families.counter("request_failures", "Requests that ended with an error.", families.by_kind(status.failed, 1), ("code",))
        yield families.counter("fallbacks", "Remote prefills that were replaced by a local one.", status.fallbacks)
        yield families.counter("conversions", "Instances that a router's controller told to change their role.", status.conversions)
        decisions = families.by_kind(status.decisions, 2)
        yield families.counter("decisions", "What a router decided, and its shadow.", decisions, ("placement", "reason"))
        yield from families.link_families(status.links)
        yield from families.backend_families(status.backends)
        yield from families.way_families(status.ways)
        for name, (_, about) in _LATENCIES.items():
            yield families.histogram(name, about, self._latencies[name])
        yield families.histogram("ttft_part_seconds", "What TTFT is the sum of.", self._parts, ("part",))
        for name, (_, about) in _TOTALS.items():
            yield families.counter(name, f"{about} Of finished requests.", self._totals[name])
        yield families.counter("request_success", "Finished requests, by why they ended.", _read(self._finished), ("finished_reason",))
        yield families.counter("link_bytes", "Payload that arrived, as it travelled.", _read(self._link_bytes), ("prefill_address",))


class RouterMetrics(GenerationMetrics):
    """Of a router: how long its decisions take, besides."""

    def __init__(self, status: Callable[[], generation_pb2.GenerationStatus], address: str, security: Security):
        """Arguments as of ServerMetrics."""
        self._decisions: dict[Labels, Histogram] = {}
        super().__init__(status, address, security)

    def decided(self, seconds: float, reason: str) -> None:
        """A request was placed, for a reason, which took so long; on the router's loop."""
        families.bounded(self._decisions, (families.kind(reason),), lambda: Histogram(_DECISION_SECONDS)).observe((seconds,))

    def _families(self, status: generation_pb2.GenerationStatus) -> Iterator[Metric]:
        yield from super()._families(status)
        yield families.histogram("router_decision_seconds", "To place a request.", self._decisions.copy(), ("reason",))


def _read(counts: dict[Labels, list[int]]) -> dict[Labels, float]:
    return {labels: total for labels, (total,) in counts.copy().items()}

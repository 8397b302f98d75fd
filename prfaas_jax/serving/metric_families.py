"""What the messages of servers look like to Prometheus: gauges, counters and histograms, with labels of few values."""

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from prfaas_jax.serving.proto import common_pb2, generation_pb2, prefill_pb2

PREFIX: Final = "prfaas:"
# Values of one label, as far as others than the operator choose them; what more there are is counted under OTHER.
MAX_VALUES: Final = 256
OTHER: Final = "other"
_BREAKER: Final[dict[str, float]] = {"closed": 0, "half-open": 1, "open": 2}
# From so many values on, numpy is faster.
_MANY: Final = 16

Labels = tuple[str, ...]
T = TypeVar("T")


def kind(reason: str) -> str:
    """Reasons of one kind differ in their numbers only: "threshold: 700 > 512 tokens"."""
    return reason.partition(":")[0]


def bounded(table: dict[Labels, T], labels: Labels, make: Callable[[], T]) -> T:
    """The entry of `labels`, made where there is none; that of OTHER for new ones once the table is full."""
    if labels not in table and len(table) >= MAX_VALUES:
        labels = (OTHER,) * len(labels)
    if labels not in table:
        table[labels] = make()
    return table[labels]


class Histogram:
    """Counts of seconds by bucket. Observed by one thread while another one reads."""

    def __init__(self, bounds: Sequence[float]):
        """`bounds` are the largest values of each bucket but the last one, ascending."""
        self._bounds, self._lock = tuple(bounds), threading.Lock()
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, values: Sequence[float]) -> None:
        """All of them at once: a request has as many latencies as tokens."""
        if len(values) < _MANY:
            where: Iterable[tuple[int, int]] = [(bisect.bisect_left(self._bounds, value), 1) for value in values]
        else:
            where = enumerate(np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts)).tolist())
        total = sum(values)
        with self._lock:
            for bucket, count in where:
                self._counts[bucket] += count
            self._sum += total

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """(upper bound, values up to it) of every bucket, and the sum of all values."""
        with self._lock:
            counts, total = np.cumsum(self._counts).tolist(), self._sum
        bounds = (*map(floatToGoString, self._bounds), "+Inf")
        return list(zip(bounds, counts, strict=True)), total


# --- families ------------------------------------------------------------------------------------------------------------------------


def gauge(name: str, about: str, samples: float | Mapping[Labels, float], labels: Labels = ()) -> Metric:
    """One value, or one per values of the labels."""
    family = GaugeMetricFamily(PREFIX + name, about, labels=labels)
    for values, value in samples.items() if isinstance(samples, Mapping) else [((), samples)]:
        family.add_metric(values, value)
    return family


def counter(name: str, about: str, samples: float | Mapping[Labels, float], labels: Labels = ()) -> Metric:
    """Like `gauge`; its samples are named `<name>_total`."""
    family = CounterMetricFamily(PREFIX + name, about, labels=labels)
    for values, value in samples.items() if isinstance(samples, Mapping) else [((), samples)]:
        family.add_metric(values, value)
    return family


def histogram(name: str, about: str, samples: Histogram | Mapping[Labels, Histogram], labels: Labels = ()) -> Metric:
    """Like `gauge`."""
    family = HistogramMetricFamily(PREFIX + name, about, labels=labels)
    for values, observed in samples.items() if isinstance(samples, Mapping) else [((), samples)]:
        family.add_metric(values, *observed.read())
    return family


# --- parts of statuses ---------------------------------------------------------------------------------------------------------------


def engine_families(engine: common_pb2.EngineStatus) -> Iterator[Metric]:
    """An engine's load and what it has done."""
    yield gauge("num_requests_running", "Requests that the engine works on.", engine.running)
    yield gauge("num_requests_waiting", "Requests that wait for the engine.", engine.waiting)
    yield gauge("decode_slots", "Requests that can decode together.", engine.decode_slots)
    yield gauge("num_requests_waiting_to_decode", "Requests whose KV is there and that wait for a slot.", engine.decode_waiting)
    used = 1.0 - engine.pages_free / engine.pages_total if engine.pages_total else 0.0
    yield gauge("kv_cache_usage_perc", "Share of pages in use; 1 is all of them.", used)
    yield gauge("kv_pages", "Pages of the pool.", engine.pages_total)
    yield gauge("kv_pages_free", "Pages that are free.", engine.pages_free)
    yield gauge("state_slots", "Slots of windows and states.", engine.state_slots_total)
    yield gauge("state_slots_free", "Slots that are free.", engine.state_slots_free)
    yield gauge("prefill_instances", "Prefill instances that take work.", len(engine.instances))
    yield counter("engine_tokens_prefilled", "Prompt tokens that the engine has computed.", engine.tokens_prefilled)
    yield counter("engine_tokens_decoded", "Tokens that the engine has generated.", engine.tokens_decoded)
    yield counter("local_prefills", "Prompts computed in a decode server's engine.", engine.local_prefills)
    yield counter("compiles_after_warmup", "Programs compiled while serving.", engine.compiles_after_warmup)


def server_families(status: prefill_pb2.PrefillStatus | generation_pb2.GenerationStatus) -> Iterator[Metric]:
    """What every server says of itself."""
    yield gauge("streams", "Calls being served.", status.streams)
    yield gauge("draining", "1 while the server shuts down.", status.draining)
    yield gauge("standby", "1 while it has another role.", status.standby)


def link_families(links: Iterable[generation_pb2.Link]) -> Iterator[Metric]:
    """The links from prefill servers as they are measured now, those that are; and what is to come over each."""
    rows = {(link.prefill_address,): link for link in list(links)[:MAX_VALUES]}
    measured = {labels: link for labels, link in rows.items() if link.bytes_per_s or link.rtt_s}
    for make, name, field, about in (
        (gauge, "link_bytes_per_second", "bytes_per_s", "What the link carries when it is given all that it takes."),
        (gauge, "link_goodput_bytes_per_second", "goodput_bytes_per_s", "What came over it during the last second."),
        (gauge, "link_spare_bytes_per_second", "spare_bytes_per_s", "What it could have carried besides."),
        (gauge, "link_rtt_seconds", "rtt_s", "Smallest round trip of the last half minute."),
        (gauge, "link_rate_age_seconds", "age_s", "Since the rate was measured."),
        (counter, "link_stalls", "stalls", "Pauses in the middle of a backlog."),
        (counter, "link_stalled_seconds", "stalled_s", "Seconds of those pauses."),
    ):
        yield make(name, about, {labels: getattr(link, field) for labels, link in measured.items()}, ("prefill_address",))
    for name, field, about in (
        ("link_requests_pending", "pending", "Requests whose KV is to come."),
        ("link_bytes_pending", "pending_bytes", "Bytes of KV that are to come."),
    ):
        yield gauge(name, about, {labels: getattr(link, field) for labels, link in rows.items()}, ("prefill_address",))


def backend_families(backends: Iterable[generation_pb2.Backend]) -> Iterator[Metric]:
    """The servers behind a router."""
    rows: dict[Labels, generation_pb2.Backend] = {(backend.role, backend.cluster, backend.address): backend for backend in backends}
    labels = ("role", "cluster", "address")
    healthy = {values: float(backend.healthy) for values, backend in rows.items()}
    breakers = {values: _BREAKER[backend.breaker] for values, backend in rows.items() if backend.breaker in _BREAKER}
    count: dict[Labels, float] = {}
    for (role, *_), value in healthy.items():
        count[role,] = count.get((role,), 0.0) + value
    yield gauge("backend_healthy", "1 for a server that answers and takes requests.", healthy, labels)
    yield gauge("backends_healthy", "Servers that answer and take requests.", count, ("role",))
    yield gauge("breaker_state", "Of decode servers: 0 closed, 1 half-open, 2 open.", breakers, labels)


def way_families(ways: Iterable[generation_pb2.Way]) -> Iterator[Metric]:
    """The ways from regions to prefill servers."""
    states: dict[Labels, float] = {(way.region, way.prefill_address): _BREAKER[way.breaker] for way in list(ways)[:MAX_VALUES]}
    yield gauge("way_breaker_state", "0 closed, 1 half-open, 2 open.", states, ("region", "prefill_address"))


def by_kind(counts: Mapping[str, int], names: int) -> dict[Labels, float]:
    """Counts whose keys are `names` labels, joined by ": ", of which the last one may be followed by details."""
    summed: dict[Labels, list[float]] = {}
    for key, count in counts.items():
        values = [*key.split(": "), ""][:names] if names > 1 else [key]
        bounded(summed, tuple(map(kind, values)), lambda: [0.0])[0] += count
    return {labels: total for labels, (total,) in summed.items()}

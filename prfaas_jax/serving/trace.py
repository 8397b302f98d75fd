"""A timeline of requests across both sites, from their usages, for ui.perfetto.dev: a process per site, arrows along each request."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.simulation.chrome_trace import US, write_trace

# In the order in which a request passes them.
_SITES = ("router", "prefill", "link", "")


class Traced(NamedTuple):
    """A request to draw: its name, its usage, and when it reached the router, or the decode server without one, in seconds of any clock."""

    name: str
    usage: generation_pb2.Usage
    start_s: float = 0.0


class _Slice(NamedTuple):
    """A bar on a row of a site; times are microseconds."""

    process: str
    row: str
    name: str
    start: float
    end: float


def write_requests(path: Path, requests: Iterable[Traced]) -> None:
    """Writes the trace of some requests; the clock's zero is the earliest of them. Raises OSError for a path that cannot be written."""
    requests = list(requests)
    zero = min((request.start_s for request in requests), default=0.0)
    write_trace(path, [event for number, request in enumerate(requests) for event in _events(number, request, zero)])


def _events(number: int, request: Traced, zero: float) -> Iterator[dict[str, Any]]:
    usage = request.usage
    about = {name: getattr(usage, name) for name in ("placement", "reason", "prompt_tokens", "output_tokens")}
    passed = []
    for site in _SITES:
        slices = _slices(site, request, zero)
        if not slices:
            continue
        whole = _Slice(slices[0].process, request.name, request.name, min(s.start for s in slices), max(s.end for s in slices))
        # Where another clock had a part, how far it may be off.
        error = {"clock_error_us": usage.clock_error_s * US} if site in ("prefill", "link") else {}
        yield _complete(whole, {**about, **error})
        yield from (_complete(bar, error) for bar in slices)
        # The request has been there first, and comes back to the decode server's admission.
        passed.append(next((bar for bar in slices if bar.name == "admit"), whole))
    yield from _arrows(number, request.name, passed)


def _slices(site: str, request: Traced, zero: float) -> list[_Slice]:
    """A site's bars; those that would overlap on the request's row are put on further ones."""
    usage, process = request.usage, _process(site, request.usage)
    arrived = request.start_s - zero + usage.parts.route
    spans = [span for span in usage.spans if span.site == site]
    if site == "router" and not spans and usage.parts.route > 0:
        spans = [generation_pb2.Span(name="route", start_s=-usage.parts.route, end_s=0.0)]
    rows: list[float] = []  # the end of what is there so far
    slices = []
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        start, end = (round((arrived + at) * US, 3) for at in (span.start_s, span.end_s))
        free = next((i for i, taken in enumerate(rows) if taken <= start), len(rows))
        rows[free:] = [end, *rows[free + 1 :]]
        slices.append(_Slice(process, request.name if free == 0 else f"{request.name} ({free + 1})", span.name, start, end))
    return slices


def _process(site: str, usage: generation_pb2.Usage) -> str:
    """The name of a site's track."""
    prefill = " ".join(filter(None, ("prefill", usage.prefill_cluster, usage.prefill_address)))
    decode = " ".join(filter(None, ("decode", usage.decode_cluster, usage.decode_address)))
    return {"router": "router", "prefill": prefill, "link": f"link {usage.prefill_address} -> {usage.decode_address}", "": decode}[site]


def _complete(bar: _Slice, about: dict[str, Any]) -> dict[str, Any]:
    common = {"pid": bar.process, "tid": bar.row, "ts": bar.start, "dur": round(bar.end - bar.start, 3)}
    return {"name": bar.name, "cat": "request", "ph": "X", **common, "args": about}


def _arrows(number: int, name: str, bars: Sequence[_Slice]) -> Iterator[dict[str, Any]]:
    """From one bar to the next; each end lies within its bar, and no arrow points back in time."""
    if len(bars) < 2:
        return
    at = bars[0].start
    for i, bar in enumerate(bars):
        at = min(max(at, bar.start), bar.end)
        phase = "s" if i == 0 else "f" if i == len(bars) - 1 else "t"
        event = {"name": name, "cat": "flow", "ph": phase, "id": number, "pid": bar.process, "tid": bar.row, "ts": at}
        yield {**event, "bp": "e"} if phase == "f" else event

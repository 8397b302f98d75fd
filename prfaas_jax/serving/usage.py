"""What a request cost: the parts of its TTFT, its timeline, its counters. Usage must not lie, so it checks itself."""

import dataclasses
from collections.abc import Sequence

from prfaas_jax.errors import PrfaasError
from prfaas_jax.serving.proto import generation_pb2

_SUM_SLACK_S = 1e-3


class InvalidRun(PrfaasError):
    """An invariant of the measurement broke: tokens may be fine, but what would be said about them is not. Maps to DATA_LOSS."""


@dataclasses.dataclass
class Marks:
    """When a request passed its milestones, in monotonic seconds of the decode server.

    Attributes:
        arrived: the request was read.
        reserved: its pages were there.
        remote_failed: a remote attempt was given up and the pages were asked for again.
        prefilled: every byte of the cache was in place: verified and ingested, or computed here.
        committed: the block-table row was published.
        first: the first token was handed to the client's stream.
        last: the last one was.
    """

    arrived: float
    reserved: float = 0.0
    remote_failed: float | None = None
    prefilled: float = 0.0
    committed: float = 0.0
    first: float = 0.0
    last: float = 0.0


def ttft_parts(marks: Marks, route_s: float, remote: bool, queue_s: float, prefill_s: float) -> generation_pb2.TtftParts:
    """TTFT as its sum; `queue_s` and `prefill_s` are what the engine that prefilled reported.

    Raises InvalidRun when a part is negative or the sum is not what was measured from end to end.
    """
    begun = marks.reserved if marks.remote_failed is None else marks.remote_failed
    rest = marks.prefilled - begun - queue_s - prefill_s
    parts = generation_pb2.TtftParts(
        route=route_s,
        # What a local prefill takes beyond its two reported parts is hand-over between threads: waiting, not transfer.
        queue=marks.reserved - marks.arrived + queue_s + (0.0 if remote else rest),
        prefill=prefill_s,
        exposed_transfer=(begun - marks.reserved) + (rest if remote else 0.0),
        admit=marks.committed - marks.prefilled,
        first_step=marks.first - marks.committed,
    )
    values = {field.name: value for field, value in parts.ListFields()}
    negative = {name: value for name, value in values.items() if value < -_SUM_SLACK_S}
    ttft = route_s + marks.first - marks.arrived
    if negative or abs(sum(values.values()) - ttft) > _SUM_SLACK_S:
        raise InvalidRun(f"TTFT of {ttft:.6f} s is not the sum of its parts {values}")
    return parts


def span(name: str, marks: Marks, start: float | None, end: float | None) -> list[generation_pb2.Span]:
    """One bar, relative to arrival; none when it did not happen."""
    if start is None or end is None:
        return []
    return [generation_pb2.Span(name=name, start_s=start - marks.arrived, end_s=end - marks.arrived)]


def progress_spans(marks: Marks, begun: float | None, progress: Sequence[tuple[int, float]]) -> list[generation_pb2.Span]:
    """One bar per progress report `(tokens so far, when)`: what was computed between it and the one before."""
    spans, tokens = [], 0
    for upto, at in progress:
        if upto <= tokens:
            continue
        spans += span(f"prefill {tokens}-{upto}", marks, begun, at)
        tokens, begun = upto, at
    return spans

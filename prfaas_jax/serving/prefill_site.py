"""What a prefill server says it did for a request, and when, told by the decode server's clock."""

from collections.abc import Sequence

from prfaas_jax.serving.clock import ClockOffset
from prfaas_jax.serving.proto import generation_pb2

# A usage stays small, whatever a prompt's number of chunks; the queue is one more.
MAX_SPANS = 64
_MAX_CHUNKS = MAX_SPANS // 2 - 1
_MAX_SENT = MAX_SPANS // 2


class PrefillSite:
    """One attempt's record. Everything but `arrived` is called on the event loop, that one by lane threads.

    Attributes:
        clock: of the prefill server, against ours; None before it has accepted.
    """

    def __init__(self) -> None:
        self.clock: ClockOffset | None = None
        self._submitted_s = 0.0
        self._progress: list[tuple[int, float]] = []
        self._ready: dict[int, float] = {}  # last token of segments, exclusive -> when the first of them was handed out
        self._arrived: dict[int, float] = {}  # the same -> when the last block of them was here, by our clock

    def accepted(self, clock: ClockOffset, submitted_s: float) -> None:
        """`submitted_s` is when its engine got the prompt, by its clock; what follows is in seconds since then."""
        self.clock, self._submitted_s = clock, submitted_s

    def progressed(self, tokens: int, at_s: float) -> None:
        """The first `tokens` of the prompt were computed: more each time."""
        self._progress.append((tokens, at_s))

    def handed_out(self, stop: int, ready_s: float) -> None:
        """A segment whose tokens end before `stop` was."""
        self._ready[stop] = min(ready_s, self._ready.get(stop, ready_s))

    def arrived(self, stop: int, now: float) -> None:
        """A verified block whose tokens end before `stop` is here."""
        self._arrived[stop] = now

    def spans(self, origin: float, prompt_tokens: int, queue_s: float, prefill_s: float) -> list[generation_pb2.Span]:
        """At most MAX_SPANS bars, in seconds since `origin` of our clock: the queue and chunks of "prefill", the way over the "link".

        `queue_s` and `prefill_s` are what that engine reported at the end. Neighbours are told as one where there are too many.
        """
        assert self.clock is not None
        base = self.clock.here(self._submitted_s) - origin
        chunks, tokens, begun = [], 0, queue_s
        # The last chunk ends with the prefill: its own report comes after its segments.
        reports = [report for report in self._progress if report[0] < prompt_tokens]
        for upto, at in (*reports, (prompt_tokens, queue_s + prefill_s)):
            chunks.append((tokens, upto, base + begun, base + max(begun, at)))
            tokens, begun = upto, max(begun, at)
        sent, tokens = [], 0
        for stop in sorted(self._ready.keys() & self._arrived.keys()):
            end = self._arrived[stop] - origin
            # One end is by the other clock: its error must not turn the bar around.
            sent.append((tokens, stop, min(base + self._ready[stop], end), end))
            tokens = stop
        queue = generation_pb2.Span(name="queue", start_s=base, end_s=base + queue_s, site="prefill")
        return [queue, *_bars("prefill", "prefill", chunks, _MAX_CHUNKS), *_bars("transfer", "link", sent, _MAX_SENT)]


def _bars(name: str, site: str, ranges: Sequence[tuple[int, int, float, float]], most: int) -> list[generation_pb2.Span]:
    """One bar per (first token, last one exclusive, start, end), or per equally many neighbours of them."""
    bars, size = [], -(-len(ranges) // most) or 1
    for group in (ranges[i : i + size] for i in range(0, len(ranges), size)):
        start, end = min(start for *_, start, _ in group), max(end for *_, end in group)
        bars.append(generation_pb2.Span(name=f"{name} {group[0][0]}-{group[-1][1]}", start_s=start, end_s=end, site=site))
    return bars

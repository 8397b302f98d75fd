"""How much of a transfer the computation cannot hide: a bound to hold a measurement against."""

from collections.abc import Iterable


def exposed_bound_s(segments: Iterable[tuple[float, int]], computed_s: float, bytes_per_s: float) -> float:
    """Seconds from the end of the computation to the last byte, were the link never idle while anything is ready.

    A serial line: c_i = max(c_{i-1}, r_i) + s_i / R over segments in the order in which they became ready.

    Args:
        segments: (when it was ready, its bytes on the wire), seconds of one clock.
        computed_s: when the computation ended, by that clock.
        bytes_per_s: the link's rate.
    """
    sent = 0.0
    for ready_s, nbytes in sorted(segments):
        sent = max(sent, ready_s) + nbytes / bytes_per_s
    return max(0.0, sent - computed_s)

"""What a link can carry, measured from what arrives over it: rate, round trip, stalls, spare capacity."""

import collections
import dataclasses
from collections.abc import Sequence

# A step of the link's rate is seen once this much time has passed: older arrivals do not count, unless there are no others.
_MEMORY_S = 1.0
_KEEP = 2
# Waiting for less than this after the last arrival says nothing yet.
_PATIENCE_S = 0.05
_STALL_S = 0.25
_STALL_RTTS = 4.0
_RTT_MEMORY_S = 30.0
_TOGETHER_S = 0.5


@dataclasses.dataclass(frozen=True)
class LinkEstimate:
    """One direction of one peer pair; the fields that `scheduling.view.Links` has are named alike.

    Attributes:
        bytes_per_s: what the link carries when it is given all that it takes; 0 before the first measurement.
        transfer_bytes_per_s: the most that one transfer gets of it: all, since the shortest one goes first.
        rtt_s: smallest round trip of the last half minute, 0 before the first measurement.
        goodput_bytes_per_s: what came over it during the last second.
        spare_bytes_per_s: what it could have carried besides.
        stalls: pauses in the middle of a backlog, each several round trips long.
        stalled_s: seconds of all of them.
        age_s: since the rate was last measured.
    """

    bytes_per_s: float = 0.0
    transfer_bytes_per_s: float = 0.0
    rtt_s: float = 0.0
    goodput_bytes_per_s: float = 0.0
    spare_bytes_per_s: float = 0.0
    stalls: int = 0
    stalled_s: float = 0.0
    age_s: float = float("inf")


def together(estimates: Sequence[LinkEstimate]) -> LinkEstimate:
    """One link that several groups of lanes share, each of which has measured its part.

    Rates that were measured at the same time add up; one that is older was measured when others were idle, and is left out.
    """
    if not estimates:
        return LinkEstimate()
    age = min(e.age_s for e in estimates)
    rate = sum(e.bytes_per_s for e in estimates if e.age_s <= age + _TOGETHER_S)
    goodput = sum(e.goodput_bytes_per_s for e in estimates)
    rtt = min((e.rtt_s for e in estimates if e.rtt_s), default=0.0)
    stalls, stalled = sum(e.stalls for e in estimates), sum(e.stalled_s for e in estimates)
    return LinkEstimate(rate, rate, rtt, goodput, max(0.0, rate - goodput), stalls, stalled, age)


class LinkMeter:
    """Fed with arrivals of all lanes of a peer pair. Not thread safe. `now` are seconds of one monotonic clock.

    A rate is measured only over time in which the sender had more to send: `backlog` of the message that it sent last says so. What one
    lane brings may have left before what another has brought already: it knows less of what follows, but was on its way all the time.
    """

    def __init__(self) -> None:
        self._busy: collections.deque[tuple[float, int, float]] = collections.deque()  # arrival, bytes, seconds that they took
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._rtts: collections.deque[tuple[float, float]] = collections.deque()
        self._last: float | None = None
        self._backlog = False
        self._order: int | None = None
        self._stalls, self._stalled_s = 0, 0.0

    def arrived(self, now: float, nbytes: int, backlog: bool, order: int | None = None) -> None:
        """Bytes have come; with `backlog` the next ones come as fast as the link allows. `order` is the sender's, modulo 2^32."""
        overtaken = order is not None and self._order is not None and (order - self._order) % 2**32 >= 2**31
        if (self._backlog or overtaken) and self._last is not None:
            took = now - self._last
            self._busy.append((now, nbytes, took))
            if took > max(_STALL_S, _STALL_RTTS * self._rtt(now)):
                self._stalls += 1
                self._stalled_s += took
        self._recent.append((now, nbytes))
        self._last = now
        if order is None:
            self._backlog = backlog  # of a probe
        elif not overtaken:
            self._backlog, self._order = backlog, order
        self._prune(now)

    def interrupted(self) -> None:
        """A connection was lost: the pause until the next arrival is not the link's pace, and a sender that has forgotten counts anew."""
        self._backlog, self._order = False, None

    def round_trip(self, now: float, seconds: float) -> None:
        """A ping came back."""
        while self._rtts and self._rtts[-1][1] >= seconds:
            self._rtts.pop()
        self._rtts.append((now, seconds))

    def estimate(self, now: float) -> LinkEstimate:
        """As of now; a backlog that stays away lowers the rate while it does."""
        self._prune(now)
        nbytes, took = sum(n for _, n, _ in self._busy), sum(s for _, _, s in self._busy)
        if self._busy and self._backlog and self._last is not None and now - self._last > _PATIENCE_S:
            took += now - self._last
        rate = nbytes / took if took > 0 else 0.0
        goodput = sum(n for at, n in self._recent if now - at <= _MEMORY_S) / _MEMORY_S
        age = now - self._busy[-1][0] if self._busy else float("inf")
        spare = max(0.0, rate - goodput)
        return LinkEstimate(rate, rate, self._rtt(now), goodput, spare, self._stalls, self._stalled_s, age)

    def _rtt(self, now: float) -> float:
        while len(self._rtts) > 1 and now - self._rtts[0][0] > _RTT_MEMORY_S:
            self._rtts.popleft()
        return self._rtts[0][1] if self._rtts else 0.0

    def _prune(self, now: float) -> None:
        while len(self._busy) > _KEEP and now - self._busy[0][0] > _MEMORY_S:
            self._busy.popleft()
        while self._recent and now - self._recent[0][0] > _MEMORY_S:
            self._recent.popleft()

"""How much a session may have in flight, and in what pieces: from the sender's side, by what was acknowledged when.

After BBR (Cardwell et al., "BBR: Congestion-Based Congestion Control", 2016): the window is twice the largest delivery rate seen lately
times the smallest round trip, so a link stays full while little queues in front of it, and a short transfer does not wait behind it.
TCP beneath still does its own congestion control; this only bounds what it is given.
"""

import collections
import dataclasses

# Before anything is known of the link.
START_WINDOW_BYTES = 2 << 20
# A window is at least what leaves in so long, or threads that get their turn late would let a LAN run dry; on a link that is faster than
# a busy core it is more, since there the window would else decide the rate that it is made from. And within these sizes.
_NOISE_S = 0.01
_FAST_BYTES_PER_S = 500e6
_MIN_FLOOR_BYTES, _MAX_FLOOR_BYTES = 512 << 10, 32 << 20
# What one reader's grants and a sender's memory have to stand at most: 100 Gbit/s at 20 ms.
MAX_WINDOW_BYTES = 256 << 20
_GAIN = 2.0
_RATE_MEMORY_S = 2.0
# A round trip is measured anew once nothing has been in flight for so long.
_FORGET_RTT_S = 10.0
# Pieces in a window: small enough that a short transfer gets its turn, unless Python's cost per piece rules.
_PIECES = 8
# No piece ends inside an element, nor in the middle of a page.
_ALIGN_BYTES = 4096
MIN_PIECE_BYTES = 64 << 10


@dataclasses.dataclass(frozen=True)
class Sent:
    """What must be remembered of a piece until it is acknowledged; seconds are the clock's.

    Attributes:
        nbytes: of the piece.
        at: when it left.
        delivered: bytes acknowledged by then.
        delivered_at: when the last of these were.
        delivered_sent_at: when the last of these had left.
    """

    nbytes: int
    at: float
    delivered: int
    delivered_at: float
    delivered_sent_at: float


class Flow:
    """Window of one session. Not thread safe; the dispatcher guards it.

    Attributes:
        in_flight: bytes that are not acknowledged.
        window: bytes that may be.
        piece_bytes: bytes of the next piece at most.
    """

    def __init__(self, message_bytes: int):
        """`message_bytes` is the largest piece."""
        self._message_bytes = message_bytes
        self.in_flight = 0
        self._delivered = 0
        self._delivered_at = self._delivered_sent_at = 0.0
        self._rates: collections.deque[tuple[float, float]] = collections.deque()
        self._rtt_s: float | None = None
        self._idle_since = 0.0
        self._measure()

    @property
    def bytes_per_s(self) -> float | None:
        """Largest delivery rate of the last seconds with traffic; None before the first acknowledgement."""
        return self._rates[0][1] if self._rates else None

    def _measure(self) -> None:
        """Makes window and piece of what has been acknowledged."""
        rate = self.bytes_per_s
        self.window = START_WINDOW_BYTES
        if rate is not None and self._rtt_s is not None:
            floor = min(max(rate * _NOISE_S * (1 + rate / _FAST_BYTES_PER_S), _MIN_FLOOR_BYTES), _MAX_FLOOR_BYTES)
            self.window = int(min(max(_GAIN * rate * self._rtt_s, floor), MAX_WINDOW_BYTES))
        # The first one is small: its round trip is taken for the link's.
        wanted = MIN_PIECE_BYTES if rate is None else self.window // _PIECES // _ALIGN_BYTES * _ALIGN_BYTES
        self.piece_bytes = min(self._message_bytes, max(MIN_PIECE_BYTES, wanted))

    def send(self, nbytes: int, now: float) -> Sent:
        """Counts a piece that leaves; what it returns goes to `acknowledge` or `lose`."""
        if not self.in_flight:
            if self._rtt_s is not None and now - self._idle_since > _FORGET_RTT_S:
                self._rtt_s = None
                self._measure()
            self._delivered_at = self._delivered_sent_at = now  # time without traffic is no time that the link needed
        self.in_flight += nbytes
        return Sent(nbytes, now, self._delivered, self._delivered_at, self._delivered_sent_at)

    def acknowledge(self, sent: Sent, now: float) -> None:
        """A piece has arrived."""
        self._leave(sent, now)
        self._delivered += sent.nbytes
        self._delivered_at, self._delivered_sent_at = now, sent.at
        rtt = now - sent.at
        self._rtt_s = rtt if self._rtt_s is None else min(rtt, self._rtt_s)
        # Acknowledgements come in bursts, faster than any link: what left slowly did not arrive fast.
        took = max(now - sent.delivered_at, sent.at - sent.delivered_sent_at)
        if took > 0 and took >= self._rtt_s:
            rate = (self._delivered - sent.delivered) / took
            # A decreasing queue: its head is the largest of the remembered time.
            while self._rates and self._rates[-1][1] <= rate:
                self._rates.pop()
            self._rates.append((now, rate))
            while now - self._rates[0][0] > _RATE_MEMORY_S:
                self._rates.popleft()
        self._measure()

    def lose(self, sent: Sent, now: float) -> None:
        """A piece went down with its connection."""
        self._leave(sent, now)

    def _leave(self, sent: Sent, now: float) -> None:
        self.in_flight -= sent.nbytes
        if not self.in_flight:
            self._idle_since = now

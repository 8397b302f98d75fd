"""Two machines' monotonic clocks: how far apart they are, from one exchange of messages."""

import dataclasses

from prfaas_jax.errors import TransferError

# Clocks may run a little differently: a round trip may seem this much shorter than no time at all.
_DRIFT_S = 1e-3


@dataclasses.dataclass(frozen=True)
class ClockOffset:
    """A peer's clock is `offset_s` ahead of ours, give or take `error_s`: seconds, both."""

    offset_s: float
    error_s: float

    def here(self, there_s: float) -> float:
        """A time of the peer's clock, by ours."""
        return there_s - self.offset_s


def clock_offset(sent_s: float, received_s: float, replied_s: float, got_s: float) -> ClockOffset:
    """As NTP does it: both ways are taken to be equally long; however unequal they are, the error is at most half of both together.

    Args:
        sent_s: when our message left, by our clock.
        received_s: when it was received, by the peer's.
        replied_s: when the answer left, by the peer's.
        got_s: when that was received, by ours.

    Raises TransferError for times that no two clocks of one pace can show.
    """
    held_s = replied_s - received_s
    network_s = got_s - sent_s - held_s
    if held_s < 0 or network_s < -_DRIFT_S:
        raise TransferError(f"the peer says that it held a message for {held_s:.6f} s, of the {got_s - sent_s:.6f} s until its answer came")
    return ClockOffset(((received_s - sent_s) + (replied_s - got_s)) / 2, max(0.0, network_s) / 2)

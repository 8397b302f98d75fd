"""A circuit breaker: a server that failed several times in a row is left alone for a while, then tried with one request."""

import dataclasses
import math

from prfaas_jax.errors import InvalidInput


@dataclasses.dataclass(frozen=True)
class BreakerOptions:
    """When a breaker opens, and for how long.

    Attributes:
        breaker_failures: failures in a row that open it.
        breaker_open_s: it stays open for so long; then one request, at most, tries the server.
        breaker_most_open_s: every try that fails doubles the time, up to this.
    """

    breaker_failures: int = 3
    breaker_open_s: float = 1.0
    breaker_most_open_s: float = 30.0

    def __post_init__(self) -> None:
        if self.breaker_failures < 1:
            raise InvalidInput("breaker_failures", self.breaker_failures, "an integer >= 1")
        if not 0 < self.breaker_open_s <= self.breaker_most_open_s:
            value = (self.breaker_open_s, self.breaker_most_open_s)
            raise InvalidInput("breaker_open_s, breaker_most_open_s", value, "seconds above zero, the first not above the second")


class Breaker:
    """Not thread safe; `now` and `sent`, when the request was sent whose end is told, are seconds of one monotonic clock.

    "closed": requests go through. "open": none does. "half-open": one has gone through to try, and what becomes of it decides. What
    becomes of requests that were sent before it opened says nothing any more: they may end minutes later, well or not.
    """

    def __init__(self, options: BreakerOptions):
        self._options = options
        self._failures = 0
        self._opened_at = -math.inf
        self._open_until: float | None = None  # None: closed
        self._open_s = options.breaker_open_s  # the next time
        self._trying_until: float | None = None

    def state(self, now: float) -> str:
        """closed, open or half-open."""
        if self._open_until is None:
            return "closed"
        return "half-open" if self._trying_until is not None or now >= self._open_until else "open"

    def allows(self, now: float) -> bool:
        """Whether a request may be sent there now."""
        if self._open_until is None:
            return True
        return now >= self._open_until and (self._trying_until is None or now >= self._trying_until)

    def turns_at(self, now: float) -> float:
        """When `allows` changes if nothing is told until then; infinity for never."""
        if self._open_until is None or self.allows(now):
            return math.inf
        return max(self._open_until, self._trying_until or -math.inf)

    def sent(self, now: float) -> bool:
        """A request goes there; whether it is the one that tries, which is to be withdrawn if it says nothing.

        One that never reports back frees the place after a while.
        """
        if self._open_until is None:
            return False
        self._trying_until = now + self._options.breaker_most_open_s
        return True

    def answered(self, sent: float) -> bool:
        """A request that went there goes well so far: others may follow the one that tries, but the next failure opens it again.

        Whether that has closed it, as for `succeeded`; for `failed`, whether that has opened it.
        """
        if self._open_until is None or sent < self._opened_at:
            return False
        self._failures, self._open_until, self._trying_until = self._options.breaker_failures - 1, None, None
        return True

    def succeeded(self, sent: float) -> bool:
        """A request that went there went well."""
        if sent < self._opened_at:
            return False
        closed = self._open_until is not None
        self._failures, self._open_until, self._trying_until = 0, None, None
        self._open_s = self._options.breaker_open_s
        return closed

    def failed(self, now: float, sent: float) -> bool:
        """One did not, and it was the server's, or the way's to it, fault."""
        if sent < self._opened_at:
            return False
        self._failures += 1
        if self._failures < self._options.breaker_failures and self._open_until is None:
            return False
        self._opened_at, self._open_until, self._trying_until = now, now + self._open_s, None
        self._open_s = min(2 * self._open_s, self._options.breaker_most_open_s)
        return True

    def withdrawn(self) -> None:
        """The request that tries ended without saying anything about the server: another one may."""
        self._trying_until = None

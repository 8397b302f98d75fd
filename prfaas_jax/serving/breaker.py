"""A circuit breaker: a server that failed several times in a row is left alone for a while, then tried with one request."""

import dataclasses

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
    """Not thread safe; `now` are seconds of one monotonic clock.

    "closed": requests go through. "open": none does. "half-open": one has gone through to try, and its end decides.
    """

    def __init__(self, options: BreakerOptions):
        self._options = options
        self._failures = 0
        self._open_until: float | None = None  # None: closed
        self._open_s = options.breaker_open_s
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

    def sent(self, now: float) -> bool:
        """A request goes there; whether it is the one that tries, which is to be withdrawn if it says nothing.

        One that never reports back frees the place after a while.
        """
        if self._open_until is None:
            return False
        self._trying_until = now + self._options.breaker_most_open_s
        return True

    def succeeded(self) -> None:
        """A request that went there went well."""
        self._failures, self._open_until, self._trying_until = 0, None, None
        self._open_s = self._options.breaker_open_s

    def failed(self, now: float) -> None:
        """One did not, and it was the server's, or the way's to it, fault."""
        self._failures += 1
        if self._open_until is not None:
            if self._trying_until is None and now < self._open_until:
                return  # it was sent before the breaker opened
            self._open_s = min(2 * self._open_s, self._options.breaker_most_open_s)
        elif self._failures < self._options.breaker_failures:
            return
        self._open_until, self._trying_until = now + self._open_s, None

    def withdrawn(self) -> None:
        """The request that tries ended without saying anything about the server: another one may."""
        self._trying_until = None

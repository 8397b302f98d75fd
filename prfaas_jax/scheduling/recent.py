"""What controllers remember: the mix of the last requests, and what links move in the long run."""

import math
from collections import deque

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.view import ClusterView, Request

# Requests that the mix is known by, and how few tell nothing yet.
WINDOW = 2048
FEWEST = 64
# Rates that differ for no longer are outliers: those of a link that is hardly used come in pairs, too.
_NOTICE_S = 15.0


class RecentMix:
    """The last `WINDOW` requests as a mix: prompt lengths, outputs, and the prefixes that either side held."""

    def __init__(self) -> None:
        self._rows: deque[tuple[int, int, int, int]] = deque(maxlen=WINDOW)
        self.count = 0

    def add(self, request: Request) -> None:
        """Remembers a request; of prefixes the longest on each side."""
        near, far = (x if isinstance(x, int) else int(x.max(initial=0)) for x in (request.cached_decode, request.cached_prefill))
        most = request.tokens - 1
        self._rows.append((request.tokens, request.output_tokens, min(near, most), min(far, most)))
        self.count += 1

    def mix(self, fewest: int = FEWEST) -> Mix | None:
        """None as long as fewer were seen."""
        if len(self._rows) < fewest:
            return None
        tokens, output, near, far = np.array(self._rows, np.float64).T
        return Mix.of(tokens, output, cached_pd=near, cached_prfaas=far)


class LastingRates:
    """What each link moves in the long run: the rate that it keeps, where it does, else its mean over the last `window_s`.

    It keeps one that it has had for `steady_s`, or, where the one before did not last for `window_s`, for twice as long as that one. So a
    change that lasts counts soon, and a link that goes up and down counts as its mean (an exponential one), as does one that is down: an
    outage ends. What differs for less than a quarter of a minute is no change, only no rate to rely on.

    Attributes:
        rates: (prefill, decode) -> bytes/s.
        kept: pairs that have a rate which they keep; those of the others are means.
    """

    def __init__(self, window_s: float, steady_s: float):
        for field, value in (("window_s", window_s), ("steady_s", steady_s)):
            if not value > 0:
                raise InvalidInput(field, value, "seconds above zero")
        self._window_s, self._steady_s = window_s, steady_s
        self._seen_at = -math.inf
        self._means: dict[tuple[str, str], float] = {}
        self._levels: dict[tuple[str, str], _Level] = {}
        self.rates: dict[tuple[str, str], float] = {}
        self.kept: set[tuple[str, str]] = set()

    def add(self, view: ClusterView, now: float) -> None:
        """Takes the links' present rates in; raises InvalidInput for a view without links."""
        share = 1.0 if self._seen_at == -math.inf else 1 - math.exp(-(now - self._seen_at) / self._window_s)
        self._seen_at = now
        for pair, rate in link_rates(view).items():
            before = self._means.get(pair, rate)
            self._means[pair] = before + share * (rate - before)
            level = self._levels.setdefault(pair, _Level(-math.inf, 0.0, rate))
            if level.keeps(rate):
                level.take(rate, share)
            elif level.odd_at is None:
                level.odd_at = now
            elif now - level.odd_at >= _NOTICE_S:
                lasted = level.odd_at - level.since
                level = _Level(level.odd_at, max(self._steady_s, 2 * lasted if lasted < self._window_s else 0.0), rate)
                self._levels[pair] = level
            doubtful = level.odd_at is not None and level.odd_at < now  # one odd rate may be an outlier, two may be a change
            if level.mean and now - level.since >= level.steady_s and not doubtful:
                self.kept.add(pair)
                self.rates[pair] = level.mean
            else:
                self.kept.discard(pair)
                self.rates[pair] = self._means[pair]


class _Level:
    """Rates that differ little from their mean, since some time; it lasts once that is `steady_s` ago.

    Attributes:
        odd_at: when the last rate came, if it differs much.
    """

    # A rate over the mean, or the mean over it: those of a link that does not change, as they are measured, are nearer.
    _WITHIN = 0.7

    def __init__(self, since: float, steady_s: float, rate: float):
        self.since, self.steady_s, self.mean = since, steady_s, rate
        self.odd_at: float | None = None
        self._count = 1

    def keeps(self, rate: float) -> bool:
        return min(self.mean, rate) >= self._WITHIN * max(self.mean, rate)

    def take(self, rate: float, share: float) -> None:
        self.odd_at, self._count = None, self._count + 1
        self.mean += max(share, 1 / self._count) * (rate - self.mean)


def link_rates(view: ClusterView) -> dict[tuple[str, str], float]:
    """(prefill, decode) -> bytes/s by the view; raises InvalidInput for a view without links."""
    if view.links is None:
        raise InvalidInput("view.links", None, "links: this controller follows them")
    return {(p, d): float(view.links.bytes_per_s[i, j]) for i, p in enumerate(view.prefill.names) for j, d in enumerate(view.decode.names)}

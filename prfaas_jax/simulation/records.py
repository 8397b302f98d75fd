"""What a simulation remembers: running sums and histograms of flat size, and, when asked for, a row per request."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64

from prfaas_jax.errors import InvalidInput

# Relative width of a histogram's bins: percentiles are this exact.
RESOLUTION = 1e-3
_LOW, _HIGH = 1e-6, 1e7


class Histogram:
    """Times in logarithmic bins: count, mean (exact) and percentiles (to 0.1 %), in a fixed amount of memory."""

    _LOG_LOW = math.log(_LOW)
    _STEP = math.log1p(RESOLUTION)

    def __init__(self) -> None:
        self._bins = np.zeros(int((math.log(_HIGH) - self._LOG_LOW) / self._STEP) + 2, np.int64)
        self.count = 0
        self.total = 0.0

    def add(self, seconds: Float64[np.ndarray, " n"]) -> None:
        """Counts times >= 0."""
        self.count += len(seconds)
        self.total += float(seconds.sum())
        bins = (np.log(np.maximum(seconds, _LOW)) - self._LOG_LOW) / self._STEP + (seconds > _LOW)
        np.add.at(self._bins, np.minimum(bins.astype(np.int64), len(self._bins) - 1), 1)

    @property
    def mean(self) -> float:
        """Exact; NaN of nothing."""
        return self.total / self.count if self.count else math.nan

    def percentile(self, q: float) -> float:
        """The time that `q` percent do not exceed, to `RESOLUTION`; NaN of nothing."""
        if not 0 <= q <= 100:
            raise InvalidInput("percentile", q, "0..100")
        if not self.count:
            return math.nan
        cumulative = np.cumsum(self._bins)
        i = int(np.searchsorted(cumulative, max(1.0, q / 100 * self.count - 1e-9)))
        return 0.0 if i == 0 else math.exp(self._LOG_LOW + (i - 0.5) * self._STEP)


class Samples:
    """Values over time in a bounded number of rows: when they are full, every second one goes and the period doubles."""

    MOST = 2048

    def __init__(self, period_s: float, read: Callable[[], dict[str, float]]):
        self.period_s = period_s
        self.rows: list[dict[str, Any]] = []
        self._read = read

    def take(self, now: float) -> None:
        """Adds a row."""
        self.rows.append({"time_s": now, **self._read()})
        if len(self.rows) >= self.MOST:
            del self.rows[1::2]
            self.period_s *= 2

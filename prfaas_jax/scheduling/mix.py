"""The request mix that a plan is made for: weighted rows of lengths, sorted so that every threshold's expectations are two lookups."""

import dataclasses
import math
from functools import cached_property
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64, Int64

from prfaas_jax.errors import InvalidInput

# Equal-probability points that stand for a continuous distribution: its mean to 1e-6, its tail quantiles to 1e-4.
POINTS = 1 << 16


@dataclasses.dataclass(frozen=True)
class LogNormalLengths:
    """Lengths whose logarithm is normal (mu, sigma), truncated to [low, high] tokens: the paper's workload."""

    mu: float = 9.90
    sigma: float = 1.00
    low: int = 128
    high: int = 131_072

    def __post_init__(self) -> None:
        if not math.isfinite(self.mu):
            raise InvalidInput("lengths.mu", self.mu, "a finite mean of log(tokens)")
        if not 0 < self.sigma < math.inf:
            raise InvalidInput("lengths.sigma", self.sigma, "a finite deviation of log(tokens) above zero")
        if not 1 <= self.low < self.high:
            raise InvalidInput("lengths.low", self.low, f"1..{self.high - 1}, below lengths.high={self.high}")
        ends = [self._normal.cdf(math.log(x)) for x in (self.low, self.high)]
        if ends[1] - ends[0] < 1e-6:
            raise InvalidInput("lengths.mu", self.mu, f"a distribution with some mass in {self.low}..{self.high} tokens")

    @property
    def _normal(self) -> NormalDist:
        return NormalDist(self.mu, self.sigma)

    def quantiles(self, u: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Lengths at the probabilities `u`, not rounded to whole tokens."""
        from scipy.special import ndtri

        low, high = (self._normal.cdf(math.log(x)) for x in (self.low, self.high))
        lengths = np.exp(self.mu + self.sigma * ndtri(low + np.asarray(u, np.float64) * (high - low)))
        return np.clip(lengths, self.low, self.high)


@dataclasses.dataclass(frozen=True, eq=False)
class Mix:
    """Weighted kinds of requests, ascending by the tokens that have to be computed.

    Attributes:
        tokens: prompt lengths l_total.
        output: tokens generated.
        weight: probabilities, summing to 1.
        cached_pd: prefix that the PD cluster holds, l_pd.
        cached_prfaas: prefix that the PrfaaS cluster holds, l_prfaas.
    """

    tokens: Float64[np.ndarray, " n"]
    output: Float64[np.ndarray, " n"]
    weight: Float64[np.ndarray, " n"]
    cached_pd: Float64[np.ndarray, " n"]
    cached_prfaas: Float64[np.ndarray, " n"]

    @classmethod
    def of(
        cls,
        tokens: Float64[np.ndarray, " n"] | Int64[np.ndarray, " n"],
        output: Float64[np.ndarray, " n"] | Int64[np.ndarray, " n"] | float,
        weight: Float64[np.ndarray, " n"] | None = None,
        cached_pd: Float64[np.ndarray, " n"] | Int64[np.ndarray, " n"] | float = 0.0,
        cached_prfaas: Float64[np.ndarray, " n"] | Int64[np.ndarray, " n"] | float = 0.0,
    ) -> "Mix":
        """Checks, broadcasts, normalises, sorts. Raises InvalidInput on an empty mix, lengths below 1, prefixes as long as the prompt."""
        tokens = np.asarray(tokens, np.float64)
        if tokens.ndim != 1 or not tokens.size:
            raise InvalidInput("mix.tokens", tokens.shape, "a column of at least one length")
        columns = {"output": output, "weight": 1.0 if weight is None else weight, "cached_pd": cached_pd, "cached_prfaas": cached_prfaas}
        rows = {name: np.broadcast_to(np.asarray(column, np.float64), tokens.shape) for name, column in columns.items()}
        for name, column, least in (("tokens", tokens, 1), ("output", rows["output"], 1), ("weight", rows["weight"], 0)):
            if not np.all(np.isfinite(column)) or column.min() < least:
                raise InvalidInput(f"mix.{name}", float(np.min(column)), f"finite numbers >= {least}")
        for name in ("cached_pd", "cached_prfaas"):
            wrong = (rows[name] < 0) | (rows[name] >= tokens)
            if wrong.any():
                raise InvalidInput(f"mix.{name}", float(rows[name][wrong][0]), "prefixes of 0 tokens up to the prompt's length less one")
        total = rows["weight"].sum()
        if not total > 0:
            raise InvalidInput("mix.weight", float(total), "weights of which some are above zero")
        order = np.argsort(tokens - rows["cached_pd"], kind="stable")
        order = order[rows["weight"][order] > 0]
        columns_sorted = {name: column[order] for name, column in rows.items()}
        return cls(
            tokens[order],
            columns_sorted["output"],
            columns_sorted["weight"] / total,
            columns_sorted["cached_pd"],
            columns_sorted["cached_prfaas"],
        )

    @classmethod
    def log_normal(cls, lengths: LogNormalLengths, output_tokens: float, points: int = POINTS) -> "Mix":
        """`points` equally probable lengths of the distribution, one output length, nothing cached."""
        return cls.of(lengths.quantiles((np.arange(points) + 0.5) / points), output_tokens)

    @cached_property
    def uncached(self) -> Float64[np.ndarray, " n"]:
        """Tokens that the PD cluster would compute, ascending: L of the paper, the incremental length where there are prefixes."""
        return self.tokens - self.cached_pd

    @cached_property
    def _below(self) -> Float64[np.ndarray, " n1"]:
        return self.sums(np.ones_like(self.weight))

    def sums(self, values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n1"]:
        """Running sums of weight * value: entry i is E[value; among the i rows of fewest uncached tokens]."""
        return np.concatenate(([0.0], np.cumsum(self.weight * values)))

    def row(self, t: Float64[np.ndarray, " m"] | float) -> Int64[np.ndarray, " m"]:
        """How many rows have at most `t` uncached tokens."""
        return np.searchsorted(self.uncached, t, side="right")

    def p(self, t: Float64[np.ndarray, " m"] | float) -> Float64[np.ndarray, " m"]:
        """P(L > t)."""
        return self._below[-1] - self._below[self.row(t)]

    def mean(self, values: Float64[np.ndarray, " n"]) -> float:
        """E[value]."""
        # Not a dot product: BLAS threads that wait for each other on a busy machine take a hundred times as long.
        return float((self.weight * values).sum())

    def quantile(self, values: Float64[np.ndarray, " n"], q: float) -> float:
        """The smallest value that a share `q` of the requests does not exceed."""
        order = np.argsort(values)
        position = int(np.searchsorted(np.cumsum(self.weight[order]), q - 1e-12))
        return float(values[order][min(position, len(values) - 1)])

    def binned(self, bins: int) -> "Mix":
        """At most `bins` rows of about equal weight, each the mean of neighbours by uncached tokens; means are kept."""
        if len(self.tokens) <= bins:
            return self
        index = np.minimum((self._below[1:] - self.weight / 2) * bins, bins - 1).astype(np.int64)
        weight = np.bincount(index, self.weight, bins)
        kept = weight > 0
        tokens, output, cached_pd, cached_prfaas = (
            np.bincount(index, self.weight * column, bins)[kept] / weight[kept]
            for column in (self.tokens, self.output, self.cached_pd, self.cached_prfaas)
        )
        return Mix.of(tokens, output, weight[kept], cached_pd, cached_prfaas)

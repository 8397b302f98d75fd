"""What one instance (8 GPUs in the paper) can do: prefill and decode times, decode memory, cost. Coefficients or a measured table."""

import bisect
import dataclasses
import functools
import math
from typing import Protocol

import numpy as np
from jaxtyping import Float64

from prfaas_jax.errors import InvalidInput


class PrefillTime(Protocol):
    """T_prefill of one instance. Work adds up along the prompt: T(cached, new) = start_s + growth(cached + new) - growth(cached).

    So tokens over a cached prefix cost more than as many fresh ones (they attend it), and chunks of one prompt cost what it costs whole.
    """

    @property
    def start_s(self) -> float:
        """Seconds that every prompt costs, however short."""
        ...

    @property
    def max_tokens(self) -> int:
        """Longest prompt that the profile covers."""
        ...

    @property
    def pieces(self) -> Float64[np.ndarray, "pieces 4"]:
        """`growth` as rows (a, b, c, d): from a tokens on it is b + (c + d * x) * x, with x the tokens beyond a in units of 10,000."""
        ...

    def growth(self, tokens: float) -> float:
        """Seconds that the first `tokens` tokens of a prompt add to `start_s`."""
        ...

    def growth_of(self, tokens: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """`growth` of an array."""
        ...


def prefill_s(time: PrefillTime, new: float, cached: float = 0) -> float:
    """T_prefill(cached, new) in seconds."""
    return time.start_s + time.growth(cached + new) - time.growth(cached)


def prefill_s_of(
    time: PrefillTime, new: Float64[np.ndarray, " n"], cached: Float64[np.ndarray, " n"] | float = 0.0
) -> Float64[np.ndarray, " n"]:
    """`prefill_s` of arrays."""
    cached = np.broadcast_to(np.asarray(cached, np.float64), np.shape(new))
    return time.start_s + time.growth_of(cached + new) - time.growth_of(cached)


@dataclasses.dataclass(frozen=True)
class FittedPrefill:
    """T(l) = start_s + linear_s * x + quadratic_s * x^2 with x = l / 10,000, up to `max_tokens`.

    The quadratic part is attention, so over a cached prefix it is quadratic_s * (x_total^2 - x_cached^2).
    """

    start_s: float
    linear_s: float
    quadratic_s: float = 0.0
    max_tokens: int = 131_072

    def __post_init__(self) -> None:
        for field in ("start_s", "linear_s", "quadratic_s"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InvalidInput(f"prefill.{field}", getattr(self, field), "finite seconds >= 0")
        if self.start_s + self.linear_s + self.quadratic_s <= 0:
            raise InvalidInput("prefill", self, "some coefficient above zero")
        if self.max_tokens < 1:
            raise InvalidInput("prefill.max_tokens", self.max_tokens, "tokens >= 1")

    @property
    def pieces(self) -> Float64[np.ndarray, "1 4"]:
        """See PrefillTime."""
        return np.array([[0.0, 0.0, self.linear_s, self.quadratic_s]])

    def growth(self, tokens: float) -> float:
        """See PrefillTime."""
        x = tokens * 1e-4
        return (self.linear_s + self.quadratic_s * x) * x

    def growth_of(self, tokens: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """See PrefillTime."""
        x = tokens * 1e-4
        seconds = x * self.quadratic_s
        seconds += self.linear_s
        seconds *= x
        return seconds


@dataclasses.dataclass(frozen=True)
class MeasuredPrefill:
    """T at measured lengths, linear between them; below the first one the first two points' line, but not under zero seconds.

    Attributes:
        tokens: measured prompt lengths, ascending; the last one is `max_tokens`: nothing is extrapolated beyond it.
        seconds: their prefill times, not falling.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 or self.tokens[0] < 1 or any(a >= b for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            raise InvalidInput("prefill.tokens", self.tokens, "two or more ascending lengths >= 1")
        if len(self.seconds) != len(self.tokens) or self.seconds[0] <= 0 or not all(map(math.isfinite, self.seconds)):
            raise InvalidInput("prefill.seconds", self.seconds, f"{len(self.tokens)} finite times above zero, one for each length")
        if any(a > b for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise InvalidInput("prefill.seconds", self.seconds, "times that do not fall as prompts grow")

    @functools.cached_property
    def _table(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The measured points behind the line's start at zero tokens."""
        slope = (self.seconds[1] - self.seconds[0]) / (self.tokens[1] - self.tokens[0])
        return (0, *self.tokens), (max(0.0, self.seconds[0] - slope * self.tokens[0]), *self.seconds)

    @property
    def start_s(self) -> float:
        """See PrefillTime: the first two points' line at zero tokens."""
        return self._table[1][0]

    @property
    def max_tokens(self) -> int:
        """See PrefillTime."""
        return self.tokens[-1]

    @property
    def pieces(self) -> Float64[np.ndarray, "pieces 4"]:
        """See PrefillTime."""
        xs, ys = map(np.array, self._table)
        return np.stack([xs[:-1], ys[:-1] - ys[0], np.diff(ys) / np.diff(xs) * 1e4, np.zeros(len(xs) - 1)], axis=1)

    def growth(self, tokens: float) -> float:
        """See PrefillTime."""
        xs, ys = self._table
        i = min(bisect.bisect_right(xs, tokens), len(xs) - 1)
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (tokens - xs[i - 1]) / (xs[i] - xs[i - 1]) - ys[0]

    def growth_of(self, tokens: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """See PrefillTime."""
        return np.interp(tokens, *self._table) - self.start_s


class DecodeTime(Protocol):
    """Seconds of one decode step."""

    def step_s(self, batch: float, kv_tokens: float) -> float:
        """A step of `batch` requests whose contexts hold `kv_tokens` tokens together."""
        ...


@dataclasses.dataclass(frozen=True)
class FittedDecode:
    """f(batch, KV tokens) = base_s + per_request_s * batch + per_kv_token_s * kv_tokens."""

    base_s: float
    per_request_s: float = 0.0
    per_kv_token_s: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise InvalidInput(f"decode.{field.name}", getattr(self, field.name), "finite seconds >= 0")
        if self.base_s + self.per_request_s <= 0:
            raise InvalidInput("decode", self, "base_s or per_request_s above zero")

    def step_s(self, batch: float, kv_tokens: float) -> float:
        """See DecodeTime."""
        return self.base_s + self.per_request_s * batch + self.per_kv_token_s * kv_tokens


@dataclasses.dataclass(frozen=True)
class MeasuredDecode:
    """Step times at measured batch sizes, linear between them, constant below the first, the last two points' line above the last.

    What the batch's contexts hold is as measured: a table of one context length knows nothing of others.
    """

    batches: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.batches or self.batches[0] < 1 or any(a >= b for a, b in zip(self.batches, self.batches[1:], strict=False)):
            raise InvalidInput("decode.batches", self.batches, "one or more ascending batch sizes >= 1")
        if len(self.seconds) != len(self.batches) or not all(0 < s < math.inf for s in self.seconds):
            raise InvalidInput("decode.seconds", self.seconds, f"{len(self.batches)} finite step times above zero")

    def step_s(self, batch: float, kv_tokens: float) -> float:
        """See DecodeTime."""
        xs, ys = self.batches, self.seconds
        if batch <= xs[0] or len(xs) == 1:
            return ys[0]
        i = min(bisect.bisect_left(xs, batch), len(xs) - 1)
        slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
        return max(ys[i - 1] + slope * (batch - xs[i - 1]), 1e-9)


@dataclasses.dataclass(frozen=True)
class Instance:
    """One instance of some hardware serving some model.

    Attributes:
        name: hardware and model, as tables print it.
        prefill: its prefill times.
        decode: its decode step times; None where it is used for prefill only.
        max_batch: BS_max, requests that decode together.
        kv_memory_bytes: memory for the caches of the requests that decode; infinite where it never binds.
        nic_bytes_per_s: what its hosts can send or receive between clusters; infinite where the link binds first.
        cost_per_hour: in any unit, the same for all instances of a study.
        basis: where the figures come from: "fitted", "measured", or "bound" for a roofline that was compiled and never run.
    """

    name: str
    prefill: PrefillTime
    decode: DecodeTime | None = None
    max_batch: int = 1
    kv_memory_bytes: float = math.inf
    nic_bytes_per_s: float = math.inf
    cost_per_hour: float = 1.0
    basis: str = "fitted"

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise InvalidInput(f"instance {self.name}.max_batch", self.max_batch, "a batch >= 1")
        for field in ("kv_memory_bytes", "nic_bytes_per_s", "cost_per_hour"):
            if not getattr(self, field) > 0:
                raise InvalidInput(f"instance {self.name}.{field}", getattr(self, field), "a number above zero")
        if math.isinf(self.cost_per_hour):
            raise InvalidInput(f"instance {self.name}.cost_per_hour", self.cost_per_hour, "a finite number")
        if self.basis not in ("fitted", "measured", "bound"):
            raise InvalidInput(f"instance {self.name}.basis", self.basis, "fitted, measured or bound")

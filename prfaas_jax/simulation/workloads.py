"""What a simulated cluster is asked to do: arrival processes, independent requests, and sessions whose prompts grow.

A workload is a recipe, not a list: `arrivals(seed)` streams, needs memory only for what is live, and gives the same arrivals each time.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths

# Random numbers drawn at once: one at a time costs ten times as much.
BATCH = 1024

# Paths on which the mean length of a session is computed: exact to about half a percent.
PATHS = 1 << 14


class Arrival(NamedTuple):
    """One request as it reaches the router.

    Attributes:
        time_s: seconds since the workload began, non-decreasing within a workload.
        tokens: prompt length, at least 1.
        output_tokens: tokens to generate, at least 1.
        blocks: ids of the prompt's blocks in order, the last one perhaps partial. An id names the whole prefix up to and including its
            block, so equal ids are equal prefixes; empty where nothing can be shared.
        session: requests of one session have one number; -1 for none.
    """

    time_s: float
    tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    session: int = -1


class Workload(Protocol):
    """Anything that streams arrivals."""

    @property
    def block_tokens(self) -> int:
        """Tokens per block id; 0 where arrivals have no blocks."""
        ...

    @property
    def requests(self) -> int | None:
        """Arrivals after which the workload ends; None for as many as there are."""
        ...

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """Streams the arrivals, the same ones for the same seed. Raises InvalidInput on a negative seed."""
        ...

    def scaled(self, factor: float) -> "Workload":
        """The same workload at `factor` times the request rate. Raises InvalidInput unless the factor is finite and above zero."""
        ...


@dataclasses.dataclass(frozen=True)
class Poisson:
    """Independent arrivals, `rate` per second."""

    rate: float

    def __post_init__(self) -> None:
        require_positive("arrivals", rate=self.rate)

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Arrival times in seconds, without end."""
        return _clock(lambda n: rng.exponential(1 / self.rate, n))


@dataclasses.dataclass(frozen=True)
class GammaArrivals:
    """Gamma-distributed gaps, `rate` per second: `cv` is their deviation over their mean (1 is Poisson, more is burstier)."""

    rate: float
    cv: float

    def __post_init__(self) -> None:
        require_positive("arrivals", rate=self.rate, cv=self.cv)

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Arrival times in seconds, without end."""
        return _clock(lambda n: rng.gamma(self.cv**-2, self.cv**2 / self.rate, n))


@dataclasses.dataclass(frozen=True)
class Bursty:
    """Poisson arrivals that change between two rates, with exponential dwell times; a run begins in its long-run state.

    Attributes:
        rate: long-run mean per second.
        burst_factor: rate inside a burst over the rate outside, at least 1.
        burst_s: mean seconds that a burst lasts.
        quiet_s: mean seconds between bursts.
    """

    rate: float
    burst_factor: float
    burst_s: float
    quiet_s: float

    def __post_init__(self) -> None:
        require_positive("arrivals", rate=self.rate, burst_factor=self.burst_factor, burst_s=self.burst_s, quiet_s=self.quiet_s)
        require(self.burst_factor >= 1, "arrivals.burst_factor", self.burst_factor, "a burst's rate over the quiet rate, at least 1")

    @property
    def quiet_rate(self) -> float:
        """Arrivals per second outside bursts."""
        return self.rate * (self.burst_s + self.quiet_s) / (self.burst_factor * self.burst_s + self.quiet_s)

    @property
    def burst_rate(self) -> float:
        """Arrivals per second inside a burst."""
        return self.burst_factor * self.quiet_rate

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Arrival times in seconds, without end."""
        states = [(self.burst_s, self.burst_rate), (self.quiet_s, self.quiet_rate)]
        if rng.random() * (self.burst_s + self.quiet_s) >= self.burst_s:
            states.reverse()
        now = 0.0
        for dwell_s, rate in itertools.cycle(states):
            end = now + rng.exponential(dwell_s)
            while now < end:
                # A long dwell in pieces, so that memory stays flat.
                stop = min(end, now + BATCH / rate)
                yield from np.sort(rng.uniform(now, stop, rng.poisson(rate * (stop - now)))).tolist()
                now = stop


ArrivalProcess = Poisson | GammaArrivals | Bursty


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Requests that share nothing: the paper's workload.

    Attributes:
        process: when they arrive.
        lengths: prompt lengths, rounded to whole tokens.
        output_tokens: mean tokens generated.
        requests: arrivals after which it ends; None for never.
        output_sigma: deviation of log(output tokens); 0 gives each request the mean. Outputs are at least 1 token.
    """

    process: ArrivalProcess
    lengths: LogNormalLengths
    output_tokens: int
    requests: int | None = None
    output_sigma: float = 0.0

    def __post_init__(self) -> None:
        _check_outputs(self.output_tokens, self.output_sigma)
        check_cap("requests", self.requests)

    @property
    def block_tokens(self) -> int:
        """0: no blocks."""
        return 0

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """As `Workload.arrivals`."""
        clock, lengths, outputs = generators(seed, 3)
        rows = map(
            Arrival,
            self.process.times(clock),
            _batched(lambda n: _lengths(self.lengths, lengths, n)),
            _batched(lambda n: _outputs(self.output_tokens, self.output_sigma, outputs, n)),
        )
        return itertools.islice(rows, self.requests)

    def scaled(self, factor: float) -> "Synthetic":
        """As `Workload.scaled`; dwell times of bursts stay."""
        return dataclasses.replace(self, process=_faster(self.process, factor))


@dataclasses.dataclass(frozen=True)
class Sessions:
    """Conversations or agents, open loop: each prompt is the one before, its output, and new tokens.

    A session's next turn comes `output_tokens * output_token_s` plus a think time after the turn before, however long that one waited.
    It ends after a geometric number of turns, or where the next prompt would pass `max_tokens`. As in the Mooncake traces only full blocks
    are shared: a partial last block has an id that no other request has.

    Attributes:
        process: arrivals of REQUESTS; sessions begin by the same process at its rate over `requests_per_session`.
        first: tokens of a first prompt, without the system prompt.
        added: new tokens of each later turn.
        output_tokens: mean tokens generated per turn.
        mean_turns: turns of a session if `max_tokens` did not end it, at least 1.
        think_s: mean seconds between an answer and the next turn.
        think_sigma: deviation of log(think time); None for exponential think times.
        output_token_s: nominal seconds per output token.
        output_sigma: deviation of log(output tokens); 0 gives each turn the mean.
        max_tokens: longest prompt.
        system_share: share of sessions that begin with a system prompt.
        system_prompts: how many system prompts there are, equally likely.
        system_tokens: length of each.
        block_tokens: tokens per block id.
        requests: arrivals after which it ends; None for never.
        lead_s: sessions have been beginning since that many seconds before the run. What arrived before it is dropped, what is open goes
            on: with several mean durations of a session a run begins at its long-run rate, with 0 at that of first turns alone. A
            simulation's caches begin with the prompts of the lead (`held`): without, all that is open would be computed again at once.
    """

    process: ArrivalProcess
    first: LogNormalLengths
    added: LogNormalLengths
    output_tokens: int
    mean_turns: float
    think_s: float
    think_sigma: float | None = None
    output_token_s: float = 0.025
    output_sigma: float = 0.0
    max_tokens: int = 131_072
    system_share: float = 0.0
    system_prompts: int = 1
    system_tokens: int = 2048
    block_tokens: int = 512
    requests: int | None = None
    lead_s: float = 0.0

    def __post_init__(self) -> None:
        _check_outputs(self.output_tokens, self.output_sigma)
        check_cap("requests", self.requests)
        require(1 <= self.mean_turns < math.inf, "sessions.mean_turns", self.mean_turns, "a finite number of turns, at least 1")
        for name in ("think_s", "output_token_s", "lead_s"):
            require(0 <= getattr(self, name) < math.inf, f"sessions.{name}", getattr(self, name), "finite seconds, at least 0")
        if self.think_sigma is not None:
            require_positive("sessions", think_sigma=self.think_sigma)
        require(0 <= self.system_share <= 1, "sessions.system_share", self.system_share, "a share in 0..1")
        for name in ("system_prompts", "system_tokens", "block_tokens"):
            require_count(f"sessions.{name}", getattr(self, name))
        longest = self.first.high + (self.system_tokens if self.system_share else 0)
        require(self.max_tokens >= longest, "sessions.max_tokens", self.max_tokens, f"room for the longest first prompt, {longest} tokens")

    @cached_property
    def requests_per_session(self) -> float:
        """Mean turns of a session, those that `max_tokens` cuts off counted: turns weighted exactly, lengths on random paths."""
        rng = np.random.default_rng(0)
        tokens = self.first.quantiles((np.arange(PATHS) + 0.5) / PATHS)
        tokens += np.where(rng.random(PATHS) < self.system_share, self.system_tokens, 0)
        mean, reached = 0.0, 1.0
        while reached * len(tokens) > 1e-6 * PATHS:
            mean += reached * len(tokens) / PATHS
            reached *= self._goes_on
            grown = tokens + _outputs(self.output_tokens, self.output_sigma, rng, len(tokens)) + _lengths(self.added, rng, len(tokens))
            tokens = grown[grown <= self.max_tokens]
        return mean

    @property
    def _goes_on(self) -> float:
        return 1 - 1 / self.mean_turns

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """As `Workload.arrivals`."""
        rows = self._merged(generators(seed, 7))
        return itertools.islice(self._settled(rows) if self.lead_s else rows, self.requests)

    def held(self, seed: int) -> Iterator[Arrival]:
        """The last prompt of every session of the lead, oldest first: what prefix caches hold as the run begins."""
        last: dict[int, Arrival] = {}
        for row in itertools.takewhile(lambda row: row.time_s < self.lead_s, self._merged(generators(seed, 7))):
            last.pop(row.session, None)  # so that the order is that of the last prompts
            last[row.session] = row
        return iter(last.values())

    def _settled(self, rows: Iterator[Arrival]) -> Iterator[Arrival]:
        """What arrives after the lead, at times from its end on."""
        for time_s, tokens, output, blocks, session in itertools.dropwhile(lambda row: row.time_s < self.lead_s, rows):
            yield Arrival(time_s - self.lead_s, tokens, output, blocks, session)

    def scaled(self, factor: float) -> "Sessions":
        """As `Workload.scaled`: more sessions, each as it was."""
        return dataclasses.replace(self, process=_faster(self.process, factor))

    def _merged(self, rngs: list[np.random.Generator]) -> Iterator[Arrival]:
        clock, first_rng, added_rng, output_rng, think_rng, turn_rng, system_rng = rngs
        starts = _faster(self.process, 1 / self.requests_per_session).times(clock)
        first = _batched(lambda n: _lengths(self.first, first_rng, n))
        added = _batched(lambda n: _lengths(self.added, added_rng, n))
        outputs = _batched(lambda n: _outputs(self.output_tokens, self.output_sigma, output_rng, n))
        thinks = _batched(lambda n: self._thinks(think_rng, n))
        turns = _batched(lambda n: turn_rng.random(n) < self._goes_on)
        systems = _batched(lambda n: self._systems(system_rng, n))

        size = self.block_tokens
        system_blocks = self.system_tokens // size
        fresh = self.system_prompts * system_blocks
        # The next turn of every open session: time, number, prompt, ids of the full blocks that the prompt shares.
        waiting: list[tuple[float, int, int, tuple[int, ...]]] = []
        start, started = next(starts), 0
        while True:
            if waiting and waiting[0][0] <= start:
                time_s, number, tokens, shared = heapq.heappop(waiting)
            else:
                time_s, number, tokens, shared = start, started, next(first), ()
                start, started = next(starts), started + 1
                if (system := next(systems)) >= 0:
                    tokens += self.system_tokens
                    shared = tuple(range(system * system_blocks, (system + 1) * system_blocks))
            end = fresh + -(-tokens // size) - len(shared)
            blocks, fresh = shared + tuple(range(fresh, end)), end
            output = next(outputs)
            yield Arrival(time_s, tokens, output, blocks, number)
            grown = tokens + output + next(added)
            if next(turns) and grown <= self.max_tokens:
                heapq.heappush(waiting, (time_s + output * self.output_token_s + next(thinks), number, grown, blocks[: tokens // size]))

    def _thinks(self, rng: np.random.Generator, n: int) -> Float64[np.ndarray, " n"]:
        if self.think_sigma is None:
            return rng.exponential(self.think_s, n)
        return self.think_s * _unit_log_normal(self.think_sigma, rng, n)

    def _systems(self, rng: np.random.Generator, n: int) -> Int64[np.ndarray, " n"]:
        """Which system prompt a session begins with; -1 for none."""
        return np.where(rng.random(n) < self.system_share, rng.integers(self.system_prompts, size=n), -1)


def require(holds: bool, field: str, value: object, expected: str) -> None:
    """Raises InvalidInput unless `holds`."""
    if not holds:
        raise InvalidInput(field, value, expected)


def require_positive(owner: str, **values: float) -> None:
    """Raises InvalidInput on the first value that is not finite and above zero."""
    for name, value in values.items():
        require(0 < value < math.inf, f"{owner}.{name}", value, "a finite number above zero")


def require_count(field: str, value: int) -> None:
    """Raises InvalidInput unless `value` is a whole number of at least 1."""
    require(isinstance(value, int) and value >= 1, field, value, "a whole number, at least 1")


def check_cap(field: str, value: int | None) -> None:
    """Raises InvalidInput unless `value` is None or a whole number of at least 1."""
    if value is not None:
        require_count(field, value)


def generators(seed: int, count: int) -> list[np.random.Generator]:
    """`count` independent generators of one seed, so that what one draws does not move the others. Raises InvalidInput below 0."""
    require(isinstance(seed, int) and seed >= 0, "seed", seed, "a whole number, at least 0")
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count)]


def _check_outputs(mean: int, sigma: float) -> None:
    require_count("output_tokens", mean)
    require(0 <= sigma < math.inf, "output_sigma", sigma, "a finite deviation of log(tokens), at least 0")


def _faster(process: ArrivalProcess, factor: float) -> ArrivalProcess:
    require_positive("scaled", factor=factor)
    return dataclasses.replace(process, rate=process.rate * factor)


def _clock(gaps: Callable[[int], Float64[np.ndarray, " n"]]) -> Iterator[float]:
    """Times from batches of gaps."""
    now = 0.0
    while True:
        times = now + np.cumsum(gaps(BATCH))
        yield from times.tolist()
        now = times[-1]


def _batched(draw: Callable[[int], Shaped[np.ndarray, " n"]]) -> Iterator:
    """The numbers that `draw(n)` gives, one by one."""
    while True:
        yield from draw(BATCH).tolist()


def _lengths(lengths: LogNormalLengths, rng: np.random.Generator, n: int) -> Int64[np.ndarray, " n"]:
    return np.rint(lengths.quantiles(rng.random(n))).astype(np.int64)


def _outputs(mean: int, sigma: float, rng: np.random.Generator, n: int) -> Int64[np.ndarray, " n"]:
    return np.maximum(np.rint(mean * _unit_log_normal(sigma, rng, n)), 1).astype(np.int64)


def _unit_log_normal(sigma: float, rng: np.random.Generator, n: int) -> Float64[np.ndarray, " n"]:
    """Log-normal with mean 1."""
    return rng.lognormal(-(sigma**2) / 2, sigma, n)

"""What a replay sends and what it saw: a script of requests, the prompts that they stand for, and a row for each.

Times and tokens of a script are the model's; those of a row too (wall seconds times the scale). Prompts are not scaled. An output of n
live tokens is played as 1 + token_scale * (n - 1) tokens of the model, the first being prefill's, so what is simulated beside a live run
has outputs that a live one can have: `as_played`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Int32

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.deployment import Scale
from prfaas_jax.serving.report import PARTS
from prfaas_jax.simulation.workloads import Arrival, Workload

# Blocks of tokens that are remembered: prefixes come back soon.
_BLOCKS = 4096


class Ask(msgspec.Struct, frozen=True):
    """One request: `number` counts from 0, `time_s` is model seconds since the replay began, `new_tokens` are live ones."""

    number: int
    time_s: float
    tokens: int
    new_tokens: int
    blocks: tuple[int, ...] = ()
    tenant: str = ""


class Script(msgspec.Struct, frozen=True):
    """All that a load generator needs.

    Attributes:
        routers: host:port of each.
        asks: by time.
        seed: of the prompts.
        vocab_size: token ids are below it.
        time_scale: model seconds per wall second.
        block_tokens: tokens per block id; 0 where asks have none.
        check: whether the tokens must be those that a profiled engine draws.
        recheck: so many requests are asked once more when all is over, one at a time, and must bring the same tokens.
        timeout_s: wall seconds that a request may take.
        late_s: wall seconds that the 99th percentile of requests may be sent late, or the replay is invalid.
        security: fields of transfer.security.Security.
    """

    routers: tuple[str, ...]
    asks: tuple[Ask, ...]
    seed: int
    vocab_size: int
    time_scale: float = 1.0
    block_tokens: int = 0
    check: bool = False
    recheck: int = 0
    timeout_s: float = 600.0
    late_s: float = 0.1
    security: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if not self.asks:
            raise InvalidInput("asks", (), "at least one request")
        if self.vocab_size < 1:
            raise InvalidInput("vocab_size", self.vocab_size, "an integer >= 1")
        if any(later.time_s < ask.time_s for ask, later in itertools.pairwise(self.asks)):
            raise InvalidInput("asks", "times that descend", "requests by time")


class Row(msgspec.Struct):
    """What came of a request. Seconds are the model's, since the replay began; `first_s` and `done_s` are None where there was none.

    TTFT counts from `arrival_s`, when it was due, although it was sent at `sent_s`. `parts` are the six of `Usage.parts`. Bytes of KV
    are those of the live cache. `error` is the name of a gRPC status, empty for a request that is done; `wrong`: its tokens are.
    """

    number: int
    tenant: str
    tokens: int
    new_tokens: int
    arrival_s: float
    sent_s: float = 0.0
    first_s: float | None = None
    done_s: float | None = None
    received: int = 0
    placement: str = ""
    prefill: str = ""
    decode: str = ""
    reason: str = ""
    parts: dict[str, float] = {}
    kv_moved: int = 0
    kv_skipped: int = 0
    kv_resent: int = 0
    kv_expected: int = 0
    recomputed: int = 0
    fallbacks: int = 0
    resumes: int = 0
    attempts: int = 0
    returns: int = 0
    error: str = ""
    wrong: bool = False

    @property
    def done(self) -> bool:
        """Whether it was answered whole."""
        return not self.error and self.first_s is not None and self.done_s is not None

    @property
    def ttft_s(self) -> float:
        """From when it was due to its first token; of a request that is done."""
        assert self.first_s is not None  # it is done
        return self.first_s - self.arrival_s

    def flat(self) -> dict[str, Any]:
        """A line of requests.csv."""
        row = msgspec.structs.asdict(self)
        parts: Mapping[str, float] = row.pop("parts")
        row |= {f"{name}_s": parts.get(name) for name in PARTS}
        return row | {"ttft_s": self.ttft_s if self.done else None}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A workload of arrivals that are known, for simulations of what was played; the seed changes nothing."""

    recorded: tuple[Arrival, ...]
    block_tokens: int = 0

    @property
    def requests(self) -> int:
        """All of them."""
        return len(self.recorded)

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """As `Workload.arrivals`."""
        return iter(self.recorded)

    def filling(self, seconds: float) -> "Recorded":
        """Those that arrive up to a moment, played again from the start as often as that takes."""
        rows = self.recorded
        lap_s = rows[-1].time_s * (1 + 1 / len(rows))  # and the mean gap to the first of the next
        laps = 1 + int(seconds / lap_s) if lap_s else 1
        again = (a._replace(time_s=a.time_s + lap * lap_s) for lap in range(laps) for a in rows)
        return dataclasses.replace(self, recorded=tuple(a for a in again if a.time_s <= seconds))

    def scaled(self, factor: float) -> "Recorded":
        """As `Workload.scaled`."""
        if not factor > 0:
            raise InvalidInput("scaled", factor, "a number above zero")
        return dataclasses.replace(self, recorded=tuple(a._replace(time_s=a.time_s / factor) for a in self.recorded))

    def late(self, up_to_s: float, seed: int) -> "Recorded":
        """Each arrival later by a time of its own, drawn evenly, so some change places."""
        if not 0 <= up_to_s < math.inf:
            raise InvalidInput("up_to_s", up_to_s, "seconds >= 0")
        delays = np.random.default_rng(seed).uniform(0, up_to_s, self.requests).tolist()
        moved = (a._replace(time_s=a.time_s + delay) for a, delay in zip(self.recorded, delays, strict=True))
        return dataclasses.replace(self, recorded=tuple(sorted(moved, key=lambda a: a.time_s)))


def live_tokens(output_tokens: int, token_scale: int) -> int:
    """Live tokens of a request, at least 1."""
    return 1 + round((output_tokens - 1) / token_scale)


def as_played(workload: Workload, seed: int, requests: int, token_scale: int) -> Recorded:
    """The first `requests` arrivals of a workload, the first at 0 s, with the outputs that are really played."""
    rows = list(itertools.islice(workload.arrivals(seed), requests))
    if not rows:
        raise InvalidInput("workload", "no arrivals", "at least one request")
    begin, scale = rows[0].time_s, Scale(tokens=token_scale)
    outputs = (scale.output_tokens(live_tokens(row.output_tokens, token_scale)) for row in rows)
    played = tuple(row._replace(time_s=row.time_s - begin, output_tokens=output) for row, output in zip(rows, outputs, strict=True))
    return Recorded(played, workload.block_tokens)


def asks_of(recorded: Recorded, token_scale: int, tenant: str = "") -> tuple[Ask, ...]:
    """The requests of a script, for arrivals as they are played."""
    return tuple(
        Ask(i, a.time_s, a.tokens, live_tokens(a.output_tokens, token_scale), tuple(a.blocks), tenant)
        for i, a in enumerate(recorded.recorded)
    )


def prompt_of(script: Script, ask: Ask) -> Int32[np.ndarray, " tokens"]:
    """Token ids of a request's prompt, the same each time: of its number, or of its blocks, so that equal prefixes are equal tokens."""
    if not ask.blocks:
        return np.random.default_rng([script.seed, 0, ask.number]).integers(0, script.vocab_size, ask.tokens, np.int32)
    if not 0 < ask.tokens <= len(ask.blocks) * script.block_tokens:
        raise InvalidInput("ask.blocks", len(ask.blocks), f"blocks of {script.block_tokens} tokens for {ask.tokens} tokens")
    blocks = [_block(script.seed, block, script.block_tokens, script.vocab_size) for block in ask.blocks]
    return np.concatenate(blocks)[: ask.tokens]


@functools.lru_cache(_BLOCKS)
def _block(seed: int, block: int, tokens: int, vocab_size: int) -> Int32[np.ndarray, " tokens"]:
    return np.random.default_rng([seed, 1, block]).integers(0, vocab_size, tokens, np.int32)


def violations(rows: Sequence[Row]) -> list[str]:
    """What makes a run invalid, by requests: bytes that are not accounted for, tokens that were computed twice or are wrong."""
    broken = []
    for row in rows:
        if not row.done:
            continue
        rules = {
            f"{row.kv_moved} + {row.kv_skipped} bytes of KV came, {row.kv_expected} are its cache": (
                row.kv_moved + row.kv_skipped == row.kv_expected
            ),
            f"{row.placement} prefill with {row.kv_expected} bytes of KV": (row.placement == "remote") == (row.kv_expected > 0),
            f"{row.recomputed} tokens were recomputed": row.recomputed == 0,
            f"{row.received} tokens of {row.new_tokens}": row.received == row.new_tokens,
            "its tokens are not those of its prompt": not row.wrong,
        }
        broken += [f"request {row.number}: {rule}" for rule, holds in rules.items() if not holds]
    return broken

"""Which rows the next step takes, and in which bucket: pure functions that engine and simulator share.

Prefill rows advance on an absolute chunk grid: a row never crosses a multiple of `chunk`, so the same prompt is always cut at
the same places, whatever else is in the batch and wherever a cached prefix ends.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from prfaas_jax.errors import InvalidInput

MIN_PREFILL_TOKENS = 64
MIN_DECODE_ROWS = 8

# What a step costs beyond its padded tokens per shard, in tokens: reading the weights once and the dispatch.
STEP_COST = 128

# A started row that has been passed over for this many steps goes before rows that were never served.
PATIENCE = 16


class Waiting(Protocol):
    """What `choose_prefill` reads of a prompt; `PrefillItem` says what it means."""

    @property
    def ticket(self) -> str: ...  # noqa: D102
    @property
    def start(self) -> int: ...  # noqa: D102
    @property
    def length(self) -> int: ...  # noqa: D102
    @property
    def shard(self) -> int: ...  # noqa: D102
    @property
    def last_step(self) -> int: ...  # noqa: D102
    @property
    def arrival(self) -> int: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class PrefillItem:
    """One prompt that still has tokens to compute.

    Attributes:
        ticket: unique among the items.
        start: tokens already computed (or found in a cache); < length.
        length: prompt length in tokens.
        shard: data shard that owns its pages.
        last_step: number of the step that last served it, -1 when none did.
        arrival: grows with the time of arrival; breaks ties.
    """

    ticket: str
    start: int
    length: int
    shard: int
    last_step: int
    arrival: int


class Bucket(NamedTuple):
    """A compiled step shape: `rows` x `tokens`; rows of shard s are the s-th of `shards` equal row blocks."""

    rows: int
    tokens: int


class PrefillRow(NamedTuple):
    """Row `row` of the bucket computes tokens `[start, start + tokens)` of the ticket's prompt."""

    ticket: str
    row: int
    start: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class PrefillChoice:
    """One prefill step; rows of the bucket that are not named stay empty."""

    bucket: Bucket
    rows: tuple[PrefillRow, ...]


def prefill_buckets(chunk: int, max_rows: int, shards: int = 1) -> tuple[Bucket, ...]:
    """Token sizes 64, 256, 1024 .. below `chunk` and `chunk` itself, each with one row per shard and with `max_rows`; smallest first.

    Raises:
        InvalidInput: `chunk` is no positive multiple of 64, or `max_rows` no positive multiple of `shards`.
    """
    if chunk < MIN_PREFILL_TOKENS or chunk % MIN_PREFILL_TOKENS:
        raise InvalidInput("prefill_chunk", chunk, f"a positive multiple of {MIN_PREFILL_TOKENS}")
    _check_rows("prefill_rows", max_rows, shards, least=1)
    sizes, size = [], MIN_PREFILL_TOKENS
    while size < chunk:
        sizes.append(size)
        size *= 4
    sizes.append(chunk)
    buckets = {Bucket(rows, tokens) for rows in (shards, max_rows) for tokens in sizes}
    return tuple(sorted(buckets, key=_by_size))


def decode_buckets(max_rows: int, shards: int = 1) -> tuple[int, ...]:
    """Row counts 8, 16, 32 .. up to `max_rows`, each rounded up to a multiple of `shards`; ascending.

    Raises:
        InvalidInput: `max_rows` is below 8 or no multiple of `shards`.
    """
    _check_rows("decode_rows", max_rows, shards, least=MIN_DECODE_ROWS)
    sizes, size = {max_rows}, MIN_DECODE_ROWS
    while size < max_rows:
        sizes.add(-(-size // shards) * shards)
        size *= 2
    return tuple(sorted(sizes))


def decode_bucket(rows: int, buckets: Sequence[int]) -> int:
    """The smallest of `buckets` that holds `rows` rows; InvalidInput when none does."""
    fitting = [b for b in buckets if b >= rows]
    if rows < 1 or not fitting:
        raise InvalidInput("decode rows", rows, f"1..{max(buckets)}")
    return min(fitting)


def next_tokens(item: Waiting, chunk: int) -> int:
    """Tokens of the item's next row: up to the next multiple of `chunk`, or to the end of the prompt."""
    return min(chunk - item.start % chunk, item.length - item.start)


def choose_prefill(items: Iterable[Waiting], buckets: Sequence[Bucket], chunk: int, step: int | None = None) -> PrefillChoice:
    """Picks the rows of the next prefill step; the same arguments in any order of `items` give the same step.

    Rows go least recently served first (never served before any other), ties by arrival. Of the buckets that hold the most
    urgent row, each filled in that order with the rows that fit, the step takes the one that saves most against giving every
    one of its rows a step of its own, the smallest at a tie: a long row is padded next to short ones only when that is cheaper.

    The most urgent row is always taken, so a new prompt waits at most one step for each that was new (or overdue) before it.

    Args:
        items: prompts to compute, at least one, each ticket once.
        buckets: from `prefill_buckets(chunk, ...)`; the smallest has one row per shard.
        chunk: the absolute chunk grid, in tokens.
        step: number of the step being planned. When given, a started row waits at most `PATIENCE` steps plus one for each
            started row that has waited longer, however many new prompts come in between; then it is overdue and goes first.

    Raises:
        InvalidInput: no items, a ticket twice, nothing left to compute, an unknown shard, or buckets that do not reach `chunk`.
    """
    items = list(items)
    shards = min(b.rows for b in buckets)
    _check_items(items, buckets, chunk, shards)

    def urgency(item: Waiting) -> tuple[int, int, int, str]:
        started = item.last_step >= 0
        overdue = step is not None and started and step - item.last_step > PATIENCE
        return (0 if overdue else 1, item.last_step, item.arrival, item.ticket)

    if shards == 1 and max(b.rows for b in buckets) == 1:
        # One row per step: the most urgent one, in the smallest bucket that holds it.
        first = min(items, key=urgency)
        taken_tokens = next_tokens(first, chunk)
        return PrefillChoice(_smallest(buckets, 1, taken_tokens), (PrefillRow(first.ticket, 0, first.start, taken_tokens),))

    order = sorted(items, key=urgency)
    tokens = {item.ticket: next_tokens(item, chunk) for item in order}
    alone = {item.ticket: _step_cost(_smallest(buckets, shards, tokens[item.ticket]), shards) for item in order}

    best: tuple[int, Bucket, list[Waiting]] | None = None
    for bucket in sorted(buckets, key=_by_size):
        if bucket.tokens < tokens[order[0].ticket]:
            continue
        taken = _fill(order, tokens, bucket, shards)
        saved = sum(alone[item.ticket] for item in taken) - _step_cost(bucket, shards)
        if best is None or saved > best[0]:
            best = (saved, bucket, taken)
    assert best is not None  # _check_items: the largest bucket holds any row
    _, bucket, taken = best

    used = [0] * shards
    rows = []
    for item in taken:
        row = item.shard * (bucket.rows // shards) + used[item.shard]
        used[item.shard] += 1
        rows.append(PrefillRow(item.ticket, row, item.start, tokens[item.ticket]))
    return PrefillChoice(bucket, tuple(rows))


def _fill(order: Sequence[Waiting], tokens: dict[str, int], bucket: Bucket, shards: int) -> list[Waiting]:
    """The first items in `order` that fit the bucket's tokens and their shard's rows."""
    room = [bucket.rows // shards] * shards
    taken = []
    for item in order:
        if tokens[item.ticket] <= bucket.tokens and room[item.shard]:
            room[item.shard] -= 1
            taken.append(item)
    return taken


def _smallest(buckets: Sequence[Bucket], rows: int, tokens: int) -> Bucket:
    return min((b for b in buckets if b.rows >= rows and b.tokens >= tokens), key=_by_size)


def _step_cost(bucket: Bucket, shards: int) -> int:
    """Padded tokens that one shard computes, plus the fixed part."""
    return bucket.rows // shards * bucket.tokens + STEP_COST


def _by_size(bucket: Bucket) -> tuple[int, int]:
    return (bucket.rows * bucket.tokens, bucket.rows)


def _check_rows(field: str, rows: int, shards: int, least: int) -> None:
    if shards < 1:
        raise InvalidInput("shards", shards, "a positive number of data shards")
    if rows < least or rows % shards:
        raise InvalidInput(field, rows, f"a multiple of the {shards} data shards, at least {least}")


def _check_items(items: Sequence[Waiting], buckets: Sequence[Bucket], chunk: int, shards: int) -> None:
    if not items:
        raise InvalidInput("items", items, "at least one prompt to compute")
    if len({item.ticket for item in items}) != len(items):
        raise InvalidInput("items", sorted(item.ticket for item in items), "every ticket once")
    if max(b.tokens for b in buckets if b.rows == shards) < chunk:
        raise InvalidInput("buckets", tuple(buckets), f"one with {shards} rows and at least chunk={chunk} tokens")
    for item in items:
        if not 0 <= item.start < item.length:
            raise InvalidInput(f"items[{item.ticket}].start", item.start, f"0..{item.length - 1}, so that something is left to compute")
        if not 0 <= item.shard < shards:
            raise InvalidInput(f"items[{item.ticket}].shard", item.shard, f"0..{shards - 1}")

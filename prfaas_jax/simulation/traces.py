"""Recorded workloads: Mooncake JSONL and Azure CSV files, streamed."""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.simulation.workloads import Arrival, Workload, check_cap, generators, require, require_count, require_positive

# Lines in which the tick of a trace is looked for.
TICK_LINES = 1000

# Far from where a float of seconds overflows.
MAX_TIME = 10**18

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

Tokens = Annotated[int, msgspec.Meta(ge=1)]
BlockId = Annotated[int, msgspec.Meta(ge=0)]
SessionId = Annotated[int, msgspec.Meta(ge=-1)] | str | None


class MooncakeLine(msgspec.Struct, gc=False):
    """One line of a Mooncake trace; fields of other names are passed over."""

    timestamp: int | float
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[BlockId, ...]
    session_id: SessionId = None
    chat_id: SessionId = None
    parent_chat_id: Any = msgspec.UNSET


EXPECTED = {
    "timestamp": "a number",
    "input_length": "a whole number of tokens, at least 1",
    "output_length": "a whole number of tokens, at least 1",
    "hash_ids": "whole numbers, at least 0",
    "session_id": "a name, a whole number of at least 0, or -1 for none",
    "chat_id": "a name, a whole number of at least 0, or -1 for none",
}


@dataclasses.dataclass(frozen=True)
class MooncakeTrace:
    """Mooncake JSONL: `timestamp`, `input_length`, `output_length`, `hash_ids`, optionally `session_id` or `chat_id`; plain or .gz.

    Times begin at 0 with the first line. Mooncake's conversation trace is stamped in milliseconds, but its clock ticks every 3 s (all
    timestamps within 3 ms of a multiple) with 10 requests a tick: played as it is, they arrive in volleys that nobody sent. A `chat_id`
    beside a `parent_chat_id` (Bailian traces: `unit_s=1, block_tokens=16`) names a request, not a session, and is left out.

    A part of the file may be played: arrivals `start` up to `stop`, or, with `windows`, one of that many pieces of it, chosen by the seed,
    each `requests` long. They lie evenly from `start` to `stop`, and overlap where they do not fit side by side. Blocks and sessions keep
    the file's ids; times begin at 0 with the part's first arrival.

    Attributes:
        path: the file.
        block_tokens: tokens per hash id, a property of the file.
        rate_scale: the request rate over that of the file; divides the times.
        jitter: spread the arrivals of one tick uniformly inside it, by the seed; their order stays.
        tick_s: seconds of the file per tick; None for the smallest step between the timestamps of the first 1000 lines.
        requests: arrivals after which it ends; None for all.
        repeat: how often the file is played, end to end; None for ever. A repetition has block ids and sessions of its own.
        unit_s: seconds per unit of `timestamp`.
        start: arrivals of the file that are left out before the first.
        stop: arrivals of the file, those left out too, after which it ends; None for all.
        windows: how many windows there are; seed % windows says which one is played. More than 1 need `requests` and `stop`.
    """

    path: str | os.PathLike[str]
    block_tokens: int = 512
    rate_scale: float = 1.0
    jitter: bool = True
    tick_s: float | None = None
    requests: int | None = None
    repeat: int | None = 1
    unit_s: float = 1e-3
    start: int = 0
    stop: int | None = None
    windows: int = 1

    def __post_init__(self) -> None:
        _check_trace(self)
        require_count("trace.block_tokens", self.block_tokens)
        require_positive("trace", unit_s=self.unit_s)
        if self.tick_s is not None:
            require_positive("trace", tick_s=self.tick_s)

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """As `Workload.arrivals`. Raises InvalidInput that names the file and line, at the line."""
        (rng,) = generators(seed, 1)
        tick_s = self._tick_s()
        rows = _repeated(self._rows, self.path, self.repeat, tick_s)
        return _part(self, _jittered(rows, tick_s, rng) if self.jitter else rows, seed)

    def scaled(self, factor: float) -> "MooncakeTrace":
        """As `Workload.scaled`."""
        require_positive("scaled", factor=factor)
        return dataclasses.replace(self, rate_scale=self.rate_scale * factor)

    def _tick_s(self) -> float:
        """Seconds per tick as played; 0 where every line has the same timestamp."""
        if self.tick_s is not None:
            return self.tick_s / self.rate_scale
        times: list[float] = []
        # A bad line is reported when it is played.
        with contextlib.suppress(InvalidInput):
            times.extend(row.time_s for row in itertools.islice(self._rows(), TICK_LINES))
        return min((after - before for before, after in itertools.pairwise(times) if after > before), default=0.0)

    def _rows(self) -> Iterator[Arrival]:
        first: float | None = None
        last: float = -MAX_TIME
        block_tokens, unit_s, rate_scale = self.block_tokens, self.unit_s, self.rate_scale
        decode = msgspec.json.Decoder(MooncakeLine).decode
        for number, line in _lines(self.path):
            try:
                record = decode(line)
            except msgspec.DecodeError as error:
                raise _refused(f"{self.path}:{number}", line, error) from error
            timestamp, tokens, ids = record.timestamp, record.input_length, record.hash_ids
            if not last <= timestamp <= MAX_TIME:
                expected = "a number" if first is None else f"a number, at least the {last} of the line before"
                raise InvalidInput(f"{self.path}:{number} timestamp", timestamp, expected)
            if len(ids) != (blocks := -(-tokens // block_tokens)):
                expected = f"{blocks} ids for input_length={tokens} at block_tokens={block_tokens}"
                raise InvalidInput(f"{self.path}:{number} hash_ids", f"{len(ids)} ids", expected)
            last = timestamp
            first = timestamp if first is None else first
            yield Arrival((timestamp - first) * unit_s / rate_scale, tokens, record.output_length, ids, _session(record))


@dataclasses.dataclass(frozen=True)
class AzureTrace:
    """Azure CSV, plain or .gz: columns TIMESTAMP (a seventh digit of the second is dropped), ContextTokens, GeneratedTokens.

    Times begin at 0 with the first line. Nothing is known of shared prefixes or sessions. Parts and windows are as in MooncakeTrace.

    Attributes:
        path: the file.
        rate_scale: the request rate over that of the file; divides the times.
        requests: arrivals after which it ends; None for all.
        repeat: how often the file is played, end to end; None for ever.
        start: see MooncakeTrace.
        stop: see there.
        windows: see there.
    """

    path: str | os.PathLike[str]
    rate_scale: float = 1.0
    requests: int | None = None
    repeat: int | None = 1
    start: int = 0
    stop: int | None = None
    windows: int = 1

    def __post_init__(self) -> None:
        _check_trace(self)

    @property
    def block_tokens(self) -> int:
        """0: no blocks."""
        return 0

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """As `Workload.arrivals`, the same for every seed of a window. Raises InvalidInput that names the file and line, at the line."""
        generators(seed, 0)
        return _part(self, _repeated(self._rows, self.path, self.repeat, 0.0), seed)

    def scaled(self, factor: float) -> "AzureTrace":
        """As `Workload.scaled`."""
        require_positive("scaled", factor=factor)
        return dataclasses.replace(self, rate_scale=self.rate_scale * factor)

    def _rows(self) -> Iterator[Arrival]:
        lines = _text_lines(self.path)
        where, header = next(lines, (f"{self.path}:1", ""))
        columns = [name.strip() for name in header.split(",")]
        for name in AZURE_COLUMNS:
            if name not in columns:
                raise InvalidInput(where, _short(header), f"a header with the column {name}")
        time_at, tokens_at, output_at = map(columns.index, AZURE_COLUMNS)
        first = last = None
        for where, line in lines:
            cells = line.strip().split(",")
            if len(cells) != len(columns):
                raise InvalidInput(where, _short(line), f"{len(columns)} cells")
            moment = _moment(where, cells[time_at])
            if last is not None and moment < last:
                raise InvalidInput(f"{where} TIMESTAMP", cells[time_at], f"a time not before {last} of the line before")
            last = moment
            first = first or moment
            tokens, output = _count(where, "ContextTokens", cells[tokens_at]), _count(where, "GeneratedTokens", cells[output_at])
            yield Arrival((moment - first).total_seconds() / self.rate_scale, tokens, output)


READERS: dict[str, type[MooncakeTrace] | type[AzureTrace]] = {".jsonl": MooncakeTrace, ".csv": AzureTrace}


def open_workload(path: str | os.PathLike[str], **options: Any) -> Workload:
    """The reader of a trace by its name: .jsonl or .csv, or either with .gz; `options` are the reader's attributes.

    Raises:
        InvalidInput: no such file, another suffix, an option that the reader does not have or refuses.
    """
    reader = READERS.get(Path(os.fspath(path).removesuffix(".gz")).suffix)
    if reader is None:
        raise InvalidInput("trace.path", os.fspath(path), f"a name that ends in {' or '.join(READERS)}, or these with .gz")
    known = [field.name for field in dataclasses.fields(reader)][1:]
    for name, value in options.items():
        require(name in known, f"trace.{name}", value, f"an option of {reader.__name__}: {', '.join(known)}")
    return reader(path, **options)


def _check_trace(trace: MooncakeTrace | AzureTrace) -> None:
    require(Path(trace.path).is_file(), "trace.path", os.fspath(trace.path), "a file that exists")
    require_positive("trace", rate_scale=trace.rate_scale)
    for name in ("requests", "repeat", "stop"):
        check_cap(f"trace.{name}", getattr(trace, name))
    require_count("trace.windows", trace.windows)
    require(isinstance(trace.start, int) and trace.start >= 0, "trace.start", trace.start, "a whole number of arrivals, at least 0")
    if trace.stop is not None:
        room = trace.stop - trace.start
        require(room > 0, "trace.stop", trace.stop, f"an arrival after trace.start={trace.start}")
        require((trace.requests or 0) <= room, "trace.requests", trace.requests, f"at most the {room} arrivals from start to stop")
    if trace.windows > 1:
        require(
            None not in (trace.requests, trace.stop),
            "trace.windows",
            trace.windows,
            "1, or `requests` and `stop`: a window's length and room",
        )


def _part(trace: MooncakeTrace | AzureTrace, rows: Iterator[Arrival], seed: int) -> Iterator[Arrival]:
    """The arrivals of a trace's part or window; InvalidInput where the file ends before it begins, or before `stop`."""
    begin, end = trace.start, trace.stop
    if trace.requests is not None:
        if end is not None and trace.windows > 1:
            begin += seed % trace.windows * (end - begin - trace.requests) // (trace.windows - 1)
        end = begin + trace.requests
    if not begin and trace.stop is None:
        yield from itertools.islice(rows, end)
        return
    zero_s, played = 0.0, begin
    for played, row in enumerate(itertools.islice(rows, begin, end), begin + 1):
        zero_s = row.time_s if played == begin + 1 else zero_s
        yield row._replace(time_s=row.time_s - zero_s)
    require(played > begin, "trace.start", trace.start, "fewer than the arrivals of the file")
    require(trace.stop is None or played == end, "trace.stop", trace.stop, f"at most the {played} arrivals of the file")


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, each with its number; a byte order mark before the first is dropped."""
    path, number = os.fspath(path), 0
    try:
        # Lines of a BufferedReader come without a Python call each, which GzipFile's own do not.
        with open(path, "rb") as file, io.BufferedReader(gzip.open(file)) if path.endswith(".gz") else file as reader:
            for number, line in enumerate(reader, 1):
                if not line.isspace():
                    yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path}:{number + 1}", str(error), "a readable file, gzip if its name ends in .gz") from error


def _text_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """As `_lines`, each with "path:number"."""
    for number, line in _lines(path):
        where = f"{os.fspath(path)}:{number}"
        try:
            yield where, line.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(where, _short(line.decode(errors="replace")), "a line of UTF-8 text") from error


def _repeated(play: Callable[[], Iterator[Arrival]], path: str | os.PathLike[str], repeat: int | None, tick_s: float) -> Iterator[Arrival]:
    """Plays a file again and again, one tick (the mean gap where there is none) after its end, with ids above all those before."""
    start_s, first_block, first_session = 0.0, 0, 0
    if repeat == 1:
        rows = play()
        first = next(rows, None)
        if first is None:
            raise InvalidInput("trace.path", os.fspath(path), "at least one arrival")
        yield first
        yield from rows
        return
    for _ in range(repeat) if repeat else itertools.count():
        played, last_s, blocks_end, sessions_end = 0, start_s, first_block, first_session
        for time_s, tokens, output, blocks, session in play():
            played += 1
            last_s = start_s + time_s
            if blocks:
                blocks = tuple(map(first_block.__add__, blocks)) if first_block else blocks
                blocks_end = max(blocks_end, max(blocks) + 1)
            if session >= 0:
                session += first_session
                sessions_end = max(sessions_end, session + 1)
            yield Arrival(last_s, tokens, output, blocks, session)
        if not played:
            raise InvalidInput("trace.path", os.fspath(path), "at least one arrival")
        gap_s = tick_s or (last_s - start_s) / max(played - 1, 1)
        if not gap_s:
            raise InvalidInput("trace.repeat", repeat, "1 (or a tick_s) for a file whose arrivals have one time")
        start_s, first_block, first_session = last_s + gap_s, blocks_end, sessions_end


def _jittered(rows: Iterator[Arrival], tick_s: float, rng: np.random.Generator) -> Iterator[Arrival]:
    """Spreads the arrivals of one time over a tick, or up to the next time where that is sooner."""
    group: list[Arrival] = []
    for row in itertools.chain(rows, [Arrival(math.inf, 1, 1)]):
        if group and row.time_s > (start := group[0].time_s):
            drawn, width_s = rng.random(len(group)), min(tick_s, row.time_s - start)
            drawn.sort()
            for at, (_, tokens, output, blocks, session) in zip(drawn.tolist(), group, strict=True):
                yield Arrival(start + width_s * at, tokens, output, blocks, session)
            group = []
        group.append(row)


def _session(record: MooncakeLine) -> int:
    """The session of a Mooncake line, -1 for none; names become numbers by their hash."""
    value = record.session_id
    if value is None and record.parent_chat_id is msgspec.UNSET:
        value = record.chat_id
    if value is None:
        return -1
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest()) if isinstance(value, str) else value


def _refused(where: str, line: bytes, error: msgspec.DecodeError) -> InvalidInput:
    """What is wrong with a Mooncake line: the field that the error points to with its value, or the line as a whole."""
    text = line.decode(errors="replace")
    name = re.search(r"at `\$\.(\w+)", str(error))
    if name is None:
        return InvalidInput(where, _short(text), f"one JSON object of a trace ({error})")
    value = json.loads(text)[name[1]]
    return InvalidInput(f"{where} {name[1]}", _short(str(value)) if isinstance(value, list) else value, EXPECTED[name[1]])


def _moment(where: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput(f"{where} TIMESTAMP", text, "a time such as 2023-11-16 18:17:03.9799600") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _count(where: str, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) >= 1):
        raise InvalidInput(f"{where} {name}", text, "a whole number of tokens, at least 1")
    return int(text)


def _short(text: str) -> str:
    return text.strip() if len(text) <= 80 else f"{text.strip()[:80]}..."

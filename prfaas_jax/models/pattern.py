"""A stack of layers as (head, body x repeats, tail), so that compile time follows the pattern and not the depth. No jax here."""

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterator, Sequence

# Pieces that a step is cut into, if there are as many layers: what the last one adds to the cache is about all that no computation hides
# from the network, and each costs a dispatch.
PIECES = 12


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The first `head` layers, then `repeats` times `period` layers that are the same each time, then `tail` layers.

    Head and tail are compiled layer by layer, the body once.
    """

    head: int
    period: int
    repeats: int
    tail: int

    @property
    def num_layers(self) -> int:
        """Layers of the whole stack."""
        return self.head + self.body_layers + self.tail

    @property
    def body_layers(self) -> int:
        """Layers of all repeats."""
        return self.period * self.repeats


def fold(layers: Sequence[Hashable]) -> Pattern:
    """The pattern of fewest separately compiled layers; at a tie the shortest body, then the shortest head.

    Only equality of layers counts. A stack without repetition is all head.
    """
    return _fold(tuple(layers))


@functools.lru_cache(maxsize=256)
def _fold(layers: tuple[Hashable, ...]) -> Pattern:
    total = len(layers)
    kinds = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
    ids = [kinds[layer] for layer in layers]
    best = (total, 0, total, Pattern(total, 0, 0, 0))
    for period in range(1, total // 2 + 1):
        run = 0  # how many layers behind `start` equal the one a period later
        for start in range(total - period - 1, -1, -1):
            run = run + 1 if ids[start] == ids[start + period] else 0
            repeats = run // period + 1
            if repeats < 2:
                continue
            tail = total - start - period * repeats
            found = (start + period + tail, period, start, Pattern(start, period, repeats, tail))
            if found[:3] < best[:3]:
                best = found
    return best[3]


def runs(layers: Sequence[Hashable]) -> tuple[range, ...]:
    """Positions of consecutive equal layers; inside a body each run is compiled once."""
    edges = [i for i in range(len(layers) + 1) if i in (0, len(layers)) or layers[i] != layers[i - 1]]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(edges))


@dataclasses.dataclass(frozen=True)
class Alone:
    """Layers of a pattern's head or tail."""

    layers: range


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Whole repeats of a pattern's body, as many as `count`."""

    count: int


@dataclasses.dataclass(frozen=True)
class RunLayers:
    """Layers of one run of a pattern's body within one repeat: `count` of those of run number `run`."""

    run: int
    count: int


Program = Alone | Repeats | RunLayers


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive layers that are computed together.

    Attributes:
        layers: which of the stack.
        program: what is compiled for them; equal pieces share it, so that compile time does not follow the depth.
        first: where this piece's layers begin for that program: the repeat of the body, or the layer of the run counted over all repeats.
    """

    layers: range
    program: Program
    first: int = 0


def whole(pattern: Pattern) -> tuple[Piece, ...]:
    """Head, body and tail as one piece each, the empty ones left out."""
    tail = pattern.head + pattern.body_layers
    body = Piece(range(pattern.head, tail), Repeats(pattern.repeats))
    pieces = (_alone(0, pattern.head), body, _alone(tail, pattern.num_layers))
    return tuple(piece for piece in pieces if piece.layers)


def cut(pattern: Pattern, body_runs: Sequence[range], pieces: int) -> tuple[Piece, ...]:
    """A stack in at least `pieces` pieces as equal as its repetition allows, each layer by itself where there are not as many layers.

    `body_runs` are the runs of the body's positions, see `runs`.
    """
    most = max(1, pattern.num_layers // pieces)
    tail = pattern.head + pattern.body_layers
    alone = lambda start, stop: [_alone(i, min(i + most, stop)) for i in range(start, stop, most)]  # noqa: E731
    return (*alone(0, pattern.head), *_cut_body(pattern, body_runs, most), *alone(tail, pattern.num_layers))


def _cut_body(pattern: Pattern, body_runs: Sequence[range], most: int) -> Iterator[Piece]:
    """Pieces of at most `most` layers: several repeats, or parts of runs. Their sizes divide, so that each needs one program."""
    head, period = pattern.head, pattern.period
    if 0 < period <= most:
        count = _largest_divisor(pattern.repeats, most // period)
        for first in range(0, pattern.repeats, count):
            yield Piece(range(head + first * period, head + (first + count) * period), Repeats(count), first)
        return
    for repeat in range(pattern.repeats):
        for number, run in enumerate(body_runs):
            count = _largest_divisor(len(run), most)
            for i in range(0, len(run), count):
                start = head + repeat * period + run.start + i
                yield Piece(range(start, start + count), RunLayers(number, count), repeat * len(run) + i)


def _alone(start: int, stop: int) -> Piece:
    return Piece(range(start, stop), Alone(range(start, stop)))


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)

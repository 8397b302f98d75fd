"""A stack of layers as (head, body x repeats, tail), so that compile time follows the pattern and not the depth. No jax here."""

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Sequence

# More segments let states leave earlier; each costs a dispatch.
SEGMENTS = 4


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

    @property
    def segment_repeats(self) -> int:
        """Repeats of the body that run as one program where layers are to leave early: equal parts, `SEGMENTS` of them if there can be."""
        most = max(1, self.repeats // SEGMENTS)
        return max((n for n in range(1, most + 1) if self.repeats % n == 0), default=1)


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

"""Proof that pieces cover a request's cache exactly: no overlap when they come, no gap at the end."""

import bisect

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec


class Intervals:
    """A set of integers as sorted, disjoint, merged half-open ranges; pieces that come in order stay one range."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def overlap(self, start: int, stop: int) -> int:
        """How many integers of [start, stop) are in the set."""
        first = bisect.bisect_right(self._stops, start)
        last = bisect.bisect_left(self._starts, stop)
        return sum(min(stop, self._stops[i]) - max(start, self._starts[i]) for i in range(first, last))

    def add(self, start: int, stop: int) -> None:
        """Adds a range that does not overlap the set."""
        # Ranges that touch on either side are merged into the new one.
        first = bisect.bisect_left(self._stops, start)
        last = bisect.bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def remove(self, start: int, stop: int) -> None:
        """Takes a range out of the set that lies within one of its ranges; raises KeyError otherwise."""
        at = bisect.bisect_right(self._starts, start) - 1
        if at < 0 or self._stops[at] < stop:
            raise KeyError((start, stop))
        ends = (self._starts[at], start), (stop, self._stops[at])
        left = [(a, b) for a, b in ends if a < b]
        self._starts[at : at + 1] = [a for a, _ in left]
        self._stops[at : at + 1] = [b for _, b in left]

    def first_gap(self, start: int, stop: int) -> tuple[int, int] | None:
        """First range of [start, stop) that is missing; None when there is none."""
        at = bisect.bisect_right(self._stops, start)
        if at < len(self._starts) and self._starts[at] <= start:
            start = self._stops[at]
            at += 1
        if start >= stop:
            return None
        return start, min(stop, self._starts[at]) if at < len(self._starts) else stop


class Coverage:
    """Which (group, tensor, layer, token) of what a `length`-token request adds to its prefix some block of all heads has claimed."""

    def __init__(self, spec: CacheSpec, length: int, prefix: int = 0):
        self._kept = [group.cache.kept(length, prefix) for group in spec.groups]
        # One set of tokens per (group, tensor, layer of the group).
        self._tokens = {
            (g, t, layer): Intervals()
            for g, group in enumerate(spec.groups)
            for t in range(len(group.cache.tensors))
            for layer in range(len(group.layers))
        }

    def claim(self, key: SegmentKey) -> None:
        """Claims a checked key's layers and tokens; raises TransferError, and claims nothing, when any of them was claimed before."""
        rows = [self._tokens[key.group, key.tensor, layer] for layer in range(*key.layers)]
        for layer, tokens in enumerate(rows, key.layers[0]):
            if overlap := tokens.overlap(*key.tokens):
                raise TransferError(f"{key} overlaps {overlap} tokens of layer {layer} that another segment carries")
        for tokens in rows:
            tokens.add(*key.tokens)

    def drop(self, key: SegmentKey) -> None:
        """Takes back a claim."""
        for layer in range(*key.layers):
            self._tokens[key.group, key.tensor, layer].remove(*key.tokens)

    def gap(self) -> str | None:
        """Names the first range of tokens that nobody claimed; None when all are."""
        for (group, tensor, layer), tokens in self._tokens.items():
            if missing := tokens.first_gap(*self._kept[group]):
                return f"group {group}, tensor {tensor}, layer {layer}: tokens [{missing[0]}, {missing[1]})"
        return None

"""A segment: one canonical, unsharded-layout slice of a request's cache, the unit that engines export and ingest.

Layout of a segment's bytes: C-contiguous `[layers, tokens, heads, width]` of one tensor of one group, little endian.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import DTYPE_BYTES, CacheGroup, CacheSpec, LayerCache, TensorSpec

# Bytes that a segment of states has at most, if one layer allows: a receiver stages a segment whole, and it keeps to tens of MiB.
STATE_SEGMENT_BYTES = 8 << 20


# How the elements of each dtype lie in host memory: bfloat16 has no buffer protocol, so it leaves and enters as uint16.
CARRIER: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16), "uint8": np.dtype(np.uint8)}


@dataclasses.dataclass(frozen=True, order=True)
class SegmentKey:
    """Where a segment lies in the request's cache. Ranges are half open.

    Attributes:
        group: index into `CacheSpec.groups`.
        tensor: index into the group's tensors.
        layers: range within the group's layers.
        tokens: range of absolute token positions; for a state group `(n - 1, n)`, the state after n tokens.
        heads: range of heads: the exporting device's shard slice.
    """

    group: int
    tensor: int
    layers: tuple[int, int]
    tokens: tuple[int, int]
    heads: tuple[int, int]

    def tensor_spec(self, spec: CacheSpec) -> TensorSpec:
        """The tensor that this key addresses; raises InvalidInput when group or tensor do not exist."""
        if not 0 <= self.group < len(spec.groups):
            raise InvalidInput("segment.group", self.group, f"0..{len(spec.groups) - 1}")
        tensors = spec.groups[self.group].cache.tensors
        if not 0 <= self.tensor < len(tensors):
            raise InvalidInput("segment.tensor", self.tensor, f"0..{len(tensors) - 1}")
        return tensors[self.tensor]

    def all_heads(self, spec: CacheSpec) -> "SegmentKey":
        """The same layers and tokens with every head: what a receiver puts together from the slices of a mesh."""
        heads = (0, self.tensor_spec(spec).heads)
        return self if self.heads == heads else dataclasses.replace(self, heads=heads)

    def shape(self, spec: CacheSpec) -> tuple[int, int, int, int]:
        """`[layers, tokens, heads, width]` of the payload."""
        (a, b), (c, d), (e, f) = self.layers, self.tokens, self.heads
        return b - a, d - c, f - e, self.tensor_spec(spec).width

    def nbytes(self, spec: CacheSpec) -> int:
        """Payload bytes before any codec."""
        (a, b), (c, d), (e, f) = self.layers, self.tokens, self.heads
        tensor = self.tensor_spec(spec)
        return (b - a) * (d - c) * (f - e) * tensor.width * DTYPE_BYTES[tensor.dtype]

    def check(self, spec: CacheSpec, length: int, held: int = 0) -> None:
        """Raises InvalidInput unless every range is non-empty and inside what a `length`-token request adds to its first `held` tokens."""
        tensor, group = self.tensor_spec(spec), spec.groups[self.group]
        for field, (start, stop), (first, limit) in (
            ("layers", self.layers, (0, len(group.layers))),
            ("tokens", self.tokens, group.cache.kept(length, held)),
            ("heads", self.heads, (0, tensor.heads)),
        ):
            if not first <= start < stop <= limit:
                raise InvalidInput(f"segment.{field}", (start, stop), f"a non-empty range inside [{first}, {limit})")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A key and its payload; the view keeps the exporting buffer alive."""

    key: SegmentKey
    payload: memoryview


def aligned_blocks(positions: tuple[int, int], block: int) -> Iterator[tuple[int, int]]:
    """Cuts a range of tokens or layers at absolute multiples of `block`."""
    start, stop = positions
    while start < stop:
        end = min(stop, (start // block + 1) * block)
        yield start, end
        start = end


def kept_part(cache: LayerCache, tokens: tuple[int, int], length: int, held: int = 0) -> tuple[int, int] | None:
    """The part of computed `tokens` that a `length`-token request leaves behind, without what a cache of the first `held` has already.

    None when nothing of them stays.
    """
    first, stop = cache.kept(length, held)
    start, stop = max(tokens[0], first), min(tokens[1], stop)
    return (start, stop) if start < stop else None


def layer_blocks(group: CacheGroup, tensor: int, layers: range | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of a group's layers (None: all) in which a tensor leaves: states by about `STATE_SEGMENT_BYTES`, everything else whole."""
    layers = range(len(group.layers)) if layers is None else layers
    step = len(layers)
    if group.cache.kind == "state":
        step = max(1, min(step, STATE_SEGMENT_BYTES // group.cache.tensors[tensor].token_bytes))
    for first in layers[::step]:
        yield first, min(layers.stop, first + step)

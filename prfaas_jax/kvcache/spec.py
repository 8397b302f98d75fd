"""The byte-exact description of a request's cache: S_kv(l) of the paper, and the layout that pools and wire agree on.

Pure Python: planner, simulator and wire read it without an accelerator stack.
"""

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Protocol

CacheKind = Literal["paged", "window", "state"]

# Bytes per element of every dtype that may appear in a cache; uint8 only in what a lossy codec makes of one (`kvcache/codecs.py`).
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One cached tensor of one layer.

    Attributes:
        name: "k", "v", ...
        heads: size of the axis that a mesh may shard (kv heads).
        width: elements per head and token.
        dtype: a key of `DTYPE_BYTES`.
        shared: every head of a query reads all of it (MLA's latent), so a mesh keeps it whole on every device.
    """

    name: str
    heads: int
    width: int
    dtype: str
    shared: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.heads * self.width * DTYPE_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps per request; equal layers form a group.

    `window` is the number of last tokens kept (kind "window" only); a "state" layer's tensors do not grow with tokens.
    """

    kind: CacheKind
    tensors: tuple[TensorSpec, ...]
    window: int | None = None

    def kept(self, length: int, held: int = 0) -> tuple[int, int]:
        """Token positions [start, stop) kept after `length` tokens: all, the last `window`, or for a state the last one.

        Without those that a cache of the first `held` tokens has already. A state is exact at one length: an earlier one saves nothing.
        """
        match self.kind:
            case "paged":
                return min(held, length), length
            case "window":
                assert self.window is not None
                return max(0, length - self.window, min(held, length)), length
            case "state":
                return (max(0, length - 1) if held < length else length), length


@dataclasses.dataclass(frozen=True)
class CacheGroup:
    """Layers of one kind and one shape; `layers` are absolute layer indices, ascending."""

    cache: LayerCache
    layers: tuple[int, ...]

    def within(self, layers: range) -> range:
        """Indices, into this group's layers, of those among consecutive absolute `layers`."""
        return range(bisect.bisect_left(self.layers, layers.start), bisect.bisect_left(self.layers, layers.stop))

    def bytes(self, tokens: int, held: int = 0) -> int:
        """Canonical bytes of this group for a request of `tokens` tokens, without what a cache of the first `held` has already."""
        start, stop = self.cache.kept(tokens, held)
        return len(self.layers) * (stop - start) * sum(t.token_bytes for t in self.cache.tensors)


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """All groups of a model, in order of first layer. Canonical wire layout per tensor: `[layers, tokens, heads, width]`."""

    groups: tuple[CacheGroup, ...]

    def bytes(self, tokens: int, held: int = 0) -> int:
        """S_kv(l): canonical bytes of a request of `tokens` tokens, before any codec; with `held`, of what they add to the first `held`."""
        return sum(g.bytes(tokens, held) for g in self.groups)

    @property
    def bytes_per_token(self) -> int:
        """Growth of `bytes` per token once every window is full."""
        return sum(g.bytes(1) for g in self.groups if g.cache.kind == "paged")

    @property
    def fixed_bytes(self) -> int:
        """States plus full windows: what even an infinitely short increment ships."""
        return sum(g.bytes(g.cache.window or 1) for g in self.groups if g.cache.kind != "paged")

    def fields(self) -> dict[str, Any]:
        """As plain values, for JSON; `from_fields` makes the same spec of them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "CacheSpec":
        """Of a process of our own: nothing is checked."""
        groups = []
        for group in fields["groups"]:
            cache = group["cache"]
            tensors = tuple(TensorSpec(**tensor) for tensor in cache["tensors"])
            groups.append(CacheGroup(LayerCache(cache["kind"], tensors, cache["window"]), tuple(group["layers"])))
        return cls(tuple(groups))

    def fingerprint(self) -> str:
        """Hex digest of the layout; two sides whose digests differ must not exchange KV."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()[:32]


class Cached(Protocol):
    """Anything that can say what each of its layers caches; `ModelConfig` does."""

    def layer_caches(self) -> tuple[LayerCache, ...]:
        """One entry per layer, first layer first."""
        ...


def cache_spec(model: Cached) -> CacheSpec:
    """Groups a model's layers by what they cache."""
    members: dict[LayerCache, list[int]] = {}
    for layer, cache in enumerate(model.layer_caches()):
        members.setdefault(cache, []).append(layer)
    return CacheSpec(tuple(CacheGroup(cache, tuple(layers)) for cache, layers in members.items()))

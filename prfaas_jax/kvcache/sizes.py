"""How large a request's cache is, model by model, and how much larger a dense model's would be. Pure Python."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import Cached, CacheSpec, LayerCache, TensorSpec, cache_spec

MIB = 2**20

# What nearly every dense model from 1 B to 400 B caches per layer and token (Llama 3, Qwen3): keys and values of 8 heads of 128.
DENSE_KV_HEADS = 8
DENSE_HEAD_DIM = 128


class Sized(Cached, Protocol):
    """Anything with layers, a width and a dtype; `ModelConfig` is."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def dtype(self) -> str:
        """Of the cache: a key of `spec.DTYPE_BYTES`."""
        ...


def is_dense(model: Cached) -> bool:
    """Whether every layer keeps its own keys and values of all tokens."""
    return all(cache.kind == "paged" and not any(t.shared for t in cache.tensors) for cache in model.layer_caches())


def dense_spec(model: Sized) -> CacheSpec:
    """The cache of a dense model of equal width, depth and dtype, to compare with.

    A dense model is that itself. For any other it is grouped-query attention over all tokens in every layer, with 8 kv heads of 128,
    or with as many elements as the model is wide where that is less.
    """
    if is_dense(model):
        return cache_spec(model)
    heads, width = DENSE_KV_HEADS, DENSE_HEAD_DIM
    if model.hidden_size < heads * width:
        heads, width = 1, model.hidden_size
    layer = LayerCache("paged", (TensorSpec("k", heads, width, model.dtype), TensorSpec("v", heads, width, model.dtype)))
    return cache_spec(_Layers((layer,) * len(model.layer_caches())))


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The least that has layers."""

    layers: tuple[LayerCache, ...]

    def layer_caches(self) -> tuple[LayerCache, ...]:
        return self.layers


@dataclasses.dataclass(frozen=True)
class KvSize:
    """The cache of one model beside that of its dense counterpart (`dense_spec`)."""

    name: str
    spec: CacheSpec
    dense: CacheSpec

    def ratio(self, tokens: int) -> float:
        """How many times larger the dense counterpart's cache is at `tokens` tokens."""
        return self.dense.bytes(tokens) / self.spec.bytes(tokens)


def kv_sizes(models: Mapping[str, Sized]) -> list[KvSize]:
    """One entry per model, in the order given."""
    return [KvSize(name, cache_spec(model), dense_spec(model)) for name, model in models.items()]


def check_lengths(lengths: Sequence[int], field: str = "lengths") -> None:
    """Raises InvalidInput naming `field` unless `lengths` are different positive numbers of tokens, at least one."""
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise InvalidInput(field, list(lengths), "one or more different positive numbers of tokens")


def size_rows(sizes: Sequence[KvSize], lengths: Sequence[int]) -> list[dict[str, str | int | float]]:
    """One plain row per model and length, for a csv file. `mib` counts 2**20 bytes; `ratio` is `KvSize.ratio`."""
    return [
        {
            "model": size.name,
            "tokens": tokens,
            "bytes": size.spec.bytes(tokens),
            "mib": size.spec.bytes(tokens) / MIB,
            "dense_bytes": size.dense.bytes(tokens),
            "ratio": size.ratio(tokens),
        }
        for size in sizes
        for tokens in lengths
    ]


def size_table(sizes: Sequence[KvSize], lengths: Sequence[int]) -> str:
    """Aligned text: per model fixed bytes, bytes per token, its dense counterpart's, and S(l) in MiB with `KvSize.ratio` in brackets."""
    rows = [["model", "fixed bytes", "bytes/token", "if dense", *(f"{tokens:,} tokens" for tokens in lengths)]]
    for size in sizes:
        per_token = (size.spec.fixed_bytes, size.spec.bytes_per_token, size.dense.bytes_per_token)
        cells = (f"{size.spec.bytes(tokens) / MIB:,.2f} {f'({size.ratio(tokens):.1f}x)':>7}" for tokens in lengths)
        rows.append([size.name, *(f"{value:,}" for value in per_token), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = [row[0].ljust(widths[0]) for row in rows]
    numbers = ["".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True)) for row in rows]
    return "\n".join(map(str.__add__, names, numbers))

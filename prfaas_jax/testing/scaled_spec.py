"""A small cache that grows with tokens as a large one does, so that a slow link plays a fast one."""

import math
from collections.abc import Mapping

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.segments import STATE_SEGMENT_BYTES
from prfaas_jax.kvcache.spec import DTYPE_BYTES, CacheGroup, CacheKind, CacheSpec, LayerCache, TensorSpec

# Kind, and window if it is one. All groups of a part become one group of one tensor.
_Part = tuple[CacheKind, int | None]

# How far apart the scales of a spec's parts may be, and should be.
_AGREE, _WELL = 0.02, 0.01
# A dtype is kept where whole elements of it come so near; otherwise elements are bytes.
_KEEP = 0.001


def scaled_spec(spec: CacheSpec, byte_scale: float) -> tuple[CacheSpec, float]:
    """A spec of few layers and tensors whose bytes are those of `spec` times a scale, for every length, and that scale.

    The scale is the one next to `byte_scale` that whole bytes per token allow; states, each window and what grows follow it alike, within
    1 % if one of the neighbouring scales allows that, and within 2 % at all. A scale of 1 gives `spec` itself. A codec that changes the
    size of elements does not change these bytes as it changes the real ones.

    Raises:
        InvalidInput: a scale outside (0, 1], or one so small that the parts differ by more.
    """
    if not 0 < byte_scale <= 1:
        raise InvalidInput("byte_scale", byte_scale, "a number in (0, 1]")
    if byte_scale == 1:
        return spec, 1.0
    parts = _parts(spec)
    finest = min(nbytes for nbytes, _ in parts.values())
    if finest * byte_scale < 0.5:
        raise InvalidInput("byte_scale", byte_scale, f"at least {0.5 / finest:.2g}: below it a part of {finest} bytes is gone")
    below = math.floor(finest * byte_scale)
    scales = sorted({max(1, below) / finest, (below + 1) / finest}, key=lambda scale: abs(scale - byte_scale))
    found = [(_scaled(parts, scale), scale) for scale in scales]
    apart = [_apart(parts, small, scale) for small, scale in found]
    best = next((i for i, width in enumerate(apart) if width <= _WELL), apart.index(min(apart)))
    if apart[best] > _AGREE:
        raise InvalidInput("byte_scale", byte_scale, f"one at which states, windows and what grows scale alike, within {_AGREE:.0%}")
    return found[best]


def _parts(spec: CacheSpec) -> dict[_Part, tuple[int, str]]:
    """Bytes of each part, of a token or of all states, and the dtype that most of them have."""
    sizes: dict[_Part, dict[str, int]] = {}
    for group in spec.groups:
        dtypes = sizes.setdefault((group.cache.kind, group.cache.window), {})
        for tensor in group.cache.tensors:
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.token_bytes * len(group.layers)
    return {part: (sum(dtypes.values()), max(dtypes, key=lambda dtype: dtypes[dtype])) for part, dtypes in sizes.items()}


def _scaled(parts: Mapping[_Part, tuple[int, str]], scale: float) -> CacheSpec:
    groups, first = [], 0
    for (kind, window), (real_bytes, dtype) in parts.items():
        wanted = round(real_bytes * scale)
        # A layer's states are one segment, which a receiver stages whole.
        layers = math.ceil(wanted / STATE_SEGMENT_BYTES) if kind == "state" else 1
        width = round(wanted / layers / DTYPE_BYTES[dtype])
        if abs(width * layers * DTYPE_BYTES[dtype] - wanted) > _KEEP * wanted:
            dtype, width = "uint8", round(wanted / layers)
        tensor = TensorSpec(kind, 1, width, dtype, shared=True)
        groups.append(CacheGroup(LayerCache(kind, (tensor,), window), tuple(range(first, first + layers))))
        first += layers
    return CacheSpec(tuple(groups))


def _apart(parts: Mapping[_Part, tuple[int, str]], small: CacheSpec, scale: float) -> float:
    """How far the part that is farthest from the scale is from it, as a share of what it should be."""
    return max(abs(g.bytes(1) / (scale * nbytes) - 1) for g, (nbytes, _) in zip(small.groups, parts.values(), strict=True))

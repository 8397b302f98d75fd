"""How a request's cache may be written for the wire: per cache kind, as it is or in fewer bytes. Sizes and names only.

A codec turns one CacheSpec into another, so whatever moves bytes knows no codecs. The arithmetic runs on the device (`ops/kv_codec.py`).

    none   as cached, bit by bit
    bf16   float32 states rounded to bfloat16
    int8   one signed byte per element and a bfloat16 scale per token and head, behind the head's elements
    fp8    the same with float8_e4m3fn
"""

import dataclasses

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import CacheKind, CacheSpec, TensorSpec

SCALE_BYTES = 2
# What each kind of cache may travel as. A recurrence feeds its state's error back into itself: no byte-sized states.
CODECS: dict[CacheKind, tuple[str, ...]] = {"paged": ("none", "int8", "fp8"), "window": ("none", "int8", "fp8"), "state": ("none", "bf16")}

CODEC_NAMES = tuple(dict.fromkeys(name for names in CODECS.values() for name in names if name != "none"))


@dataclasses.dataclass(frozen=True)
class CacheCodec:
    """One name of `CODECS` per cache kind; the default changes nothing."""

    paged: str = "none"
    window: str = "none"
    state: str = "none"

    def __post_init__(self) -> None:
        for kind, names in CODECS.items():
            if self.of(kind) not in names:
                raise InvalidInput(f"codec.{kind}", self.of(kind), f"one of {names}")

    def of(self, kind: CacheKind) -> str:
        """The name for one kind."""
        name: str = getattr(self, kind)
        return name

    def names(self, spec: CacheSpec) -> frozenset[str]:
        """What it takes to write this cache, besides "none": names that an engine must have programs for."""
        return frozenset(self.of(group.cache.kind) for group in spec.groups) - {"none"}

    @property
    def lossy(self) -> bool:
        """Whether any bit may be lost."""
        return self != CacheCodec()

    @classmethod
    def parse(cls, text: str) -> "CacheCodec":
        """Reads what `str` writes: "none", or kinds and names as in "paged=int8,window=int8,state=bf16"; raises InvalidInput."""
        chosen: dict[str, str] = {}
        for part in text.split(",") if text != "none" else ():
            kind, equals, name = part.partition("=")
            if not equals or kind not in CODECS or kind in chosen:
                raise InvalidInput("codec", text, f"none, or kind=name parts with kinds {tuple(CODECS)} and names as in {CODECS}")
            chosen[kind] = name
        return cls(**chosen)

    def __str__(self) -> str:
        return ",".join(f"{kind}={self.of(kind)}" for kind in CODECS if self.of(kind) != "none") or "none"

    def wire_spec(self, spec: CacheSpec) -> CacheSpec:
        """The cache as this codec writes it: the same groups, layers, tokens and heads, other dtypes and widths."""
        groups = []
        for group in spec.groups:
            name = self.of(group.cache.kind)
            tensors = tuple(encoded(tensor, name) for tensor in group.cache.tensors)
            groups.append(dataclasses.replace(group, cache=dataclasses.replace(group.cache, tensors=tensors)))
        return CacheSpec(tuple(groups))


AS_CACHED = CacheCodec()


def encoded(tensor: TensorSpec, codec: str) -> TensorSpec:
    """A tensor as the codec of one name writes it."""
    match codec:
        case "int8" | "fp8":
            return dataclasses.replace(tensor, dtype="uint8", width=tensor.width + SCALE_BYTES)
        case "bf16":
            return dataclasses.replace(tensor, dtype="bfloat16")
        case _:
            return tensor

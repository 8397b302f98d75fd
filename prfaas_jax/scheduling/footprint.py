"""S_kv(l) as the scheduler needs it: of whole arrays of lengths, and of what is left to send when the receiver holds a prefix."""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import CacheSpec


@dataclasses.dataclass(frozen=True)
class KvFootprint:
    """Bytes of a request's cache, as `CacheSpec.bytes` has them.

    Attributes:
        state_bytes: fixed per request, exact at one length only: sent whole, however long the prefix that the receiver holds.
        bytes_per_token: of the layers that keep every token.
        windows: (tokens kept, bytes per token) of each group that keeps the last tokens only.
    """

    state_bytes: int
    bytes_per_token: int
    windows: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for field in ("state_bytes", "bytes_per_token"):
            if getattr(self, field) < 0:
                raise InvalidInput(f"kv.{field}", getattr(self, field), "a number of bytes >= 0")
        if any(tokens < 1 or size < 0 for tokens, size in self.windows):
            raise InvalidInput("kv.windows", self.windows, "pairs of tokens >= 1 and bytes per token >= 0")

    @classmethod
    def of(cls, spec: CacheSpec) -> "KvFootprint":
        """The footprint of a model's cache."""
        states = sum(g.bytes(1) for g in spec.groups if g.cache.kind == "state")
        windows = tuple((g.cache.window or 1, g.bytes(1)) for g in spec.groups if g.cache.kind == "window")
        return cls(states, spec.bytes_per_token, windows)

    @property
    def packed(self) -> Float64[np.ndarray, " numbers"]:
        """State bytes, bytes per token, then tokens and bytes per token of each window."""
        return np.array([self.state_bytes, self.bytes_per_token, *itertools.chain.from_iterable(self.windows)], np.float64)

    def bytes(self, tokens: float, held: float = 0) -> float:
        """Bytes of a request of `tokens` tokens that a receiver with its first `held` tokens still lacks: S_kv(l) where it has none."""
        size = self.state_bytes + self.bytes_per_token * (tokens - held)
        for kept, per_token in self.windows:
            size += per_token * min(kept, tokens - held)
        return size

    def bytes_of(
        self, tokens: Float64[np.ndarray, " n"] | float, held: Float64[np.ndarray, " n"] | float = 0.0
    ) -> Float64[np.ndarray, " n"]:
        """`bytes` of arrays, at least one of the two."""
        fresh = np.subtract(tokens, held, dtype=np.float64)
        size = fresh * float(self.bytes_per_token)
        size += float(self.state_bytes)
        for kept, per_token in self.windows:
            size += per_token * np.minimum(kept, fresh)
        return size

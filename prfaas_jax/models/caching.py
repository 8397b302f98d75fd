"""What mixers ask of whoever holds the cache. The model knows its mathematics; where keys, latents and states live is the caller's."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int

from prfaas_jax.models.layer_config import AttentionConfig, LatentConfig, Rope
from prfaas_jax.sharding import Sharder

# What a layer adds to the cache, in the order of its group's tensors: new tokens [B, T, heads, width], or a state [B, heads, width].
New = tuple[jax.Array, ...]
# The same of several layers, stacked in front, per cache group; () for a group that has none of these layers.
Added = tuple[New, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer's cache and its stacked weights lie.

    Attributes:
        group: index into `CacheSpec.groups`.
        index: index within the group's layers; traced inside the body's scan.
        layer: absolute layer; traced inside the body's scan.
        in_run: index among the layers that its weights are stacked with, traced; 0 for a layer by itself.
    """

    group: int
    index: Int[Array, ""] | int
    layer: Int[Array, ""] | int
    in_run: Int[Array, ""] | int = 0


class Cache(Protocol):
    """One step's access to the cache. Rows hold `valid[b]` new tokens, padding behind them.

    `carry` threads through the layers what a step must update while it runs; most implementations leave it alone.
    """

    valid: Int[Array, " B"]

    def attend(
        self,
        place: Place,
        config: AttentionConfig,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K Hv"],
        sinks: Float[Array, " N"] | None,
        carry: Any,
    ) -> tuple[Float[Array, "B T N Hv"], Any]:
        """Causal attention over what is cached (all of it, or the window) and over the new tokens."""
        ...

    def attend_latent(
        self,
        place: Place,
        config: LatentConfig,
        q_nope: Float[Array, "B T N Hn"],
        q_rope: Float[Array, "B T N Hr"],
        latent: Float[Array, "B T C"],
        k_up: Float[Array, "N Hn R"],
        v_up: Float[Array, "N Hv R"],
    ) -> Float[Array, "B T N Hv"]:
        """The same over latents, C = R + Hr."""
        ...

    def states(self, place: Place) -> New:
        """State tensors [B, heads, width] as the rows' earlier tokens left them; zeros where there are none."""
        ...


# fn on each device's own shard, array axes given by logical names (sharding.TABLE).
Island = Callable[[Callable, tuple, Any], Callable]


@dataclasses.dataclass(frozen=True)
class Step:
    """What every layer of one forward pass shares.

    Attributes:
        cache: access to the cache.
        shard: the mesh and the table's reading.
        island: runs a function shard by shard.
        rope: cosines and sines per (rotary embedding, rotated dims).
    """

    cache: Cache
    shard: Sharder
    island: Island
    rope: dict[tuple[Rope, int], tuple[jax.Array, jax.Array]]

"""Device pools: one array per cached tensor, all in one layout, layers folded into the page axis.

`[heads, shards * layers * P, page_size, width]`: each data shard owns one run of `layers * P` pages, and inside it
`page_id = layer * P + p`. What a page is follows the group's kind:

    paged    P pages of `page_size` tokens; a request holds a table of them
    window   P slots, each a ring of `window` tokens: position p lies at offset p % window
    state    P slots, each one state, as a matrix of 128 columns where its width allows; otherwise the page axis is left out

Pools lie row-major on every device: left to itself a TPU puts the axis last that wastes least, and then copies a pool to read its pages.
Page 0 and slot 0 of every layer are dummies that padded rows may write.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, TensorSpec
from prfaas_jax.sharding import Sharder

# Per group, one array per tensor.
Pools = tuple[tuple[jax.Array, ...], ...]


# Columns of a TPU's vectors: states in one long row share tiles with their neighbours, so a pool would be re-laid for every scatter.
_LANES = 128


@dataclasses.dataclass(frozen=True)
class PoolGeometry:
    """Static sizes of the pools, per layer and data shard.

    Attributes:
        page_size: tokens per page.
        pages: pages, the dummy included.
        width: pages of the longest request: entries of a block-table row.
        slots: slots of windows and states, the dummy included.
    """

    page_size: int
    pages: int
    width: int
    slots: int

    def per_layer(self, group: CacheGroup) -> int:
        """P of the layout: pages or slots per layer and data shard."""
        return self.pages if group.cache.kind == "paged" else self.slots

    def page_shape(self, group: CacheGroup, tensor: TensorSpec) -> tuple[int, ...]:
        """Tokens and elements of a page or ring; a state's elements, as a matrix where they make one."""
        match group.cache.kind:
            case "paged":
                return (self.page_size, tensor.width)
            case "window":
                assert group.cache.window is not None
                return (group.cache.window, tensor.width)
            case "state":
                rows = 1 if tensor.width % _LANES else tensor.width // _LANES
                return (tensor.width,) if rows == 1 else (rows, _LANES)


def placed_heads(tensor: TensorSpec, shard: Sharder) -> int:
    """Heads as a pool holds them: fewer than the devices that share them come in copies, one per device."""
    return tensor.heads if tensor.shared else tensor.heads * shard.copies(tensor.heads)


def heads_axis(tensor: TensorSpec) -> str | None:
    """Logical axis of a pool's heads."""
    return None if tensor.shared else "kv_heads"


def pool_axes(tensor: TensorSpec) -> tuple[str | None, ...]:
    """Logical axes of a tensor's pool; pages are whole."""
    return (heads_axis(tensor), "pages")


def pool_shapes(spec: CacheSpec, geometry: PoolGeometry, shard: Sharder) -> tuple[tuple[jax.ShapeDtypeStruct, ...], ...]:
    """Abstract pools, in the order of groups and tensors."""
    data = shard.size("pages")
    return tuple(
        tuple(
            jax.ShapeDtypeStruct(
                (placed_heads(t, shard), data * len(group.layers) * geometry.per_layer(group), *geometry.page_shape(group, t)),
                jnp.dtype(t.dtype),
            )
            for t in group.cache.tensors
        )
        for group in spec.groups
    )


def pool_shardings(spec: CacheSpec, shard: Sharder) -> tuple[tuple[NamedSharding, ...], ...]:
    """Of every pool, in the order of groups and tensors; prefill and decode read them alike."""
    return tuple(tuple(shard(*pool_axes(t)) for t in group.cache.tensors) for group in spec.groups)


def pool_formats(spec: CacheSpec, geometry: PoolGeometry, shard: Sharder) -> tuple[tuple[Format, ...], ...]:
    """Layout and sharding of every pool."""
    place = lambda pool, sharding: Format(Layout(tuple(range(len(pool.shape)))), sharding)  # noqa: E731
    return jax.tree.map(place, pool_shapes(spec, geometry, shard), pool_shardings(spec, shard))


def create_pools(spec: CacheSpec, geometry: PoolGeometry, shard: Sharder) -> Pools:
    """Zeroed pools, allocated on the mesh."""
    shapes = pool_shapes(spec, geometry, shard)
    make = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=pool_formats(spec, geometry, shard))
    return make()

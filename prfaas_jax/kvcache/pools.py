"""Device pools of a paged cache: one array per tensor, layers folded into the page axis.

`[heads, shards * layers * pages, page_size, width]`: each data shard owns one run of `layers * pages` pages, and inside it
`page_id = layer * pages + p`. Page 0 of every layer is a dummy that padded rows may write.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import CacheSpec

Pools = tuple[jax.Array, ...]


def pool_shapes(spec: CacheSpec, pages: int, page_size: int, shards: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract pools of the model's one paged group, in the order of its tensors."""
    if len(spec.groups) != 1 or spec.groups[0].cache.kind != "paged":
        raise InvalidInput("cache groups", [g.cache.kind for g in spec.groups], "exactly one paged group")
    (group,) = spec.groups
    total = shards * len(group.layers) * pages
    return tuple(jax.ShapeDtypeStruct((t.heads, total, page_size, t.width), jnp.dtype(t.dtype)) for t in group.cache.tensors)


def create_pools(spec: CacheSpec, pages: int, page_size: int, shards: int, sharding: NamedSharding) -> Pools:
    """Zeroed pools, allocated on the mesh."""
    shapes = pool_shapes(spec, pages, page_size, shards)
    make = jax.jit(lambda: tuple(jnp.zeros(s.shape, s.dtype) for s in shapes), out_shardings=(sharding,) * len(shapes))
    return make()

"""The model's view of the pools inside a step: `models.caching.Cache` for a prefill chunk and for a decode token.

Everything here runs shard by shard (islands): attention, recurrences and pool writes never communicate. The pools are only read while
the layers run; what they add is written by ONE scatter per tensor afterwards (`write`). Only where a kernel must find the current token
in its pool does that pool ride in the carry.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prfaas_jax.engine.plan import DecodePlan, PrefillPlan
from prfaas_jax.kvcache.pools import PoolGeometry, Pools, heads_axis, pool_axes
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, TensorSpec
from prfaas_jax.models.caching import New, Place
from prfaas_jax.models.layer_config import AttentionConfig, LatentConfig
from prfaas_jax.models.transformer import island
from prfaas_jax.ops.latent_attention import latent_decode, latent_prefill
from prfaas_jax.ops.paged_attention import needs_current_in_pool, paged_attention
from prfaas_jax.ops.pool_write import read_pages, write_pages, write_tokens
from prfaas_jax.ops.prefill_attention import prefill_attention
from prfaas_jax.ops.window_attention import window_decode, window_prefill, write_rings
from prfaas_jax.sharding import Sharder

_ROW, _TABLE, _LAYER = ("batch",), ("batch", None), ()
_HEADS, _KV = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
_UP = ("heads", None, None)


def new_axes(group: CacheGroup, tensor: TensorSpec) -> tuple[str | None, ...]:
    """Logical axes of what a step adds to a tensor: tokens [L, B, T, heads, width], or a state [L, B, heads, width]."""
    if group.cache.kind == "state":
        return (None, "batch", heads_axis(tensor), None)
    return (None, "batch", None, heads_axis(tensor), None)


class _StepCache:
    """What both steps share."""

    def __init__(self, spec: CacheSpec, geometry: PoolGeometry, shard: Sharder, pools: Pools, valid: jax.Array, read_slot: jax.Array):
        self.spec, self.geometry, self.shard, self.pools = spec, geometry, shard, pools
        self.valid, self.read_slot = valid, read_slot
        self.island = island(shard)

    def _pages(self, place: Place) -> int:
        return self.geometry.per_layer(self.spec.groups[place.group])

    def _pool_axes(self, group: int) -> tuple[tuple[str | None, ...], ...]:
        return tuple(pool_axes(t) for t in self.spec.groups[group].cache.tensors)

    def _states(self, place: Place, fresh: Int[Array, " B"]) -> New:
        """State tensors [B, heads, width] of the rows' slots; zeros in rows where `fresh` holds."""
        slots = self._pages(place)

        def local(pool: jax.Array, slot: jax.Array, fresh: jax.Array, index: jax.Array) -> jax.Array:
            state = jnp.swapaxes(read_pages(pool, index * slots + slot), 0, 1).reshape(len(slot), pool.shape[0], -1)
            return jnp.where(fresh[:, None, None], 0, state)

        group = self.spec.groups[place.group]
        found = []
        for pool, tensor in zip(self.pools[place.group], group.cache.tensors, strict=True):
            read = self.island(local, (pool_axes(tensor), _ROW, _ROW, _LAYER), ("batch", heads_axis(tensor), None))
            found.append(read(pool, self.read_slot, fresh, jnp.asarray(place.index)))
        return tuple(found)

    def _write_states(self, group: CacheGroup, pools: New, new: New, slot: Int[Array, " B"]) -> New:
        """Scatters [L, B, heads, width] to the rows' slots."""

        def local(pool: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
            return write_pages(pool, new, slot, pages_per_layer=self.geometry.slots)

        return self._write(local, group, pools, new, (_ROW,), (slot,))

    def _write_pages(
        self,
        group: CacheGroup,
        pools: New,
        new: New,
        table: Int[Array, "B MP"],
        start: Int[Array, " B"],
        count: Int[Array, " B"],
        first_layer: jax.Array | int = 0,
    ) -> New:
        """Scatters [L, B, T, heads, width] at positions [start, start + count) of each row; the rest goes to the dummy page.

        `first_layer` is the group's layer that comes first in `new`.
        """
        page_size = self.geometry.page_size

        def local(
            pool: jax.Array, new: jax.Array, table: jax.Array, start: jax.Array, count: jax.Array, first: jax.Array
        ) -> jax.Array:
            layers, batch, tokens, *rest = new.shape
            step = jnp.arange(tokens)
            position = start[:, None] + step
            page = jnp.take_along_axis(table, position // page_size, axis=1, mode="clip")
            page = jnp.where(step < count[:, None], page, 0)
            flat, offset = new.reshape(layers, batch * tokens, *rest), (position % page_size).ravel()
            return write_tokens(pool, flat, page.ravel(), offset, pages_per_layer=self.geometry.pages, first_layer=first)

        rows = (table, start, count, jnp.asarray(first_layer, jnp.int32))
        return self._write(local, group, pools, new, (_TABLE, _ROW, _ROW, _LAYER), rows)

    def _write(
        self, local: Callable[..., jax.Array], group: CacheGroup, pools: New, new: New, axes: tuple, rows: tuple[jax.Array, ...]
    ) -> New:
        """`local(pool, new, *rows) -> pool` shard by shard on every tensor of a group; `axes` are those of `rows`."""
        return tuple(
            self.island(local, (pool_axes(t), new_axes(group, t), *axes), pool_axes(t))(pool, x, *rows)
            for t, pool, x in zip(group.cache.tensors, pools, new, strict=True)
        )


class PrefillCache(_StepCache):
    """A chunk of several prompts: row b holds tokens [start, start + valid) of its request."""

    def __init__(self, spec: CacheSpec, geometry: PoolGeometry, shard: Sharder, pools: Pools, plan: PrefillPlan):
        super().__init__(spec, geometry, shard, pools, plan.valid, plan.read_slot)
        self.plan = plan

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
        """See `Cache.attend`."""
        plan, pools, index = self.plan, self.pools[place.group], jnp.asarray(place.index)
        op: Callable[..., jax.Array]
        where_axes: tuple[str | None, ...]
        if config.window is None:
            op = functools.partial(prefill_attention, pages_per_layer=self._pages(place), scale=config.softmax_scale)
            where, where_axes = plan.table, _TABLE
        else:
            op = functools.partial(window_prefill, slots_per_layer=self._pages(place), window=config.window, scale=config.softmax_scale)
            where, where_axes = plan.read_slot, _ROW
        axes = (_HEADS, _KV, _KV, *self._pool_axes(place.group), where_axes, _ROW, _LAYER, ("heads",))
        run = self.island(lambda *a: op(*a[:-1], sinks=a[-1]), axes, _HEADS)
        return run(q, k, v, *pools, where, plan.start, index, sinks), carry

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
        """See `Cache.attend_latent`: expanded form."""
        op = functools.partial(latent_prefill, pages_per_layer=self._pages(place), scale=config.softmax_scale)
        axes = (_HEADS, _HEADS, ("batch", None, None), *self._pool_axes(place.group), _TABLE, _ROW, _LAYER, _UP, _UP)
        (pool,) = self.pools[place.group]
        index = jnp.asarray(place.index)
        return self.island(op, axes, _HEADS)(q_nope, q_rope, latent, pool, self.plan.table, self.plan.start, index, k_up, v_up)

    def states(self, place: Place) -> New:
        """See `Cache.states`."""
        return self._states(place, self.plan.start == 0)

    def write(self, new: Sequence[New]) -> Pools:
        """The pools with the chunk in them."""
        plan = self.plan
        written = []
        for group, pools, added in zip(self.spec.groups, self.pools, new, strict=True):
            match group.cache.kind:
                case "paged":
                    written.append(self._write_pages(group, pools, added, plan.table, plan.start, plan.valid))
                case "state":
                    written.append(self._write_states(group, pools, added, plan.write_slot))
                case "window":
                    written.append(self._write_rings(group, pools, added))
        return tuple(written)

    def _write_rings(self, group: CacheGroup, pools: New, new: New) -> New:
        assert group.cache.window is not None
        op = functools.partial(write_rings, slots_per_layer=self.geometry.slots, window=group.cache.window)
        plan = self.plan
        rows = (plan.read_slot, plan.write_slot, plan.start, plan.valid)
        return self._write(op, group, pools, new, (_ROW,) * 4, rows)


class DecodeCache(_StepCache):
    """One token per row, at position `length`. `implementations` names the paged attention of each group, None where it has none."""

    def __init__(
        self,
        spec: CacheSpec,
        geometry: PoolGeometry,
        shard: Sharder,
        pools: Pools,
        plan: DecodePlan,
        implementations: Sequence[str | None],
    ):
        super().__init__(spec, geometry, shard, pools, (plan.length > 0).astype(jnp.int32), plan.slot)
        self.plan, self.implementations = plan, implementations
        self.in_pool = tuple(name is not None and needs_current_in_pool(name) for name in implementations)

    def carried(self) -> Pools:
        """What rides in the carry: the pools that a kernel must find updated, nothing for the other groups."""
        return tuple(pools if rides else () for pools, rides in zip(self.pools, self.in_pool, strict=True))

    def attend(
        self,
        place: Place,
        config: AttentionConfig,
        q: Float[Array, "B 1 N H"],
        k: Float[Array, "B 1 K H"],
        v: Float[Array, "B 1 K Hv"],
        sinks: Float[Array, " N"] | None,
        carry: Pools,
    ) -> tuple[Float[Array, "B 1 N Hv"], Pools]:
        """See `Cache.attend`."""
        plan, group, index = self.plan, place.group, jnp.asarray(place.index)
        pools, op = self.pools[group], self._attention(place, config)
        if self.in_pool[group]:
            # At once, and this layer only; padded rows hit the dummy page.
            new = (k[None], v[None])
            pools = self._write_pages(self.spec.groups[group], carry[group], new, plan.table, plan.length, self.valid, index)
            carry = (*carry[:group], pools, *carry[group + 1 :])
        where, where_axes = (plan.table, _TABLE) if config.window is None else (plan.slot, _ROW)
        heads, kv = ("batch", "heads", None), ("batch", "kv_heads", None)
        axes = (heads, kv, kv, *self._pool_axes(group), where_axes, _ROW, _LAYER, ("heads",))
        run = self.island(lambda *a: op(*a[:-1], sinks=a[-1]), axes, heads)
        return run(q[:, 0], k[:, 0], v[:, 0], *pools, where, plan.length, index, sinks)[:, None], carry

    def _attention(self, place: Place, config: AttentionConfig) -> Callable[..., jax.Array]:
        if config.window is not None:
            return functools.partial(window_decode, slots_per_layer=self._pages(place), scale=config.softmax_scale)
        return functools.partial(
            paged_attention,
            pages_per_layer=self._pages(place),
            scale=config.softmax_scale,
            implementation=self.implementations[place.group],
        )

    def attend_latent(
        self,
        place: Place,
        config: LatentConfig,
        q_nope: Float[Array, "B 1 N Hn"],
        q_rope: Float[Array, "B 1 N Hr"],
        latent: Float[Array, "B 1 C"],
        k_up: Float[Array, "N Hn R"],
        v_up: Float[Array, "N Hv R"],
    ) -> Float[Array, "B 1 N Hv"]:
        """See `Cache.attend_latent`: absorbed form."""
        op = functools.partial(latent_decode, pages_per_layer=self._pages(place), scale=config.softmax_scale)
        heads = ("batch", "heads", None)
        axes = (heads, heads, ("batch", None), *self._pool_axes(place.group), _TABLE, _ROW, _LAYER, _UP, _UP)
        (pool,) = self.pools[place.group]
        plan, index = self.plan, jnp.asarray(place.index)
        one = (q_nope[:, 0], q_rope[:, 0], latent[:, 0])
        return self.island(op, axes, heads)(*one, pool, plan.table, plan.length, index, k_up, v_up)[:, None]

    def states(self, place: Place) -> New:
        """See `Cache.states`."""
        return self._states(place, self.plan.length == 0)

    def write(self, new: Sequence[New], carry: Pools) -> Pools:
        """The pools with the token in them."""
        plan = self.plan
        written: list[New] = []
        for g, (group, pools, added) in enumerate(zip(self.spec.groups, self.pools, new, strict=True)):
            if self.in_pool[g]:
                written.append(carry[g])
            elif group.cache.kind == "paged":
                written.append(self._write_pages(group, pools, added, plan.table, plan.length, self.valid))
            elif group.cache.kind == "state":
                written.append(self._write_states(group, pools, added, plan.slot))
            else:
                written.append(self._write_ring_token(group, pools, added))
        return tuple(written)

    def _write_ring_token(self, group: CacheGroup, pools: New, new: New) -> New:
        """Scatters [L, B, 1, heads, width] into the rows' rings; padded rows hit the dummy slot."""
        assert group.cache.window is not None
        window, slots = group.cache.window, self.geometry.slots

        def local(pool: jax.Array, new: jax.Array, slot: jax.Array, length: jax.Array) -> jax.Array:
            return write_tokens(pool, new[:, :, 0], slot, length % window, pages_per_layer=slots)

        return self._write(local, group, pools, new, (_ROW,) * 2, (self.plan.slot, self.plan.length))

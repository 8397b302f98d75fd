"""The jitted programs: prefill step, decode step, ingest of received KV. Pure functions of (params, pools, plan).

Inside a step the pools are read-only; one scatter after the layer scan writes the new tokens into the donated pools, and those
same new arrays are what prefill exports. Only where a kernel must find the current token in the pool do the pools ride in the carry.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from prfaas_jax.engine.plan import DecodePlan, IngestPlan, PrefillPlan, SamplingRows
from prfaas_jax.engine.sampling import sample
from prfaas_jax.kvcache.pools import Pools
from prfaas_jax.models import params as model_params
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.ops.paged_attention import needs_current_in_pool, paged_attention
from prfaas_jax.ops.pool_write import write_tokens
from prfaas_jax.ops.prefill_attention import prefill_attention
from prfaas_jax.sharding import AttentionSharding, Mode, Sharder

POOL_AXES = ("kv_heads", "pages", None, None)
KV_AXES = (None, "batch", None, "kv_heads", None)

# Scope of what runs on each device by itself: attention and pool writes.
ISLAND = "island"


class Drawn(NamedTuple):
    """What a step drew per row. token and logprob are replicated: the host of every process sees them."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    logits: Float[Array, "B V"]


@dataclasses.dataclass(frozen=True)
class StepGeometry:
    """Static shape of the pools that steps run over; `pages` is per layer and data shard."""

    page_size: int
    pages: int
    width: int


class Steps:
    """Builds the programs of one model on one mesh."""

    def __init__(
        self, config: ModelConfig, mesh: jax.sharding.Mesh, attention: AttentionSharding, geometry: StepGeometry, implementation: str
    ):
        self.config, self.geometry, self.implementation = config, geometry, implementation
        self.sharders: dict[Mode, Sharder] = {mode: Sharder(mesh, mode, attention) for mode in ("prefill", "decode")}
        self.graph, self.abstract_params = model_params.abstract(config)
        self.scale = config.head_dim**-0.5
        # TF32 and bf16 passes would break the float32 promises; bfloat16 models take the platform's fast path.
        self.precision = "highest" if config.dtype == "float32" else "default"

    # --- shardings ---------------------------------------------------------------------------------------------------------

    @property
    def pool_sharding(self) -> NamedSharding:
        """Of every pool; prefill and decode read it alike."""
        return self.sharders["decode"](*POOL_AXES)

    @property
    def params_shardings(self) -> nnx.State:
        """Of the parameters; prefill and decode read them alike."""
        return model_params.shardings(self.abstract_params, self.sharders["decode"])

    def _rows(self, shard: Sharder) -> tuple[Any, Any, SamplingRows]:
        row, wide = shard("batch"), shard("batch", None)
        return row, wide, SamplingRows(row, row, row, row)

    def _jit(self, fn: Callable, plan_shardings: Any, out_shardings: Any) -> Callable:
        pools = (self.pool_sharding,) * 2

        def traced(params: nnx.State, pools: Pools, plan: Any) -> Any:
            with jax.default_matmul_precision(self.precision):
                return fn(params, pools, plan)

        traced.__name__ = fn.__name__.lstrip("_")
        return jax.jit(
            traced,
            donate_argnums=(1,),
            in_shardings=(self.params_shardings, pools, plan_shardings),
            out_shardings=(pools, *out_shardings),
        )

    def _drawn(self, shard: Sharder) -> Drawn:
        """Shardings in the shape of a Drawn: a plain tuple would not match the tree that the step returns."""
        return Drawn._make((shard(None), shard(None), shard("batch", "vocab")))

    def _island(self, shard: Sharder, fn: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
        """`fn` on each device's own shard, axes given by logical names; attention and scatters never communicate."""
        specs = tuple(shard.spec(*axes) for axes in in_axes)
        # The name marks its operations in profiles and compiled programs.
        named = jax.named_scope(ISLAND)(fn)
        return jax.shard_map(named, mesh=shard.mesh, in_specs=specs, out_specs=shard.spec(*out_axes), check_vma=False)

    # --- prefill -------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def prefill(self) -> Callable[[nnx.State, Pools, PrefillPlan], tuple[Pools, Drawn, Pools]]:
        """(params, pools, plan) -> (pools, drawn, (k, v) of the chunk as [L, B, T, K, H]). Pools are donated."""
        shard = self.sharders["prefill"]
        row, wide, sampling = self._rows(shard)
        kv = (shard(*KV_AXES),) * 2
        return self._jit(self._prefill, PrefillPlan(wide, row, row, wide, sampling), (self._drawn(shard), kv))

    def _prefill(self, params: nnx.State, pools: Pools, plan: PrefillPlan) -> tuple[Pools, Drawn, Pools]:
        shard, geometry = self.sharders["prefill"], self.geometry
        model = nnx.merge(self.graph, params)
        positions = plan.start[:, None] + jnp.arange(plan.tokens.shape[1])
        op = functools.partial(prefill_attention, pages_per_layer=geometry.pages, scale=self.scale)
        heads, kv_heads = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        axes = (heads, kv_heads, kv_heads, POOL_AXES, POOL_AXES, ("batch", None), ("batch",), ())
        island = self._island(shard, op, axes, heads)

        def attend(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, carry: tuple[()]) -> tuple[jax.Array, tuple[()]]:
            return island(q, k, v, *pools, plan.table, plan.start, layer), carry

        hidden, _, kv = model(plan.tokens, positions, attend, (), shard)
        pools = self._write(shard, pools, kv, plan.table, plan.start, plan.valid)
        last = jnp.maximum(plan.valid - 1, 0)[:, None, None]
        logits = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
        token, logprob = sample(logits, plan.sampling, plan.start + plan.valid)
        return pools, Drawn(token, logprob, logits), kv

    def _write(self, shard: Sharder, pools: Pools, new: Pools, table: jax.Array, start: jax.Array, count: jax.Array) -> Pools:
        """Scatters [L, B, T, K, H] at positions [start, start + count) of each row; the rest goes to the dummy page."""
        page_size = self.geometry.page_size

        def local(pool: jax.Array, new: jax.Array, table: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
            layers, batch, tokens, *rest = new.shape
            step = jnp.arange(tokens)
            position = start[:, None] + step
            page = jnp.take_along_axis(table, position // page_size, axis=1, mode="clip")
            page = jnp.where(step < count[:, None], page, 0)
            flat = new.reshape(layers, batch * tokens, *rest)
            return write_tokens(pool, flat, page.ravel(), (position % page_size).ravel(), pages_per_layer=self.geometry.pages)

        axes = (POOL_AXES, KV_AXES, ("batch", None), ("batch",), ("batch",))
        island = self._island(shard, local, axes, POOL_AXES)
        return tuple(island(pool, x, table, start, count) for pool, x in zip(pools, new, strict=True))

    # --- decode --------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def decode(self) -> Callable[[nnx.State, Pools, DecodePlan], tuple[Pools, Drawn]]:
        """(params, pools, plan) -> (pools, drawn). Pools are donated."""
        shard = self.sharders["decode"]
        row, wide, sampling = self._rows(shard)
        return self._jit(self._decode, DecodePlan(row, row, wide, sampling), (self._drawn(shard),))

    def _decode(self, params: nnx.State, pools: Pools, plan: DecodePlan) -> tuple[Pools, Drawn]:
        shard, geometry = self.sharders["decode"], self.geometry
        model = nnx.merge(self.graph, params)
        in_pool = needs_current_in_pool(self.implementation)
        op = functools.partial(
            paged_attention, pages_per_layer=geometry.pages, scale=self.scale, implementation=self.implementation
        )
        heads, kv_heads = ("batch", "heads", None), ("batch", "kv_heads", None)
        axes = (heads, kv_heads, kv_heads, POOL_AXES, POOL_AXES, ("batch", None), ("batch",), ())
        island = self._island(shard, op, axes, heads)

        def attend(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, carry: Pools) -> tuple[jax.Array, Pools]:
            if in_pool:
                carry = self._write_layer(shard, carry, (k, v), plan.table, plan.length, layer)
            o = island(q[:, 0], k[:, 0], v[:, 0], *(carry if in_pool else pools), plan.table, plan.length, layer)
            return o[:, None], carry

        hidden, carried, kv = model(plan.token[:, None], plan.length[:, None], attend, pools if in_pool else (), shard)
        one = (plan.length > 0).astype(jnp.int32)
        pools = carried if in_pool else self._write(shard, pools, kv, plan.table, plan.length, one)
        logits = model.logits(hidden[:, 0])
        token, logprob = sample(logits, plan.sampling, plan.length + 1)
        return pools, Drawn(token, logprob, logits)

    def _write_layer(self, shard: Sharder, pools: Pools, new: Pools, table: jax.Array, length: jax.Array, layer: jax.Array) -> Pools:
        """Scatters one layer's [B, 1, K, H] at position `length` of each row; padded rows hit the dummy page."""
        page_size, pages = self.geometry.page_size, self.geometry.pages

        def local(pool: jax.Array, new: jax.Array, table: jax.Array, length: jax.Array, layer: jax.Array) -> jax.Array:
            page = jnp.take_along_axis(table, (length // page_size)[:, None], axis=1, mode="clip")[:, 0]
            page = jnp.where(length > 0, page, 0)
            one_layer = new[:, 0][None]
            return write_tokens(pool, one_layer, page, length % page_size, pages_per_layer=pages, first_layer=layer)

        axes = (POOL_AXES, ("batch", None, "kv_heads", None), ("batch", None), ("batch",), ())
        island = self._island(shard, local, axes, POOL_AXES)
        return tuple(island(pool, x, table, length, layer) for pool, x in zip(pools, new, strict=True))

    # --- ingest --------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def ingest(self) -> Callable[[jax.Array, Any, IngestPlan], tuple[jax.Array, jax.Array]]:
        """(pool, block [L, R, heads, width], plan) -> (pool, fence). The pool is donated; a ready fence means the block was read."""
        shard = self.sharders["decode"]
        block, address = shard(None, None, "kv_heads", None), shard("pages", None)

        def local(pool: jax.Array, block: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
            return write_tokens(pool, block, page[0], offset[0], pages_per_layer=self.geometry.pages)

        axes = (POOL_AXES, (None, None, "kv_heads", None), ("pages", None), ("pages", None))
        island = self._island(shard, local, axes, POOL_AXES)

        def ingest(pool: jax.Array, block: jax.Array, plan: IngestPlan) -> tuple[jax.Array, jax.Array]:
            return island(pool, block, plan.page, plan.offset), plan.page[0, 0] + 0

        return jax.jit(
            ingest,
            donate_argnums=(0,),
            in_shardings=(self.pool_sharding, block, IngestPlan(address, address)),
            out_shardings=(self.pool_sharding, NamedSharding(shard.mesh, PartitionSpec())),
        )

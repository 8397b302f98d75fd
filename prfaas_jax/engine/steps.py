"""The jitted programs: prefill step, decode step, ingest of received KV. Pure functions of (params, pools, plan).

Inside a step the pools are read-only; after the layers one scatter per tensor writes what is new into the donated pools, and those same
new arrays are what prefill exports. See engine/caches.py for what happens in between.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from prfaas_jax.engine.caches import DecodeCache, PrefillCache, new_axes
from prfaas_jax.engine.plan import DecodePlan, IngestPlan, PrefillPlan, SamplingRows
from prfaas_jax.engine.sampling import sample
from prfaas_jax.kvcache.pools import PoolGeometry, Pools, heads_axis, pool_axes, pool_formats, pool_shardings
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models import params as model_params
from prfaas_jax.models.caching import New
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.transformer import island
from prfaas_jax.ops.pool_write import write_pages, write_tokens
from prfaas_jax.sharding import AttentionSharding, Mode, Sharder


class Drawn(NamedTuple):
    """What a step drew per row. token and logprob are replicated: the host of every process sees them."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    logits: Float[Array, "B V"]


def _after(index: Int[Array, "B ..."], token: Int[Array, " B"]) -> Int[Array, "B ..."]:
    """`index`, but not before `token` is drawn, so that pools are written when all layers have read them: otherwise XLA copies them first.

    An optimization barrier would not do: the CPU compiler drops it before it decides on copies.
    """
    zero = (token & 1) >> 1
    return index + zero.reshape(-1, *(1,) * (index.ndim - 1))


class Steps:
    """Builds the programs of one model on one mesh.

    `implementations` names the paged attention of each cache group, None where a group has none.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: jax.sharding.Mesh,
        attention: AttentionSharding,
        geometry: PoolGeometry,
        implementations: tuple[str | None, ...],
    ):
        self.config, self.geometry, self.implementations = config, geometry, implementations
        self.spec = cache_spec(config)
        self.sharders: dict[Mode, Sharder] = {mode: Sharder(mesh, mode, attention) for mode in ("prefill", "decode")}
        self.graph, self.abstract_params = model_params.abstract(config)
        # TF32 and bf16 passes would break the float32 promises; bfloat16 models take the platform's fast path.
        self.precision = "highest" if config.dtype == "float32" else "default"

    # --- shardings ---------------------------------------------------------------------------------------------------------

    @property
    def pool_shardings(self) -> tuple[tuple[NamedSharding, ...], ...]:
        """Of every pool; prefill and decode read them alike."""
        return pool_shardings(self.spec, self.sharders["decode"])

    @property
    def pool_formats(self) -> tuple[tuple[Format, ...], ...]:
        """Layout and sharding of every pool."""
        return pool_formats(self.spec, self.geometry, self.sharders["decode"])

    @property
    def params_shardings(self) -> nnx.State:
        """Of the parameters; prefill and decode read them alike."""
        return model_params.shardings(self.abstract_params, self.sharders["decode"])

    def _rows(self, shard: Sharder) -> tuple[Any, Any, SamplingRows]:
        row, wide = shard("batch"), shard("batch", None)
        return row, wide, SamplingRows(row, row, row, row)

    def _jit(self, fn: Callable, plan_shardings: Any, out_shardings: Any) -> Callable:
        def traced(params: nnx.State, pools: Pools, plan: Any) -> Any:
            with jax.default_matmul_precision(self.precision):
                return fn(params, pools, plan)

        traced.__name__ = fn.__name__.lstrip("_")
        return jax.jit(
            traced,
            donate_argnums=(1,),
            in_shardings=(self.params_shardings, self.pool_formats, plan_shardings),
            out_shardings=(self.pool_formats, *out_shardings),
        )

    def _drawn(self, shard: Sharder) -> Drawn:
        """Shardings in the shape of a Drawn: a plain tuple would not match the tree that the step returns."""
        return Drawn._make((shard(None), shard(None), shard("batch", "vocab")))

    # --- prefill -------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def prefill(self) -> Callable[[nnx.State, Pools, PrefillPlan], tuple[Pools, Drawn, tuple[New, ...]]]:
        """(params, pools, plan) -> (pools, drawn, what the chunk added per group, see `new_axes`). Pools are donated."""
        shard = self.sharders["prefill"]
        row, wide, sampling = self._rows(shard)
        new = tuple(tuple(shard(*new_axes(group, t)) for t in group.cache.tensors) for group in self.spec.groups)
        return self._jit(self._prefill, PrefillPlan(wide, row, row, wide, row, row, sampling), (self._drawn(shard), new))

    def _prefill(self, params: nnx.State, pools: Pools, plan: PrefillPlan) -> tuple[Pools, Drawn, tuple[New, ...]]:
        shard = self.sharders["prefill"]
        model = nnx.merge(self.graph, params)
        positions = plan.start[:, None] + jnp.arange(plan.tokens.shape[1])
        cache = PrefillCache(self.spec, self.geometry, shard, pools, plan)
        hidden, _, new = model(plan.tokens, positions, cache, (), shard)
        new = jax.lax.optimization_barrier(new)  # a GPU would fuse it with the write, and what it read of a pool with that
        last = jnp.maximum(plan.valid - 1, 0)[:, None, None]
        logits = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
        token, logprob = sample(logits, plan.sampling, plan.start + plan.valid)
        cache.plan = plan._replace(table=_after(plan.table, token), write_slot=_after(plan.write_slot, token))
        return cache.write(new), Drawn(token, logprob, logits), new

    # --- decode --------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def decode(self) -> Callable[[nnx.State, Pools, DecodePlan], tuple[Pools, Drawn]]:
        """(params, pools, plan) -> (pools, drawn). Pools are donated."""
        shard = self.sharders["decode"]
        row, wide, sampling = self._rows(shard)
        return self._jit(self._decode, DecodePlan(row, row, wide, row, sampling), (self._drawn(shard),))

    def _decode(self, params: nnx.State, pools: Pools, plan: DecodePlan) -> tuple[Pools, Drawn]:
        shard = self.sharders["decode"]
        model = nnx.merge(self.graph, params)
        cache = DecodeCache(self.spec, self.geometry, shard, pools, plan, self.implementations)
        hidden, carry, new = model(plan.token[:, None], plan.length[:, None], cache, cache.carried(), shard)
        new = jax.lax.optimization_barrier(new)  # a GPU would fuse it with the write, and what it read of a pool with that
        logits = model.logits(hidden[:, 0])
        token, logprob = sample(logits, plan.sampling, plan.length + 1)
        cache.plan = plan._replace(table=_after(plan.table, token), slot=_after(plan.slot, token))
        return cache.write(new, carry), Drawn(token, logprob, logits)

    # --- ingest --------------------------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019 - one Steps per engine, a handful of tensors
    def ingest(self, group: int, tensor: int) -> Callable[[jax.Array, Any, IngestPlan, Any], tuple[jax.Array, jax.Array]]:
        """(pool, block [Lb, R, heads, width], plan, first layer of the block) -> (pool, fence), for one tensor.

        The pool is donated; a ready fence means the block was read.
        """
        shard, cached = self.sharders["decode"], self.spec.groups[group]
        spec = cached.cache.tensors[tensor]
        axis = None if spec.shared else f"{heads_axis(spec)}/{spec.heads}"
        block, address, scalar = shard(None, None, axis, None), shard("pages", None), NamedSharding(shard.mesh, PartitionSpec())
        per_layer = self.geometry.per_layer(cached)

        def local(pool: jax.Array, block: jax.Array, page: jax.Array, offset: jax.Array, first: jax.Array) -> jax.Array:
            if cached.cache.kind == "state":
                return write_pages(pool, block, page[0], pages_per_layer=per_layer, first_layer=first)
            return write_tokens(pool, block, page[0], offset[0], pages_per_layer=per_layer, first_layer=first)

        axes = (pool_axes(spec), (None, None, heads_axis(spec), None), ("pages", None), ("pages", None), ())
        run = island(shard)(local, axes, pool_axes(spec))

        def ingest(pool: jax.Array, block: jax.Array, plan: IngestPlan, first: jax.Array) -> tuple[jax.Array, jax.Array]:
            placed = block if spec.shared else shard.spread(block, spec.heads, axis=2)
            return run(pool, placed, plan.page, plan.offset, first), plan.page[0, 0] + 0

        pool = self.pool_formats[group][tensor]
        return jax.jit(
            ingest,
            donate_argnums=(0,),
            in_shardings=(pool, block, IngestPlan(address, address), scalar),
            out_shardings=(pool, scalar),
        )

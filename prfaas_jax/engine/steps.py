"""The jitted programs: prefill step, decode step, ingest of received KV. Pure functions of (params, pools, plan).

Inside a step the pools are read-only; after the layers one scatter per tensor writes what is new into the donated pools, and those same
new arrays are what prefill exports. See engine/caches.py for what happens in between.

A prefill step of a model with states runs as several programs: head, equal segments of the body, tail. A layer's state is final once the
layer has run a prompt's last chunk, so it leaves while the next segment computes.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from prfaas_jax.models.caching import Added, Step
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.transformer import Transformer, island, join
from prfaas_jax.ops.pool_write import write_pages, write_tokens
from prfaas_jax.sharding import AttentionSharding, Mode, Sharder


class Drawn(NamedTuple):
    """What a step drew per row. token and logprob are replicated: the host of every process sees them."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    logits: Float[Array, "B V"]


class Part(NamedTuple):
    """What consecutive layers of a prefill step added.

    Attributes:
        new: per group its tensors, see `new_axes`; () where there is nothing of the group.
        layers: per group which of its layers `new` has.
    """

    new: Added
    layers: tuple[range, ...]


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
        self.staged = any(group.cache.kind == "state" for group in self.spec.groups)

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

    def _jit(self, fn: Callable, plan_shardings: Any, out_shardings: Any, donate: tuple[int, ...] = (1,), more: tuple = ()) -> Callable:
        """`fn(params, pools, plan, *more)` as a program; `more` are shardings, None for those of the arguments."""

        def traced(*args: Any) -> Any:
            with jax.default_matmul_precision(self.precision):
                return fn(*args)

        traced.__name__ = fn.__name__.lstrip("_")
        return jax.jit(
            traced,
            donate_argnums=donate,
            in_shardings=(self.params_shardings, self.pool_formats, plan_shardings, *more),
            out_shardings=out_shardings,
        )

    def _drawn(self, shard: Sharder) -> Drawn:
        """Shardings in the shape of a Drawn: a plain tuple would not match the tree that the step returns."""
        return Drawn._make((shard(None), shard(None), shard("batch", "vocab")))

    # --- prefill -------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def prefill(self) -> Callable[[nnx.State, Pools, PrefillPlan], tuple[Pools, Drawn, Added]]:
        """(params, pools, plan) -> (pools, drawn, what the chunk added per group, see `new_axes`) as one program. Pools are donated."""
        new = self._new_shardings(range(self.config.num_layers))
        return self._jit(self._prefill, self._prefill_plan, (self.pool_formats, self._drawn(self.sharders["prefill"]), new))

    def _prefill(self, params: nnx.State, pools: Pools, plan: PrefillPlan) -> tuple[Pools, Drawn, Added]:
        model, cache, step = self._prefill_step(params, pools, plan)
        x, _, head = model.run_head(plan.tokens, step, ())
        x, _, body = model.run_body(x, step, (), 0, self.config.pattern.repeats)
        return self._finish(model, cache, step, plan, x, (head, body))[:3]

    def run_prefill(self, params: nnx.State, pools: Pools, plan: PrefillPlan) -> tuple[Pools, Drawn, tuple[Part, ...]]:
        """Dispatches a prefill step as its engine runs it; the parts become ready one after another. Pools are donated."""
        groups, pattern = self.spec.groups, self.config.pattern
        if not self.staged:
            pools, drawn, new = self.prefill(params, pools, plan)
            return pools, drawn, (Part(new, tuple(range(len(g.layers)) for g in groups)),)
        x, new = self.prefill_head(params, pools, plan)
        added = [new]
        for first in range(0, pattern.repeats, pattern.segment_repeats):
            x, new = self.prefill_segment(params, pools, plan, x, np.int32(first))
            added.append(new)
        pools, drawn, last = self.prefill_tail(params, pools, plan, x, tuple(added))
        # Tokens leave with the tail, whole.
        states = [tuple(n if g.cache.kind == "state" else () for g, n in zip(groups, new, strict=True)) for new in added]
        return pools, drawn, tuple(map(Part, (*states, last), self._part_layers))

    @functools.cached_property
    def _part_layers(self) -> tuple[tuple[range, ...], ...]:
        """Per part of a prefill step, which layers of each group it hands out."""
        pattern, groups = self.config.pattern, self.spec.groups
        segment, tail = pattern.period * pattern.segment_repeats, pattern.head + pattern.body_layers
        starts = [0, *range(pattern.head, tail, segment), tail]
        parts = [[g.within(range(*ends)) for g in groups] for ends in itertools.pairwise([*starts, pattern.num_layers])]
        parts[-1] = [range(len(g.layers)) if g.cache.kind != "state" else at for g, at in zip(groups, parts[-1], strict=True)]
        return tuple(map(tuple, parts))

    @functools.cached_property
    def prefill_head(self) -> Callable[[nnx.State, Pools, PrefillPlan], tuple[jax.Array, Added]]:
        """(params, pools, plan) -> (residual stream, what the pattern's head added)."""

        def prefill_head(params: nnx.State, pools: Pools, plan: PrefillPlan) -> tuple[jax.Array, Added]:
            model, _, step = self._prefill_step(params, pools, plan)
            x, _, new = model.run_head(plan.tokens, step, ())
            return self._between(x), new

        return self._jit(prefill_head, self._prefill_plan, (None, self._new_shardings(range(self.config.pattern.head))), donate=())

    @functools.cached_property
    def prefill_segment(self) -> Callable[[nnx.State, Pools, PrefillPlan, jax.Array, Any], tuple[jax.Array, Added]]:
        """(params, pools, plan, residual stream, first repeat) -> (residual stream, what one segment of the body added)."""

        def prefill_segment(params: nnx.State, pools: Pools, plan: PrefillPlan, x: jax.Array, first: jax.Array) -> tuple[jax.Array, Added]:
            model, _, step = self._prefill_step(params, pools, plan)
            x, _, new = model.run_body(x, step, (), first, self.config.pattern.segment_repeats)
            return self._between(x), new

        pattern = self.config.pattern
        new = self._new_shardings(range(pattern.head, pattern.head + pattern.period))
        return self._jit(prefill_segment, self._prefill_plan, (None, new), donate=(3,), more=(None, None))

    @functools.cached_property
    def prefill_tail(self) -> Callable[[nnx.State, Pools, PrefillPlan, jax.Array, tuple[Added, ...]], tuple[Pools, Drawn, Added]]:
        """(params, pools, plan, residual stream, all that was added so far) -> (pools, drawn, new).

        New are all layers' tokens, but only the tail's states. Pools are donated.
        """

        def prefill_tail(
            params: nnx.State, pools: Pools, plan: PrefillPlan, x: jax.Array, added: tuple[Added, ...]
        ) -> tuple[Pools, Drawn, Added]:
            model, cache, step = self._prefill_step(params, pools, plan)
            pools, drawn, new, tail = self._finish(model, cache, step, plan, x, added)
            states = (group.cache.kind == "state" for group in self.spec.groups)
            return pools, drawn, tuple(t if state else n for n, t, state in zip(new, tail, states, strict=True))

        pattern = self.config.pattern
        new = self._new_shardings(range(pattern.head + pattern.body_layers, pattern.num_layers), all_tokens=True)
        out = self.pool_formats, self._drawn(self.sharders["prefill"]), new
        return self._jit(prefill_tail, self._prefill_plan, out, more=(None, None))

    @property
    def _prefill_plan(self) -> PrefillPlan:
        row, wide, sampling = self._rows(self.sharders["prefill"])
        return PrefillPlan(wide, row, row, wide, row, row, sampling)

    def _new_shardings(self, layers: range, all_tokens: bool = False) -> Any:
        """Of what `layers` add, or (`all_tokens`) of their states and of all layers' tokens."""
        shard, groups = self.sharders["prefill"], self.spec.groups
        there = (bool(g.within(layers)) or (all_tokens and g.cache.kind != "state") for g in groups)
        return tuple(tuple(shard(*new_axes(g, t)) for t in g.cache.tensors) if has else () for g, has in zip(groups, there, strict=True))

    def _prefill_step(self, params: nnx.State, pools: Pools, plan: PrefillPlan) -> tuple[Transformer, PrefillCache, Step]:
        shard = self.sharders["prefill"]
        model = nnx.merge(self.graph, params)
        cache = PrefillCache(self.spec, self.geometry, shard, pools, plan)
        return model, cache, model.step(plan.start[:, None] + jnp.arange(plan.tokens.shape[1]), cache, shard)

    def _between(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream as it goes from one program to the next; what enters or leaves a program is split evenly or not at all."""
        shard = self.sharders["prefill"]
        return shard.constrain(x, "batch", "seq" if x.shape[1] % shard.size("seq") == 0 else None, "embed")

    def _finish(
        self, model: Transformer, cache: PrefillCache, step: Step, plan: PrefillPlan, x: jax.Array, added: tuple[Added, ...]
    ) -> tuple[Pools, Drawn, Added, Added]:
        """The tail, what is drawn, the pools with all that was added; returns (pools, drawn, all that was added, the tail's)."""
        hidden, _, tail = model.run_tail(x, step, ())
        # A GPU would fuse it with the write, and what it read of a pool with that.
        new = jax.lax.optimization_barrier(join((*added, tail)))
        last = jnp.maximum(plan.valid - 1, 0)[:, None, None]
        logits = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
        token, logprob = sample(logits, plan.sampling, plan.start + plan.valid)
        cache.plan = plan._replace(table=_after(plan.table, token), write_slot=_after(plan.write_slot, token))
        return cache.write(new), Drawn(token, logprob, logits), new, tail

    # --- decode --------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def decode(self) -> Callable[[nnx.State, Pools, DecodePlan], tuple[Pools, Drawn]]:
        """(params, pools, plan) -> (pools, drawn). Pools are donated."""
        shard = self.sharders["decode"]
        row, wide, sampling = self._rows(shard)
        return self._jit(self._decode, DecodePlan(row, row, wide, row, sampling), (self.pool_formats, self._drawn(shard)))

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

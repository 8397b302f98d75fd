"""The jitted programs: prefill step, decode step, ingest of received KV. Pure functions of (params, pools, plan).

Inside a step the pools are read-only; after the layers one scatter per tensor writes what is new into the donated pools, and those same
new arrays are what prefill exports. See engine/caches.py for what happens in between.

A prefill step whose cache is to leave runs as several programs: embedding, pieces of the stack, and an end that draws and writes. What a
piece adds leaves while the next one computes.
"""

import functools
from collections.abc import Callable, Sequence
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
from prfaas_jax.models.pattern import PIECES, Piece, Program, cut, whole
from prfaas_jax.models.transformer import Transformer, island, join
from prfaas_jax.ops import kv_codec
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

    `implementations` names the paged attention of each cache group, None where a group has none. `pieces` is what a prefill step is cut
    into at least (`pattern.cut`); None takes `PIECES`, 1 makes it one program.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: jax.sharding.Mesh,
        attention: AttentionSharding,
        geometry: PoolGeometry,
        implementations: tuple[str | None, ...],
        pieces: int | None = None,
    ):
        self.config, self.geometry, self.implementations = config, geometry, implementations
        self.spec = cache_spec(config)
        self.sharders: dict[Mode, Sharder] = {mode: Sharder(mesh, mode, attention) for mode in ("prefill", "decode")}
        self.graph, self.abstract_params = model_params.abstract(config)
        # TF32 and bf16 passes would break the float32 promises; bfloat16 models take the platform's fast path.
        self.precision = "highest" if config.dtype == "float32" else "default"
        self.pieces: tuple[Piece, ...] = () if pieces == 1 else cut(config.pattern, config.body_runs, pieces or PIECES)

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
        new = self._new_shardings()
        return self._jit(self._prefill, self._prefill_plan, (self.pool_formats, self._drawn(self.sharders["prefill"]), new))

    def _prefill(self, params: nnx.State, pools: Pools, plan: PrefillPlan) -> tuple[Pools, Drawn, Added]:
        model, cache, step = self._prefill_step(params, pools, plan)
        x, added = model.embedded(plan.tokens, step), []
        for piece in whole(self.config.pattern):
            x, _, new = model.run(piece.program, x, step, (), piece.first)
            added.append(new)
        return self._finish(model, cache, plan, x, added)

    def run_prefill(self, params: nnx.State, pools: Pools, plan: PrefillPlan, taken: Callable[[Part], None]) -> tuple[Pools, Drawn]:
        """Dispatches a prefill step as its engine runs it: as one program, or in `pieces`. Pools are donated.

        `taken` gets every part as soon as what computes it is dispatched. Parts become ready one after another, and no part's arrays
        wait for a later part.
        """
        groups = self.spec.groups
        if not self.pieces:
            pools, drawn, new = self.prefill(params, pools, plan)
            taken(Part(new, tuple(range(len(g.layers)) for g in groups)))
            return pools, drawn
        x = self.prefill_embed(params, pools, plan)
        added: list[Added] = []
        for piece in self.pieces:
            given = params, pools, plan, x, np.int32(piece.first)
            layers = tuple(g.within(piece.layers) for g in groups)
            if self._leaves_ahead(piece):
                added.append(self.prefill_ahead(piece.program)(*given))
                taken(Part(added[-1], layers))
                x, _ = self.prefill_piece(piece.program)(*given)
            else:
                x, new = self.prefill_piece(piece.program)(*given)
                added.append(new)
                taken(Part(new, layers))
        return self.prefill_end(params, pools, plan, x, tuple(added))

    def _leaves_ahead(self, piece: Piece) -> bool:
        """Whether what a piece adds is computed once more in front of it: it is the last, and nothing behind it would hide its transfer.

        One layer's keys need little of it, neither attention nor MLP; a state needs most.
        """
        kinds = {g.cache.kind for g in self.spec.groups if g.within(piece.layers)}
        return piece is self.pieces[-1] and len(piece.layers) == 1 and "state" not in kinds

    @functools.cached_property
    def prefill_embed(self) -> Callable[[nnx.State, Pools, PrefillPlan], jax.Array]:
        """(params, pools, plan) -> residual stream in front of the first layer."""

        def prefill_embed(params: nnx.State, pools: Pools, plan: PrefillPlan) -> jax.Array:
            model, _, step = self._prefill_step(params, pools, plan)
            return self._between(model.embedded(plan.tokens, step))

        return self._jit(prefill_embed, self._prefill_plan, None, donate=())

    @functools.cache  # noqa: B019 - one Steps per engine, a handful of programs
    def prefill_piece(self, program: Program) -> Callable[[nnx.State, Pools, PrefillPlan, jax.Array, Any], tuple[jax.Array, Added]]:
        """(params, pools, plan, residual stream, `Piece.first`) -> (residual stream, what the piece added)."""

        def prefill_piece(params: nnx.State, pools: Pools, plan: PrefillPlan, x: jax.Array, first: jax.Array) -> tuple[jax.Array, Added]:
            model, _, step = self._prefill_step(params, pools, plan)
            x, _, new = model.run(program, x, step, (), first)
            return self._between(x), new

        out = None, self._new_shardings(program)
        return self._jit(prefill_piece, self._prefill_plan, out, donate=(3,), more=(None, None))

    @functools.cache  # noqa: B019 - one Steps per engine, one program
    def prefill_ahead(self, program: Program) -> Callable[[nnx.State, Pools, PrefillPlan, jax.Array, Any], Added]:
        """(params, pools, plan, residual stream, `Piece.first`) -> what the piece adds, and nothing that only its residual stream needs."""

        def prefill_ahead(params: nnx.State, pools: Pools, plan: PrefillPlan, x: jax.Array, first: jax.Array) -> Added:
            model, _, step = self._prefill_step(params, pools, plan)
            return model.run(program, x, step, (), first)[2]

        return self._jit(prefill_ahead, self._prefill_plan, self._new_shardings(program), donate=(), more=(None, None))

    @functools.cached_property
    def prefill_end(self) -> Callable[[nnx.State, Pools, PrefillPlan, jax.Array, tuple[Added, ...]], tuple[Pools, Drawn]]:
        """(params, pools, plan, residual stream, what each piece added) -> (pools, drawn). Pools are donated."""

        def prefill_end(params: nnx.State, pools: Pools, plan: PrefillPlan, x: jax.Array, added: tuple[Added, ...]) -> tuple[Pools, Drawn]:
            model, cache, _ = self._prefill_step(params, pools, plan)
            return self._finish(model, cache, plan, x, added)[:2]

        out = self.pool_formats, self._drawn(self.sharders["prefill"])
        return self._jit(prefill_end, self._prefill_plan, out, more=(None, None))

    @property
    def _prefill_plan(self) -> PrefillPlan:
        row, wide, sampling = self._rows(self.sharders["prefill"])
        return PrefillPlan(wide, row, row, wide, row, row, sampling)

    def _new_shardings(self, program: Program | None = None) -> Any:
        """Of what a piece adds; None means all layers."""
        layers = range(self.config.num_layers) if program is None else next(p.layers for p in self.pieces if p.program == program)
        shard = self.sharders["prefill"]
        return tuple(
            tuple(shard(*new_axes(group, tensor)) for tensor in group.cache.tensors) if group.within(layers) else ()
            for group in self.spec.groups
        )

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
        self, model: Transformer, cache: PrefillCache, plan: PrefillPlan, x: jax.Array, added: Sequence[Added]
    ) -> tuple[Pools, Drawn, Added]:
        """Behind the last layer: the pools with all that was added, what is drawn, and what was added as one."""
        # A GPU would fuse it with the write, and what it read of a pool with that.
        new = jax.lax.optimization_barrier(join(added))
        last = jnp.maximum(plan.valid - 1, 0)[:, None, None]
        logits = model.logits(jnp.take_along_axis(model.final_norm(x), last, axis=1)[:, 0])
        token, logprob = sample(logits, plan.sampling, plan.start + plan.valid)
        cache.plan = plan._replace(table=_after(plan.table, token), write_slot=_after(plan.write_slot, token))
        return cache.write(new), Drawn(token, logprob, logits), new

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

    # --- what leaves and what is received, as a codec writes it ---------------------------------------------------------------

    @functools.cache  # noqa: B019 - one Steps per engine, a handful of tensors and codecs
    def encode(self, group: int, tensor: int, codec: str) -> Callable[[jax.Array], jax.Array]:
        """What a prefill step added to a tensor (`new_axes`) -> the same as `codec` writes it."""
        cached = self.spec.groups[group]
        placed = self.sharders["prefill"](*new_axes(cached, cached.cache.tensors[tensor]))
        return jax.jit(functools.partial(kv_codec.encode, codec=codec), in_shardings=placed, out_shardings=placed)

    @functools.cache  # noqa: B019 - one Steps per engine, a handful of tensors and codecs
    def ingest(self, group: int, tensor: int, codec: str) -> Callable[[jax.Array, Any, IngestPlan], tuple[jax.Array, jax.Array]]:
        """(pool, rows [R, heads, width] as `codec` writes them, plan) -> (pool, fence), for one tensor.

        A row is one layer's token, or state. The pool is donated; a ready fence means the rows were read.
        """
        shard, cached = self.sharders["decode"], self.spec.groups[group]
        spec = cached.cache.tensors[tensor]
        axis = None if spec.shared else f"{heads_axis(spec)}/{spec.heads}"
        rows, address = shard(None, axis, None), shard("pages", None)

        def local(pool: jax.Array, rows: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
            plain = rows if codec == "none" else kv_codec.decode(rows, codec, pool.dtype, spec.width)
            # As one layer of the whole pool: the pages of a plan are the pool's.
            if cached.cache.kind == "state":
                return write_pages(pool, plain[None], page[0], pages_per_layer=pool.shape[1])
            return write_tokens(pool, plain[None], page[0], offset[0], pages_per_layer=pool.shape[1])

        axes = (pool_axes(spec), (None, heads_axis(spec), None), ("pages", None), ("pages", None))
        run = island(shard)(local, axes, pool_axes(spec))

        def ingest(pool: jax.Array, rows: jax.Array, plan: IngestPlan) -> tuple[jax.Array, jax.Array]:
            placed = rows if spec.shared else shard.spread(rows, spec.heads, axis=1)
            return run(pool, placed, plan.page, plan.offset), plan.page[0, 0] + 0

        pool, fence = self.pool_formats[group][tensor], NamedSharding(shard.mesh, PartitionSpec())
        return jax.jit(ingest, donate_argnums=(0,), in_shardings=(pool, rows, IngestPlan(address, address)), out_shardings=(pool, fence))

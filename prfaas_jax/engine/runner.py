"""The executing half of a step and the only caller of jax: owns parameters and pools, runs plans, exports what is new."""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from prfaas_jax.engine.api import Job
from prfaas_jax.engine.compiles import compile_count
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.plan import DecodePlan, IngestPlan, PrefillPlan, plan_decode, plan_ingest, plan_prefill
from prfaas_jax.engine.steps import Drawn, Part, Steps
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import CODECS, encoded
from prfaas_jax.kvcache.pools import PoolGeometry, Pools, create_pools
from prfaas_jax.kvcache.segments import CARRIER, Segment, SegmentKey, kept_part, layer_blocks
from prfaas_jax.kvcache.spec import DTYPE_BYTES, CacheKind, CacheSpec, TensorSpec, cache_spec
from prfaas_jax.models.caching import New
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import AttentionConfig
from prfaas_jax.ops.kv_codec import rates
from prfaas_jax.ops.paged_attention import IMPLEMENTATIONS, default_implementation, supports
from prfaas_jax.scheduling.batching import Bucket, decode_buckets, prefill_buckets
from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh

# Sizes of scatters, each half of the next: a block of few layers that arrives alone is not padded to all of them.
_INGEST_SIZES = 3

# What a codec's rate is measured on.
_RATE_BYTES = 8 << 20


def choose_implementations(config: ModelConfig, options: EngineOptions, platform: str) -> tuple[str | None, ...]:
    """The paged attention of each cache group, None for groups without one; what the platform's default is, and why, is logged.

    Raises InvalidInput for an unknown name, or one that does not take the shapes of some group.
    """
    wanted = options.paged_attention
    if wanted is not None and wanted not in IMPLEMENTATIONS:
        raise InvalidInput("paged_attention", wanted, f"one of {IMPLEMENTATIONS}")
    chosen: list[str | None] = []
    for group in cache_spec(config).groups:
        mixer = config.layers[group.layers[0]].mixer
        if not isinstance(mixer, AttentionConfig) or mixer.window is not None:
            chosen.append(None)
            continue
        heads = mixer.num_heads // mixer.num_kv_heads
        shape = {"head_dim": mixer.head_dim, "value_dim": mixer.values, "page_size": options.page_size, "group": heads}
        sinks = mixer.sinks
        if wanted is None:
            name, reason = default_implementation(platform, **shape, sinks=sinks)
            logging.info("paged attention: %s (%s)", name, reason)
            chosen.append(name)
        elif reason_not := supports(wanted, **shape, sinks=sinks):
            raise InvalidInput("paged_attention", wanted, f"another one for {config.name}: {reason_not}")
        else:
            chosen.append(wanted)
    return tuple(chosen)


def pool_geometry(spec: CacheSpec, options: EngineOptions, data: int) -> PoolGeometry:
    """Sizes of the pools that `options` asks for on a mesh of `data` data shards."""
    keeps_slots = any(g.cache.kind != "paged" for g in spec.groups)
    slots = options.slots_per_shard(data) if keeps_slots else 0
    return PoolGeometry(options.page_size, options.pages_per_shard(data), options.pages_per_request, slots)


class Leaving(NamedTuple):
    """A part of a prefill step on its way out.

    Attributes:
        arrays: per group and codec that was asked for, its tensors so written, as `new_axes` says.
        layers: per group which of its layers they have.
    """

    arrays: dict[tuple[int, str], New]
    layers: tuple[range, ...]

    @property
    def ready(self) -> bool:
        """Whether all of it is there, so that reading it does not wait."""
        return all(array.is_ready() for array in jax.tree.leaves(self.arrays))


class Runner:
    """One model on one mesh, its pools and its compiled programs.

    `build.build_runner` has checked that mesh, options and model fit together.
    """

    def __init__(self, config: ModelConfig, options: EngineOptions, params: nnx.State, fingerprint: str, devices: list | None = None):
        spec = MeshSpec.parse(options.mesh)
        self.config, self.options, self.fingerprint, self.params = config, options, fingerprint, params
        self.spec = cache_spec(config)
        self.shards = spec.data
        self.mesh = make_mesh(spec, devices)
        self.platform = self.mesh.devices.flat[0].platform
        self.geometry = pool_geometry(self.spec, options, spec.data)
        implementations = choose_implementations(config, options, self.platform)
        self.steps = Steps(config, self.mesh, options.attention, self.geometry, implementations, self._segments)
        self.prefill_buckets = prefill_buckets(options.chunk, max(options.max_prefill_rows, self.shards), self.shards)
        self.decode_buckets = decode_buckets(options.max_rows, self.shards)
        self.reset_pools()
        self._warm_count: int | None = None
        self.codec_rates: dict[str, tuple[float, float]] = {}  # measured by `warmup`

    @property
    def _segments(self) -> int | None:
        """Pieces of a prefill step, None for as many as suit the model.

        On a CPU every program converts the bfloat16 weights and pools that it touches to float32, whole, so there one is best.
        """
        widened = self.platform == "cpu" and self.config.dtype == "bfloat16"
        return 1 if self.options.segments is None and widened else self.options.segments

    @property
    def _shard(self) -> Sharder:
        return self.steps.sharders["decode"]

    def reset_pools(self) -> None:
        """Fresh pools: at start, and after a failed step whose donated buffers must not be used again."""
        self.pools: Pools = ()  # the old ones go first: there may be no room for both
        self.pools = create_pools(self.spec, self.geometry, self._shard)

    # --- steps: dispatched asynchronously, in the order of the calls ---------------------------------------------------------

    def prefill(
        self, plan: PrefillPlan, export: Collection[tuple[CacheKind, str]] = (), dispatched: Callable[[], None] = lambda: None
    ) -> tuple[Drawn, tuple[Leaving, ...]]:
        """Runs a prefill step; returns what was drawn, and what is new of each kind in `export` as the codec beside it writes it.

        `dispatched` is called after every part: a device takes only so many programs in advance, so dispatch may have waited.
        """
        parts: list[Leaving] = []

        def take(part: Part) -> None:
            parts.append(self._leaving(part, export))
            dispatched()

        self.pools, drawn = self.steps.run_prefill(self.params, self.pools, plan, take)
        return drawn, tuple(parts)

    def _leaving(self, part: Part, export: Collection[tuple[CacheKind, str]]) -> Leaving:
        """Dispatches what a part needs to leave: its codecs, and the copy to the host."""
        arrays: dict[tuple[int, str], New] = {}
        for g, (group, tensors) in enumerate(zip(self.spec.groups, part.new, strict=True)):
            for name in (codec for kind, codec in export if kind == group.cache.kind and tensors):
                written = tensors if name == "none" else tuple(self.steps.encode(g, t, name)(array) for t, array in enumerate(tensors))
                arrays[g, name] = tuple(map(self._to_host, written))
        return Leaving(arrays, part.layers)

    def decode(self, plan: DecodePlan) -> Drawn:
        """Runs a decode step."""
        self.pools, drawn = self.steps.decode(self.params, self.pools, plan)
        return drawn

    def ingest_sizes(self, group: int) -> tuple[int, ...]:
        """How many rows the scatters of a group take, ascending: one of the largest size has `ingest_tokens` tokens of all layers.

        States are large and go one layer at a time.
        """
        cached = self.spec.groups[group]
        if cached.cache.kind == "state":
            return (1,)
        tokens = min(self.options.ingest_tokens, cached.cache.window or self.options.ingest_tokens)
        rows = tokens * len(cached.layers)
        return tuple(sorted({-(-rows // 2**i) for i in range(_INGEST_SIZES)}))

    def ingest(self, group: int, tensor: int, codec: str, rows: np.ndarray, plan: IngestPlan) -> jax.Array:
        """Scatters received rows [R, heads, width] of one tensor as `codec` writes them, R being one of `ingest_sizes`.

        `rows` may be reused when the returned fence is ready.
        """
        dtype = jnp.dtype(encoded(self.spec.groups[group].cache.tensors[tensor], codec).dtype)
        data = rows.view(dtype) if rows.dtype != dtype else rows
        pool, fence = self.steps.ingest(group, tensor, codec)(self.pools[group][tensor], data, plan)
        tensors = tuple(pool if i == tensor else p for i, p in enumerate(self.pools[group]))
        self.pools = tuple(tensors if g == group else p for g, p in enumerate(self.pools))
        return fence

    def _to_host(self, array: jax.Array) -> jax.Array:
        """Starts the copy into pinned host memory where the device has its own; on CPU the arrays already are host memory."""
        return array if self.platform == "cpu" else jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))

    def export(self, part: Leaving, row: int, start: int, count: int, job: Job) -> Iterator[Segment]:
        """Segments of one row of a part of an exported chunk, as the job's codec writes them; waits for the part's computation.

        A window leaves only where the prompt's last tokens lie, a state only with the last chunk, and nothing that the receiver holds.

        Args:
            part: one of those that `prefill` returned with the job's codec in `export`.
            row: the row in the chunk.
            start: the row's first position.
            count: its tokens in this chunk.
            job: whose prompt it is.

        Only addressable shards are read. Payloads are contiguous `[layers, tokens, heads, width]`.
        """
        for g, (group, has) in enumerate(zip(self.spec.groups, part.layers, strict=True)):
            tokens = kept_part(group.cache, (start, start + count), len(job.prompt), job.held_tokens)
            if not has or tokens is None:
                continue
            name = job.codec.of(group.cache.kind)
            for t, array in enumerate(part.arrays[g, name]):
                spec = encoded(group.cache.tensors[t], name)
                for values, heads in self._slices(spec, array, row):
                    kept = values[:, None] if group.cache.kind == "state" else values[:, tokens[0] - start : tokens[1] - start]
                    for layers in layer_blocks(group, t, has):
                        key = SegmentKey(g, t, layers, tokens, heads)
                        yield _segment(key, spec, kept[layers[0] - has.start : layers[1] - has.start])

    def _slices(self, tensor: TensorSpec, array: jax.Array, row: int) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
        """One row's values [layers, (tokens,) heads, width] per head slice, without replicas and copies, and the heads that they are."""
        copies = 1 if tensor.shared else self._shard.copies(tensor.heads)
        seen = set()
        for shard in array.addressable_shards:
            bounds = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
            rows, placed = bounds[1], bounds[-2]
            # In copies, every device holds one head.
            heads = (placed[0], placed[1]) if copies == 1 else (placed[0] // copies, placed[0] // copies + 1)
            if not rows[0] <= row < rows[1] or heads in seen:
                continue  # another data shard's row, a replica or a copy
            seen.add(heads)
            yield np.asarray(shard.data)[:, row - rows[0]], heads

    # --- warm-up -------------------------------------------------------------------------------------------------------------

    def warmup(self, *, prefill: bool, decode: bool, ingest: bool) -> None:
        """Compiles every program that this engine may need by running it once on padded rows."""
        width = self.geometry.width
        buckets: list[Bucket | int | str] = [*self.prefill_buckets] if prefill else []
        buckets += [*self.decode_buckets] if decode else []
        buckets += ["ingest"] if ingest else []
        for bucket in tqdm(buckets, desc=f"compiling {self.config.name}", unit="program", leave=False):
            if isinstance(bucket, Bucket):
                jax.block_until_ready(self.prefill(plan_prefill([], bucket.rows, bucket.tokens, width), self._codecs()))
            elif isinstance(bucket, int):
                jax.block_until_ready(self.decode(plan_decode([], bucket, width)))
            else:
                self._warm_ingest()
        self.codec_rates.update((name, self._codec_rate(name)) for name in self.options.codec_names)
        self._warm_count = compile_count()

    def _codecs(self) -> list[tuple[CacheKind, str]]:
        """Kinds that are cached, each with every codec that jobs may ask for."""
        kinds = dict.fromkeys(group.cache.kind for group in self.spec.groups)
        return [(kind, name) for kind in kinds for name in ("none", *self.options.codec_names) if name in CODECS[kind]]

    def _codec_rate(self, name: str) -> tuple[float, float]:
        """Canonical bytes per second that one device encodes and decodes, on a piece of some tensor that the codec may write."""
        kinds = [kind for kind, names in CODECS.items() if name in names]
        tensor = next((g.cache.tensors[0] for g in self.spec.groups if g.cache.kind in kinds), None)
        if tensor is None:
            return float("inf"), float("inf")
        tokens = _RATE_BYTES // (tensor.width * DTYPE_BYTES[tensor.dtype])
        return rates(jnp.ones((tokens, 1, tensor.width), tensor.dtype), name)

    def _warm_ingest(self) -> None:
        for g, group in enumerate(self.spec.groups):
            for name in (name for kind, name in self._codecs() if kind == group.cache.kind):
                for tensor, spec in enumerate(encoded(t, name) for t in group.cache.tensors):
                    for size in self.ingest_sizes(g):
                        rows = np.zeros((size, spec.heads, spec.width), CARRIER[spec.dtype])
                        jax.block_until_ready(self.ingest(g, tensor, name, rows, plan_ingest([], size, self.shards)))

    def compiles_after_warmup(self) -> int:
        """XLA compilations in this process since `warmup` ended; 0 before it."""
        return 0 if self._warm_count is None else compile_count() - self._warm_count


def _segment(key: SegmentKey, spec: TensorSpec, values: np.ndarray) -> Segment:
    return Segment(key, np.ascontiguousarray(values).view(CARRIER[spec.dtype]).reshape(-1).data.cast("B"))

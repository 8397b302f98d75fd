"""The executing half of a step and the only caller of jax: owns parameters and pools, runs plans, exports new KV."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from prfaas_jax.engine.compiles import compile_count
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.plan import DecodePlan, IngestPlan, PrefillPlan, plan_decode, plan_ingest, plan_prefill
from prfaas_jax.engine.steps import Drawn, StepGeometry, Steps
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.pools import Pools, create_pools
from prfaas_jax.kvcache.segments import Segment, SegmentKey
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.ops.paged_attention import IMPLEMENTATIONS, default_implementation
from prfaas_jax.scheduling.batching import Bucket, decode_buckets, prefill_buckets
from prfaas_jax.sharding import MeshSpec, make_mesh

# bfloat16 has no buffer protocol: it leaves and enters as uint16.
_CARRIER: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}


def choose_implementation(config: ModelConfig, options: EngineOptions, platform: str) -> str:
    """The paged-attention implementation for this engine; what the platform's default is, and why, is logged."""
    if options.paged_attention is not None:
        if options.paged_attention not in IMPLEMENTATIONS:
            raise InvalidInput("paged_attention", options.paged_attention, f"one of {IMPLEMENTATIONS}")
        return options.paged_attention
    group = config.num_heads // config.num_kv_heads
    name, reason = default_implementation(platform, head_dim=config.head_dim, page_size=options.page_size, group=group)
    logging.info("paged attention: %s (%s)", name, reason)
    return name


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
        self.geometry = StepGeometry(options.page_size, options.pages_per_shard(spec.data), options.pages_per_request)
        implementation = choose_implementation(config, options, self.platform)
        self.steps = Steps(config, self.mesh, options.attention, self.geometry, implementation)
        self.prefill_buckets = prefill_buckets(options.chunk, max(options.max_prefill_rows, self.shards), self.shards)
        self.decode_buckets = decode_buckets(options.max_rows, self.shards)
        self.reset_pools()
        self._warm_count: int | None = None

    def reset_pools(self) -> None:
        """Fresh pools: at start, and after a failed step whose donated buffers must not be used again."""
        self.pools: Pools = ()  # the old ones go first: there may be no room for both
        self.pools = create_pools(self.spec, self.geometry.pages, self.geometry.page_size, self.shards, self.steps.pool_sharding)

    # --- steps: dispatched asynchronously, in the order of the calls ---------------------------------------------------------

    def prefill(self, plan: PrefillPlan, export: bool = True) -> tuple[Drawn, Pools]:
        """Runs a prefill step; returns what was drawn and the new (k, v) [L, B, T, K, H], on their way to the host if `export`."""
        self.pools, drawn, kv = self.steps.prefill(self.params, self.pools, plan)
        return drawn, self._to_host(kv) if export else kv

    def decode(self, plan: DecodePlan) -> Drawn:
        """Runs a decode step."""
        self.pools, drawn = self.steps.decode(self.params, self.pools, plan)
        return drawn

    def ingest(self, tensor: int, block: np.ndarray, plan: IngestPlan) -> jax.Array:
        """Scatters a received block [L, R, heads, width] of one tensor; `block` may be reused when the fence is ready."""
        dtype = self.pools[tensor].dtype
        pool, fence = self.steps.ingest(self.pools[tensor], block.view(dtype) if block.dtype != dtype else block, plan)
        self.pools = tuple(pool if i == tensor else p for i, p in enumerate(self.pools))
        return fence

    def _to_host(self, kv: Pools) -> Pools:
        """Starts the copy into pinned host memory where the device has its own; on CPU the arrays already are host memory."""
        if self.platform == "cpu":
            return kv
        return tuple(jax.device_put(x, x.sharding.with_memory_kind("pinned_host")) for x in kv)

    def export(self, kv: Pools, row: int, start: int, count: int) -> Iterator[Segment]:
        """Segments of one row of an exported chunk, one per tensor and head slice; waits for the chunk's computation.

        Only addressable shards are read. Payloads are contiguous `[layers, count, heads, width]`.
        """
        for tensor, array in enumerate(kv):
            seen = set()
            for shard in array.addressable_shards:
                _, rows, _, heads, _ = (s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True))
                if not rows[0] <= row < rows[1] or heads in seen:
                    continue  # another data shard's row, or a replica
                seen.add(heads)
                host = np.asarray(shard.data)[:, row - rows[0], :count]
                payload = np.ascontiguousarray(host).view(_CARRIER[self.spec.groups[0].cache.tensors[tensor].dtype])
                key = SegmentKey(0, tensor, (0, host.shape[0]), (start, start + count), heads)
                yield Segment(key, payload.reshape(-1).data.cast("B"))

    # --- warm-up -------------------------------------------------------------------------------------------------------------

    def warmup(self, *, prefill: bool, decode: bool, ingest: bool) -> None:
        """Compiles every program that this engine may need by running it once on padded rows."""
        width = self.geometry.width
        buckets: list[Bucket | int | str] = [*self.prefill_buckets] if prefill else []
        buckets += [*self.decode_buckets] if decode else []
        buckets += ["ingest"] if ingest else []
        for bucket in tqdm(buckets, desc=f"compiling {self.config.name}", unit="program", leave=False):
            if isinstance(bucket, Bucket):
                jax.block_until_ready(self.prefill(plan_prefill([], bucket.rows, bucket.tokens, width)))
            elif isinstance(bucket, int):
                jax.block_until_ready(self.decode(plan_decode([], bucket, width)))
            else:
                self._warm_ingest()
        self._warm_count = compile_count()

    def _warm_ingest(self) -> None:
        size = self.options.ingest_tokens
        plan = plan_ingest(np.zeros(1, np.int32), self.geometry.page_size, (0, 0), size, 0, self.shards)
        for tensor, t in enumerate(self.spec.groups[0].cache.tensors):
            block = np.zeros((self.config.num_layers, size, t.heads, t.width), _CARRIER[t.dtype])
            jax.block_until_ready(self.ingest(tensor, block, plan))

    def compiles_after_warmup(self) -> int:
        """XLA compilations in this process since `warmup` ended; 0 before it."""
        return 0 if self._warm_count is None else compile_count() - self._warm_count

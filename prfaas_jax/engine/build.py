"""From options to a running engine: every check that needs no weights comes first, then weights, pools, compilation."""

import contextlib
import os
from pathlib import Path

import jax
from absl import logging

from prfaas_jax.engine.compiles import compile_count
from prfaas_jax.engine.decode import DecodeWorker
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.prefill import PrefillWorker
from prfaas_jax.engine.runner import Runner, choose_implementations
from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.checkpoint import Loaded, load
from prfaas_jax.models.source import RandomConfig, read_config
from prfaas_jax.scheduling.batching import decode_buckets, prefill_buckets
from prfaas_jax.sharding import MeshSpec, Sharder, check_divides, make_mesh


def cache_dir() -> Path:
    """Where converted weights and compiled programs are kept: $PRFAAS_CACHE, or ~/.cache/prfaas_jax."""
    return Path(os.environ.get("PRFAAS_CACHE") or Path.home() / ".cache" / "prfaas_jax")


def enable_compile_cache() -> None:
    """Keeps compiled programs on disk, so that a second start compiles nothing; $JAX_COMPILATION_CACHE_DIR goes before ours."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def ensure_cpu_devices(count: int) -> None:
    """On the CPU a mesh needs pretended devices, asked for before the first use of jax; no effect on other platforms.

    Once jax is in use nothing changes, and `make_mesh` says what is missing.
    """
    if jax.config.values["jax_num_cpu_devices"] < count:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def build_runner(options: EngineOptions, random_config: RandomConfig | None = None) -> tuple[Runner, Loaded]:
    """Loads the checkpoint onto the mesh and makes pools and programs.

    `random_config` resolves "random:<name>" checkpoints. Raises InvalidInput for whatever does not fit together, in the order of
    cost: options, mesh, pool size, checkpoint.
    """
    config = read_config(options.checkpoint, options.dtype, random_config)
    spec = MeshSpec.parse(options.mesh)
    check_divides(config.axis_sizes(), spec, options.attention)
    if options.max_length > config.max_position:
        raise InvalidInput("max_length", options.max_length, f"at most max_position={config.max_position} of {config.name}")
    ensure_cpu_devices(spec.size)
    shard = Sharder(make_mesh(spec), "decode", options.attention)
    # What the Runner would refuse, refused before weights are loaded.
    prefill_buckets(options.chunk, max(options.max_prefill_rows, spec.data), spec.data)
    decode_buckets(options.max_rows, spec.data)
    if options.paged_attention is not None:
        choose_implementations(config, options, shard.mesh.devices.flat[0].platform)
    compile_count()  # starts counting before the first compilation
    enable_compile_cache()
    loaded = load(options.checkpoint, shard, options.dtype, random_config, progress=True)
    runner = Runner(loaded.config, options, loaded.params, loaded.fingerprint)
    cache = sum(pool.nbytes for pools in runner.pools for pool in pools)
    logging.info("%s on %s (%s): pools of %.2f GiB", loaded.config.name, spec, runner.platform, cache / 2**30)
    return runner, loaded


def build_pd(options: EngineOptions, random_config: RandomConfig | None = None) -> tuple[PrefillWorker, DecodeWorker, Loaded]:
    """Both engines over one set of weights, each with pools of its own, so that the process can take either role at any time."""
    runner, loaded = build_runner(options, random_config)
    other = Runner(loaded.config, options, loaded.params, loaded.fingerprint)
    if options.warmup:
        runner.warmup(prefill=True, decode=False, ingest=False)
        other.warmup(prefill=True, decode=True, ingest=True)
    prefill, decode = PrefillWorker(runner), DecodeWorker(other)
    prefill.start()
    decode.start()
    return prefill, decode, loaded


def build_prefill(options: EngineOptions, random_config: RandomConfig | None = None) -> tuple[PrefillWorker, Loaded]:
    """A prefill engine, compiled and started."""
    runner, loaded = build_runner(options, random_config)
    if options.warmup:
        runner.warmup(prefill=True, decode=False, ingest=False)
    worker = PrefillWorker(runner)
    worker.start()
    return worker, loaded


def build_decode(options: EngineOptions, random_config: RandomConfig | None = None) -> tuple[DecodeWorker, Loaded]:
    """A decode engine, with the programs of its local prefill, compiled and started."""
    runner, loaded = build_runner(options, random_config)
    if options.warmup:
        runner.warmup(prefill=True, decode=True, ingest=True)
    worker = DecodeWorker(runner)
    worker.start()
    return worker, loaded

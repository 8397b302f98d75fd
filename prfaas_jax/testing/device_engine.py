"""Whole engines on whatever device is here: the two paths compared, and how far from the device's peaks the steps land."""

import dataclasses
import functools
import math
import queue
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from prfaas_jax.engine import flops
from prfaas_jax.engine.api import Admitted, Event, Failed, Finished, Job, PrefillDone, SamplingParams, SegmentReady, Token
from prfaas_jax.engine.decode import DecodeWorker
from prfaas_jax.engine.offline import complete
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.prefill import PrefillWorker
from prfaas_jax.engine.runner import Runner, pool_geometry
from prfaas_jax.engine.targets import Chip
from prfaas_jax.errors import EngineFailed
from prfaas_jax.kvcache.pools import pool_shapes
from prfaas_jax.kvcache.spec import DTYPE_BYTES, cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.params import init_random
from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh
from prfaas_jax.testing.engine_bench import EngineBench, prompt

_TIMEOUT_S = 600.0
# float32 is a promise; bfloat16 paths differ by roundings of logits of this size.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def random_params(config: ModelConfig, scale: float = 1.0) -> nnx.State:
    """Random weights on the first device; `scale` multiplies the matrices: as initialised, attention is nearly uniform."""
    params = init_random(config, 0, Sharder(make_mesh(MeshSpec()), "decode"))
    if scale == 1.0:
        return params
    factor = lambda path, leaf: leaf if "norm" in jax.tree_util.keystr(path) else leaf * scale  # noqa: E731
    return jax.tree_util.tree_map_with_path(factor, params)


def check_equivalence(config: ModelConfig, lengths: Sequence[int], chunk: int, new_tokens: int = 8) -> dict[str, Any]:
    """Every prompt through one engine, and through a prefill engine whose exported KV a decode engine with other pages ingests."""
    params = random_params(config, scale=8.0)
    options = EngineOptions(f"random:{config.name}", chunk=chunk, max_length=max(lengths) + new_tokens, max_rows=8, max_prefill_rows=1)
    make = functools.partial(Runner, config, params=params, fingerprint=config.fingerprint())
    colocated = DecodeWorker(make(options))
    sender = PrefillWorker(make(dataclasses.replace(options, page_size=64)))
    receiver = DecodeWorker(make(options))
    sampling = SamplingParams(max_new_tokens=new_tokens, return_logits=True)
    workers = (colocated, sender, receiver)
    worst, bit_equal, mismatches = 0.0, True, []
    try:
        for worker in workers:
            worker.start()
        for length in lengths:
            tokens = prompt(length, config.vocab_size)
            (expected,) = complete(colocated, [tokens], sampling, _TIMEOUT_S)
            got, moved = _disaggregated(sender, receiver, Job(f"job-{length}", tuple(tokens), sampling))
            assert expected.logits is not None
            logits = np.stack([t.logits for t in got if t.logits is not None])
            error = float(np.abs(expected.logits - logits).max()) if logits.shape == expected.logits.shape else float("inf")
            worst, bit_equal = max(worst, error), bit_equal and np.array_equal(expected.logits, logits)
            if moved != colocated.spec.bytes(length):
                mismatches.append(f"length {length}: {moved} bytes moved, {colocated.spec.bytes(length)} expected")
            if not error <= TOLERANCE[config.dtype]:
                mismatches.append(f"length {length}: logits differ by {error:.3g}")
    finally:
        for worker in workers:
            worker.close()
    result = {"model": config.name, "dtype": config.dtype, "lengths": list(lengths), "tolerance": TOLERANCE[config.dtype]}
    return {**result, "max_logit_diff": worst if np.isfinite(worst) else None, "bit_equal": bit_equal, "mismatches": mismatches}


def _disaggregated(sender: PrefillWorker, receiver: DecodeWorker, job: Job) -> tuple[list[Token], int]:
    """One job with its KV handed over block by block; returns its tokens and the bytes handed over."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def wait(kind: type) -> Any:
        while not isinstance(event := events.get(timeout=_TIMEOUT_S), kind):
            if isinstance(event, Failed):
                raise EngineFailed(f"{job.ticket}: {event.error}") from event.error
            seen.append(event)
        return event

    seen: list[Event] = []
    receiver.reserve(job, events.put)
    wait(Admitted)
    sender.submit(job, events.put)
    done = wait(PrefillDone)
    moved = 0
    for event in seen:
        if isinstance(event, SegmentReady):
            key, payload = event.segment.key, event.segment.payload
            carrier = np.uint16 if key.tensor_spec(sender.spec).dtype == "bfloat16" else np.float32
            receiver.ingest(job.ticket, key, np.frombuffer(payload, carrier).reshape(key.shape(sender.spec)), lambda: None)
            moved += payload.nbytes
    seen.clear()
    receiver.commit(job.ticket, done.first)
    wait(Finished)
    return [e for e in seen if isinstance(e, Token)], moved


def needed_bytes(config: ModelConfig, options: EngineOptions) -> int:
    """Weights and pools; steps take little more."""
    spec = cache_spec(config)
    shapes = pool_shapes(spec, pool_geometry(spec, options, 1), Sharder(make_mesh(MeshSpec()), "decode"))
    pools = sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(shapes))
    return config.num_params() * DTYPE_BYTES[config.dtype] + pools


def bench_options(config: ModelConfig, context: int, batch: int, chunk: int) -> EngineOptions:
    """What `measure` runs with."""
    length = context + 64
    return EngineOptions(f"random:{config.name}", chunk=chunk, max_length=length, max_rows=batch, max_prefill_rows=1)


def measure(
    config: ModelConfig, params: nnx.State, chip: Chip | None, context: int = 2048, batch: int = 32, chunk: int = 512, repeats: int = 5
) -> dict[str, Any]:
    """Prefill and decode rates of one model, and their shares of the device's peaks (None where those are not known).

    Prefill: one prompt of `context` tokens, chunk by chunk. Decode: `batch` rows behind `context` tokens each. Flops are 2 per
    weight and token plus what attention, recurrences and experts multiply, by formula (engine/flops.py): kernels hide theirs.
    """
    runner = Runner(config, bench_options(config, context, batch, chunk), params, config.fingerprint())
    runner.warmup(prefill=True, decode=True, ingest=False)
    bench = EngineBench(runner, context)
    tokens = prompt(context, config.vocab_size)
    prefill_s = statistics.median(bench.prefill(tokens)[0] for _ in range(repeats))
    bench.fill([prompt(context, config.vocab_size, seed) for seed in range(batch)])
    decode_s = statistics.median(bench.decode(batch, 16)[0])

    embedding = config.vocab_size * config.hidden_size
    inner = sum(flops.island_flops(config, flops.Work.prefill(1, context, context), flops.Spread()).values())
    experts = sum(flops.mlp_flops(layer.mlp, config.hidden_size, flops.Work.prefill(1, context, context)) for layer in config.layers)
    # Experts are among the weights already.
    prefill_flops = 2 * flops.matmul_params(config) * context + 2 * embedding + inner - experts
    decoding = flops.Work.decoding(batch, context)
    unread = flops.unread_parameter_bytes(config, decoding, flops.Spread())
    decode_bytes = config.num_params() * DTYPE_BYTES[config.dtype] - unread + flops.cache_bytes(config, decoding, flops.Spread())
    result: dict[str, Any] = {
        "model": config.name,
        "dtype": config.dtype,
        "paged_attention": [name for name in runner.steps.implementations if name is not None],
        "context": context,
        "batch": batch,
        "chunk": chunk,
        "flops": "2 per weight and token plus attention and recurrences, by formula",
        "prefill_tok_s": context / prefill_s,
        "prefill_flops": prefill_flops,
        "mfu": prefill_flops / prefill_s / chip.peak_flops(config.dtype) if chip else None,
        "decode_tok_s": batch / decode_s,
        "decode_step_s": decode_s,
        "decode_bytes": decode_bytes,
        "bandwidth_share": decode_bytes / decode_s / chip.hbm_bandwidth if chip else None,
    }
    return result

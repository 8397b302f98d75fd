"""Prefill and decode speed of one engine, beside Hugging Face transformers with the same weights on the same threads.

    python -m experiments.bench_engine --checkpoint=random:qwen3_bench [--long] [--repeats=5] [--oracle_python=python-with-torch]
    python -m experiments.bench_engine --model=configs/models/hybrid_bench.py      (random weights; no oracle for hybrids)
    python -m experiments.bench_engine --ops                                       (KDA and gated delta: recurrent against chunkwise)

Measured on the Runner's steps as a server uses them: plan, execute, fetch tokens. The two sides take turns within one run, so a busy
machine slows both; `vs_hf` is the ratio of medians (null without torch). On a shared machine pin the run to one core (taskset -c 0):
threads that wait for each other suffer most from neighbours. The last line is JSON: prefill_tok_s, decode_tok_s, vs_hf, cold_start.
"""

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

CHECKPOINT = flags.DEFINE_string("checkpoint", "random:qwen3_bench", "checkpoint directory, GGUF file or random:<model config>")
MODEL = flags.DEFINE_string("model", None, "model config with random weights; the same as --checkpoint=random:<model config>")
OPS = flags.DEFINE_boolean("ops", False, "measure the linear-attention ops instead of an engine")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "weights, activations and cache; the oracle is always float32")
LONG = flags.DEFINE_boolean("long", False, "also a prompt of 8,192 tokens")
REPEATS = flags.DEFINE_integer("repeats", 5, "measured rounds per size and side", lower_bound=1)
CHUNK = flags.DEFINE_integer("chunk", 512, "prompt tokens per prefill step")
ORACLE_PYTHON = flags.DEFINE_string("oracle_python", sys.executable, "interpreter with torch and transformers")
WORKDIR = flags.DEFINE_string("workdir", "runs/bench_engine", "where to keep samples, summary and picture")

PREFILL_LENGTHS = (128, 512, 2048)
DECODE_BATCHES = (1, 8, 32)
CONTEXT = 512
OP_LENGTHS = (512, 1024, 2048, 4096, 8192)


def draw(workdir: Path) -> None:
    """Writes figure.png from requests.csv."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (workdir / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, phase, label in zip(axes, ("prefill", "decode"), ("prompt tokens", "batch"), strict=True):
        sizes = sorted({int(r["size"]) for r in rows if r["phase"] == phase})
        for shift, (side, marker) in enumerate((("ours", "o"), ("hf", "s"))):
            mine = [r for r in rows if (r["phase"], r["side"]) == (phase, side)]
            points = [(sizes.index(int(r["size"])), int(r["tokens"]) / float(r["seconds"])) for r in mine]
            if points:
                axis.plot([x + 0.1 * shift for x, _ in points], [y for _, y in points], marker, alpha=0.6, label=side)
        axis.set(title=phase, xlabel=label, ylabel="tokens/s", ylim=(0, None))
        axis.set_xticks(range(len(sizes)), [str(s) for s in sizes])
        axis.legend()
    figure.savefig(workdir / "figure.png", dpi=120)


def main(argv: list[str]) -> None:
    """Builds the engine, measures, reports."""
    del argv
    if OPS.value:
        _bench_ops()
        return
    checkpoint = CHECKPOINT.value if MODEL.value is None else f"random:{MODEL.value}"
    from configs.models import load_model_config
    from prfaas_jax.engine.build import build_runner
    from prfaas_jax.engine.options import EngineOptions
    from prfaas_jax.testing.engine_bench import EngineBench, compare, rates, ratios
    from prfaas_jax.testing.hf_oracle import HfOracle, export_hf, oracle_missing

    workdir = Workdir(WORKDIR.value, overwrite=True)
    lengths = (*PREFILL_LENGTHS, 8192) if LONG.value else PREFILL_LENGTHS
    batches = DECODE_BATCHES
    # A row holds the longest prompt; pages for all decode rows at their context, and for one such prompt.
    page, longest = 64, max(lengths) + 64
    options = EngineOptions(
        checkpoint,
        dtype=DTYPE.value,
        chunk=CHUNK.value,
        page_size=page,
        max_length=longest,
        max_rows=max(batches),
        max_prefill_rows=1,
        pages=1 + max(batches) * -(-longest // page),
    )
    began = time.perf_counter()
    runner, loaded = build_runner(options, load_model_config)
    built = time.perf_counter()
    runner.warmup(prefill=True, decode=True, ingest=True)
    warm = time.perf_counter()
    bench = EngineBench(runner, CONTEXT)
    first, _ = bench.prefill(list(range(100)))
    cold = {"load_s": built - began, "compile_s": warm - built, "first_step_s": first, "total_s": time.perf_counter() - began}

    missing = oracle_missing(ORACLE_PYTHON.value)
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="prfaas-hf-") as scratch:
        oracle = None
        if missing is None:
            try:
                export_hf(Path(scratch), loaded.config, loaded.params)
            except InvalidInput as error:  # a model that export_hf does not write has no oracle
                missing = str(error)
            else:
                oracle = HfOracle(ORACLE_PYTHON.value, Path(scratch), threads)
        if missing is not None:
            print(f"no oracle: {missing}", file=sys.stderr)
        try:
            samples = list(compare(bench, oracle, lengths, batches, REPEATS.value))
        finally:
            if oracle is not None:
                oracle.close()
    result: dict[str, Any] = {
        "checkpoint": checkpoint,
        "prefill_tok_s": rates(samples, "ours", "prefill"),
        "decode_tok_s": rates(samples, "ours", "decode"),
        "vs_hf": ratios(samples),
        "vs_hf_missing": missing,
        "cold_start": {name: round(value, 2) for name, value in cold.items()},
        "compiles_after_warmup": runner.compiles_after_warmup(),
    }
    _table(result, {phase: rates(samples, "hf", phase) for phase in ("prefill", "decode")})
    workdir.write_config({**flags.FLAGS.flag_values_dict(), "options": dataclasses.asdict(options)})
    workdir.write_env()
    workdir.write_requests([dataclasses.asdict(s) for s in samples])
    draw(workdir.path)
    workdir.write_summary(result)
    headline(result)


def _bench_ops() -> None:
    """The linear-attention ops by form; samples, summary and picture go where the engine's would."""
    from prfaas_jax.testing import ops_bench

    workdir = Workdir(WORKDIR.value, overwrite=True)
    samples = list(ops_bench.measure(OP_LENGTHS, REPEATS.value))
    result: dict[str, Any] = {"heads": ops_bench.HEADS, "head_dim": ops_bench.DIM, "ops": ops_bench.summary(samples)}
    print(f"{'':12} {'tokens':>6} {'recurrent tok/s':>16} {'chunkwise tok/s':>16} {'speedup':>8} {'at most':>8}")
    for kind, by_tokens in result["ops"].items():
        for tokens, r in by_tokens.items():
            rates = f"{r['recurrent_tok_s']:>16.0f} {r['chunkwise_tok_s']:>16.0f}"
            print(f"{kind:12} {tokens:>6} {rates} {r['speedup']:>8.2f} {r['speedup_bound']:>8.2f}")
    print("at most: were chunks ready at no cost, and only what depends on the state left")
    workdir.write_config(flags.FLAGS.flag_values_dict())
    workdir.write_env()
    workdir.write_requests([dataclasses.asdict(s) for s in samples])
    workdir.write_summary(result)
    draw_ops(workdir.path)
    headline(result)


def draw_ops(workdir: Path) -> None:
    """Writes figure.png from summary.json."""
    import json

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ops = json.loads((workdir / "summary.json").read_text())["ops"]
    figure, axes = plt.subplots(1, len(ops), figsize=(9, 3.5), layout="constrained", sharey=True)
    for axis, (kind, by_tokens) in zip(axes, ops.items(), strict=True):
        for form, marker in (("recurrent", "s"), ("chunkwise", "o")):
            axis.loglog([int(t) for t in by_tokens], [r[f"{form}_tok_s"] for r in by_tokens.values()], marker=marker, label=form)
        axis.set(title=kind, xlabel="tokens", ylabel="tokens/s")
        axis.legend()
    figure.savefig(workdir / "figure.png", dpi=120)


def _table(result: dict[str, Any], theirs: dict[str, dict[str, float]]) -> None:
    print(f"{'':8} {'size':>6} {'ours tok/s':>12} {'HF tok/s':>12} {'ratio':>7}")
    for phase in ("prefill", "decode"):
        for size, ours in result[f"{phase}_tok_s"].items():
            hf = theirs[phase].get(size)
            other = f"{hf:12.1f} {ours / hf:7.2f}" if hf else f"{'-':>12} {'-':>7}"
            print(f"{phase:8} {size:>6} {ours:12.1f} {other}")
    cold = result["cold_start"]
    parts = f"weights {cold['load_s']} s, programs {cold['compile_s']} s, first step {cold['first_step_s']} s"
    print(f"cold start {cold['total_s']} s: {parts}")


if __name__ == "__main__":
    run_main(main)

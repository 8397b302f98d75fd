"""Compiles the prefill and decode steps of a model for accelerators that are not here, and says what they would need.

    python -m experiments.compile_for --model=qwen3_8b --target=tpu:v5e:4x4 --mesh=data:2,model:8
    python -m experiments.compile_for --model=qwen3_8b --target=gpu:h200:1x1x8 --mesh=model:8 --batch=64 --context=8192

Hybrids with experts, in bfloat16; one to five minutes each on a busy machine with two cores:

    python -m experiments.compile_for --model=kimi_linear_48b --target=tpu:v5p:2x2x2 --mesh=expert:8
    python -m experiments.compile_for --model=kimi_linear_48b --target=tpu:v6e:4x4 --mesh=expert:8,model:2
    python -m experiments.compile_for --model=kimi_linear_48b --target=gpu:h200:1x1x8 --mesh=expert:8
    python -m experiments.compile_for --model=qwen3_5_397b --target=tpu:v6e:8x8 --mesh=data:2,expert:16,model:2
    python -m experiments.compile_for --model=paper_1t --target=tpu:v5p:4x4x4 --mesh=expert:64

Per chip: bytes and whether they fit, collectives, kernels, flops, roofline seconds. All of it compiled, not run: seconds are lower
bounds. Prefill is the last chunk of a prompt of --context tokens, one row per data shard; decode has --batch rows of that length.
Flops of attention, recurrences and experts are by formula; experts are taken to be equally busy. "weights copied" is what a product that
cannot read weights as they lie costs on top of the bounds. Over 64 chips a TPU writes prefill's gathers as all-reduces.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from configs.models import load_model_config
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.targets import Target, prepare_environment
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

if TYPE_CHECKING:
    from prfaas_jax.engine.aot import DoesNotFit, StepReport

MODEL = flags.DEFINE_string("model", None, "model config: a name or file under configs/models", required=True)
TARGET = flags.DEFINE_string("target", None, "topology, such as tpu:v5e:4x4 or gpu:h200:1x1x8", required=True)
MESH = flags.DEFINE_string("mesh", "data:1,model:1", "mesh over all chips of the target")
ATTENTION = flags.DEFINE_enum("attention", "sharded", ["sharded", "replicated"], "heads over the model axis, or whole")
BATCH = flags.DEFINE_integer("batch", 32, "rows of the decode step")
CONTEXT = flags.DEFINE_integer("context", 4096, "tokens of prompt and answer per request")
PAGES = flags.DEFINE_integer("pages", None, "pages per layer and data shard; default: enough for --batch requests of --context")
PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "tokens per page")
SLOTS = flags.DEFINE_integer("slots", None, "slots of windows and states per layer and data shard; default: enough for --batch requests")
CHUNK = flags.DEFINE_integer("chunk", 256, "prompt tokens per row and prefill step")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "weights, activations and cache; default: the model's")
KERNEL = flags.DEFINE_string("paged_attention", None, "implementation of decode attention; default: the target's")
WORKDIR = flags.DEFINE_string("workdir", None, "where to keep config, environment and the whole report")

_UNITS = ("B", "KiB", "MiB", "GiB")


def size(value: float) -> str:
    """Bytes for people."""
    for unit in _UNITS:
        if abs(value) < 1024 or unit == _UNITS[-1]:
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError


def describe(name: str, report: "StepReport | DoesNotFit", out: Any = sys.stderr) -> None:
    """Prints one step's report for people."""
    print(f"\n{name} ({report.label})", file=out)
    for part, value in report.bytes_per_chip.items():
        print(f"  {part:<14} {size(value):>12} per chip", file=out)
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    if message := fields.get("message"):
        print(f"  fits           NO, by at least {size(report.over_bytes)}: {message}", file=out)
        return
    print(f"  fits           {'yes' if report.fits else 'NO, by ' + size(fields['over_bytes'])}", file=out)
    print(f"  aliased        {size(fields['aliased_bytes']):>12}, pool copies: {', '.join(fields['pool_copies']) or 'none'}", file=out)
    print(f"  weights copied {size(fields['weights_copied_bytes']):>12} per step", file=out)
    for kind, c in fields["collectives"].items():
        where = f"{c['per_layer']:.3g} per layer of the body, {c['outside']:.0f} outside, {c['per_step']:.0f} per step"
        print(f"  {kind:<18} {where}, {size(c['bytes'])}", file=out)
    print(f"  kernels        {', '.join(f'{k} x{n}' for k, n in fields['kernels'].items()) or 'none'}", file=out)
    formulas = ", ".join(f"{kind} {flops:.4g}" for kind, flops in fields["island_flops_per_chip"].items())
    print(f"  flops          {fields['flops_per_chip']:.4g} per chip, of these by formula {formulas}", file=out)
    bounds = ", ".join(f"{what} {seconds * 1e3:.3f} ms" for what, seconds in fields["bounds_s"].items())
    print(f"  roofline       {fields['roofline_s'] * 1e3:.3f} ms ({bounds})", file=out)
    print(f"  compiled in    {fields['compile_s']:.1f} s", file=out)


def main(argv: list[str]) -> None:
    """Flags to one deployment, its two steps compiled, the report to files and the headline."""
    del argv
    target = Target.parse(TARGET.value)
    config = load_model_config(MODEL.value)
    if DTYPE.value is not None:
        config = dataclasses.replace(config, dtype=DTYPE.value)
    options = EngineOptions(
        checkpoint=f"random:{config.name}",
        mesh=MESH.value,
        attention=ATTENTION.value,  # type: ignore[arg-type]  # an enum flag
        page_size=PAGE_SIZE.value,
        pages=PAGES.value,
        slots=SLOTS.value,
        chunk=CHUNK.value,
        max_length=CONTEXT.value,
        max_rows=BATCH.value,
        paged_attention=KERNEL.value,
    )
    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    target.check_installed()
    prepare_environment()
    from prfaas_jax.engine.aot import LABEL, compile_steps, deployment

    deployed = deployment(config, target, options)
    reports = compile_steps(deployed, progress=lambda text: print(text, file=sys.stderr, flush=True))
    for name, report in reports.items():
        describe(f"{name} of {config.name} on {target}, {options.mesh}", report)
    result: dict[str, Any] = {
        "target": str(target),
        "chips": target.chips,
        "mesh": str(deployed.mesh),
        "model": config.name,
        "dtype": config.dtype,
        "label": LABEL,
        **{name: dataclasses.asdict(report) for name, report in reports.items()},
    }
    if workdir:
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_summary(result)
    headline(result)


if __name__ == "__main__":
    run_main(main)

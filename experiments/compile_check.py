"""Checks that the steps compile for accelerators that are not here, fit, and communicate as the sharding table says.

    make compile-check        (python -m experiments.compile_check)

A table of PASS and FAIL, 2 to 5 minutes on two cores; all of it compiled, not run. A target whose compiler is not installed is
skipped, with the reason; the exit code is 1 when a check fails or when no target could be checked.

What is expected of the collectives, per layer:
  prefill  2 gathers and 2 reductions. The residual stream is split along the sequence ("seq" -> model axis): its shards are gathered
           in front of the attention and the MLP projections, and the partial sums behind each are reduced to shards. TPU may write
           a reduction as an all-reduce that it slices, or as a ring of permutes between partial multiplications.
  decode   2 all-reduces: one token per row is too short to split, so partial sums come back whole.
And in the whole step nothing larger moves than one layer's activations: no weight, no pool, no logits.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from configs.models import load_model_config
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.targets import Target, prepare_environment
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

if TYPE_CHECKING:
    from prfaas_jax.engine.aot import Deployment, DoesNotFit, StepReport

WORKDIR = flags.DEFINE_string("workdir", None, "where to keep environment and all reports")
TARGETS = flags.DEFINE_list("targets", [], "check only these targets, such as gpu:h200:1x1x2; default: all")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on one target. `growth` compiles once more with twice the pages, to see that temporaries do not follow the pools."""

    model: str
    target: str
    mesh: str
    batch: int
    context: int
    growth: bool

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.model} {self.target} {self.mesh}"


CASES = (
    Case("qwen3_0_6b", "gpu:h200:1x1x2", "data:1,model:2", batch=8, context=2048, growth=True),
    Case("qwen3_8b", "gpu:h200:1x1x8", "data:1,model:8", batch=32, context=4096, growth=False),
    Case("qwen3_0_6b", "tpu:v5e:2x2", "data:1,model:4", batch=8, context=2048, growth=True),
    Case("qwen3_8b", "tpu:v5e:4x4", "data:2,model:8", batch=32, context=4096, growth=False),
)

# (what was checked, whether it holds, what was seen)
Check = tuple[str, bool, str]


def check_step(deployed: "Deployment", report: "StepReport") -> Iterator[Check]:
    """Everything that one compiled step must satisfy."""
    config, pools = deployed.config, report.bytes_per_chip["pools"]
    yield "fits", report.fits, f"{report.bytes_per_chip['total'] / 2**30:.2f} GiB of {deployed.chip.hbm_bytes / 2**30:.2f} GiB"
    yield "no pool copy", not report.pool_copies, ", ".join(report.pool_copies) or "none"
    yield "pools aliased", report.aliased_bytes >= pools, f"{report.aliased_bytes} of {pools} bytes"
    kernels = {"paged_attention": config.num_layers} if report.step == "decode" else {}
    yield "kernels", report.kernels == kernels, f"{report.kernels}, expected {kernels}"

    layer = {kind: c["per_layer"] for kind, c in report.collectives.items() if c["per_layer"]}
    if report.step == "decode":
        yield "collectives per layer", layer == {"all-reduce": 2}, f"{layer}, expected 2 all-reduces and nothing else"
    else:
        # The permutes are those of the rings.
        seen = {kind: sum(n for k, n in layer.items() if k in names) for kind, names in _PREFILL_KINDS.items()}
        rest = set(layer) - {k for names in _PREFILL_KINDS.values() for k in names} - {"collective-permute"}
        ok = seen == {"gathers": 2, "reductions": 2} and not rest
        yield "collectives per layer", ok, f"{layer}, expected 2 gathers and 2 reductions"
    activations = report.tokens // deployed.mesh.data * config.hidden_size * _bytes_per_element(config.dtype)
    largest = max((c["largest_bytes"] for c in report.collectives.values()), default=0)
    yield "largest collective", largest <= activations, f"{largest:.0f} bytes, at most {activations}, one layer's activations"

    expected = _matmul_flops(deployed, report)
    found = report.flops_per_chip - report.attention_flops_per_chip
    yield "flops of all matmuls", abs(found / expected - 1) < 0.01, f"{found:.5g}, expected {expected:.5g}"


_PREFILL_KINDS = {
    "gathers": ("all-gather", "all-gather in a ring"),
    "reductions": ("reduce-scatter", "all-reduce", "reduce-scatter in a ring"),
}


def _bytes_per_element(dtype: str) -> int:
    return {"bfloat16": 2, "float32": 4}[dtype]


def _matmul_flops(deployed: "Deployment", report: "StepReport") -> float:
    """Per chip: two per weight and token in the layers, and per row in the head."""
    config = deployed.config
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    layers = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    return 2 * (report.tokens * layers + report.rows * head) / deployed.mesh.size


def check_case(case: Case, show: Any) -> tuple[list[Check], dict[str, Any]]:
    """Compiles a case and checks its steps; also returns the reports."""
    from prfaas_jax.engine.aot import DoesNotFit, compile_steps, deployment

    def compiled(pages_factor: int) -> "tuple[Deployment, dict[Any, StepReport | DoesNotFit]]":
        options = EngineOptions(checkpoint=f"random:{case.model}", mesh=case.mesh, max_length=case.context, max_rows=case.batch)
        data = Target.parse(case.target).chips // _model_axis(case.mesh)
        options = dataclasses.replace(options, pages=pages_factor * options.pages_per_shard(data))
        deployed = deployment(load_model_config(case.model), Target.parse(case.target), options)
        return deployed, compile_steps(deployed, show)

    deployed, reports = compiled(1)
    checks: list[Check] = []
    for step, report in reports.items():
        if isinstance(report, DoesNotFit):
            checks.append((f"{step}: fits", False, report.message))
        else:
            checks += [(f"{step}: {what}", ok, seen) for what, ok, seen in check_step(deployed, report)]
    if case.growth:
        for step, larger in compiled(2)[1].items():
            before, after = reports[step].bytes_per_chip, larger.bytes_per_chip
            # A refused step reports no temporaries and has failed "fits" already.
            pools, temporaries = (after.get(part, 0) - before.get(part, 0) for part in ("pools", "temporaries"))
            seen = f"{temporaries:+d} bytes of temporaries for {pools:+d} of pools"
            checks.append((f"{step}: temporaries do not follow the pools", pools > 0 and temporaries <= 0.01 * pools, seen))
    return checks, {step: dataclasses.asdict(report) for step, report in reports.items()}


def _model_axis(mesh: str) -> int:
    from prfaas_jax.sharding import MeshSpec

    return MeshSpec.parse(mesh).model


def main(argv: list[str]) -> None:
    """Every case that can be compiled here, a table, and the headline."""
    del argv
    cases = [c for c in CASES if not TARGETS.value or c.target in TARGETS.value]
    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    prepare_environment()
    total, failed, skipped, reports = 0, [], [], {}
    for case in cases:
        if reason := Target.parse(case.target).missing():
            print(f"SKIP  {case.name}: needs {reason}")
            skipped.append(f"{case.name}: needs {reason}")
            continue
        checks, reports[case.name] = check_case(case, show=lambda text: print(text, file=sys.stderr, flush=True))
        for what, ok, seen in checks:
            print(f"{'PASS' if ok else 'FAIL'}  {case.name:<45} {what:<50} {seen}", flush=True)
            if not ok:
                failed.append(f"{case.name}: {what}: {seen}")
        total += len(checks)
    if workdir:
        workdir.write_env()
        workdir.write_summary({"checks": total, "failed": failed, "skipped": skipped, "reports": reports})
    if not total:
        print("nothing could be checked: install a compiler with `make install-compile`", file=sys.stderr)
    headline({"checks": total, "failed": failed, "skipped": skipped})
    sys.exit(1 if failed or not total else 0)


if __name__ == "__main__":
    run_main(main)

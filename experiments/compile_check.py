"""Checks that the steps compile for accelerators that are not here, fit, and communicate as the sharding table says.

    make compile-check        (python -m experiments.compile_check)

A table of PASS and FAIL, 5 to 6 minutes on two cores; all of it compiled, not run. A target whose compiler is not installed is
skipped, with the reason; the exit code is 1 when a check fails or when no target could be checked.

What is expected of the collectives, per layer, whatever its mixer, and whether its feed-forward part is dense or a mixture of experts:
  prefill  2 gathers and 2 reductions. The residual stream is split along the sequence ("seq" -> expert and model axes): its shards are
           gathered in front of the mixer and the MLP, and the partial sums behind each are reduced to shards. TPU may write
           a reduction as an all-reduce that it slices, or as a ring of permutes between partial multiplications.
  decode   2 all-reduces: one token per row is too short to split, so partial sums come back whole. Experts need no more than that:
           every token is on all devices of its data shard, and routed and shared experts are summed at once.
A norm over all heads jointly adds the reduction of one number per token where devices share the heads.
And in the whole step nothing larger moves than one layer's activations: no weight, no pool, no state, no logits.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from configs.models import load_model_config
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.targets import Target, prepare_environment
from prfaas_jax.models.layer_config import AttentionConfig, Layer, LightningConfig, MoeConfig
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

if TYPE_CHECKING:
    from prfaas_jax.engine.aot import Deployment, DoesNotFit, StepReport

WORKDIR = flags.DEFINE_string("workdir", None, "where to keep environment and all reports")
TARGETS = flags.DEFINE_list("targets", [], "check only these targets, such as gpu:h200:1x1x2; default: all")
MODELS = flags.DEFINE_list("models", [], "check only these models; default: all")
WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "cases compiled at once, 2 GB of memory each")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on one target. `growth` compiles once more with twice the pools, to see that temporaries do not follow them."""

    model: str
    target: str
    mesh: str
    batch: int
    context: int
    growth: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.model} {self.target} {self.mesh}"


def _toy(model: str, target: str, mesh: str, growth: bool = False) -> Case:
    return Case(model, target, mesh, batch=8, context=512, growth=growth)


# The slowest first: they run side by side.
CASES = (
    Case("kimi_linear_48b", "gpu:h200:1x1x8", "expert:4,model:2", batch=32, context=4096),
    _toy("kimi_linear_toy", "tpu:v5e:2x2", "expert:2,model:2", growth=True),
    Case("kimi_linear_48b", "tpu:v6e:4x4", "data:2,expert:8", batch=32, context=4096),
    _toy("mimo_toy", "gpu:h200:1x1x4", "expert:4", growth=True),
    _toy("qwen3_next_toy", "gpu:h200:1x1x4", "expert:2,model:2"),
    _toy("gated_delta_toy", "tpu:v5e:2x2", "model:4"),
    _toy("lightning_toy", "tpu:v5e:2x2", "expert:4"),
    _toy("deepseek_toy", "tpu:v5e:2x2", "expert:2,model:2"),
    _toy("gemma3_toy", "gpu:h200:1x1x4", "model:4"),
    _toy("qwen3_moe_toy", "gpu:h200:1x1x2", "expert:2"),
    Case("qwen3_0_6b", "gpu:h200:1x1x2", "data:1,model:2", batch=8, context=2048, growth=True),
    Case("qwen3_8b", "gpu:h200:1x1x8", "data:1,model:8", batch=32, context=4096),
    Case("qwen3_0_6b", "tpu:v5e:2x2", "data:1,model:4", batch=8, context=2048, growth=True),
    Case("qwen3_8b", "tpu:v5e:4x4", "data:2,model:8", batch=32, context=4096),
)

# (what was checked, whether it holds, what was seen)
Check = tuple[str, bool, str]


def check_step(deployed: "Deployment", report: "StepReport") -> Iterator[Check]:
    """Everything that one compiled step must satisfy."""
    pools = report.bytes_per_chip["pools"]
    yield "fits", report.fits, f"{report.bytes_per_chip['total'] / 2**30:.2f} GiB of {deployed.chip.hbm_bytes / 2**30:.2f} GiB"
    if deployed.platform != "tpu" or _fills_lanes(deployed):
        yield "no pool copy", not report.pool_copies, ", ".join(report.pool_copies) or "none"
    yield "no weight copy", not report.weights_copied_bytes, f"{report.weights_copied_bytes} bytes"
    yield "pools aliased", report.aliased_bytes >= pools, f"{report.aliased_bytes} of {pools} bytes"
    kernels = expected_kernels(deployed, report.step)
    yield "kernels", report.kernels == kernels, f"{report.kernels}, expected {kernels}"
    yield from _check_collectives(deployed, report)
    expected = matmul_flops(deployed, report)
    most = expected + _mergeable_flops(deployed, report)
    found = report.flops_per_chip - sum(report.island_flops_per_chip.values())
    seen = f"{found:.5g}, expected {expected:.5g}{f' to {most:.5g}' if most > expected else ''}"
    yield "flops of all matmuls", 0.99 * expected < found < 1.01 * most, seen


def _fills_lanes(deployed: "Deployment") -> bool:
    """Whether all cached rows are as wide as a TPU's vectors: it re-lays narrower pools, which only toys have."""
    return all(t.width >= 128 for group in deployed.steps().spec.groups for t in group.cache.tensors)


def expected_kernels(deployed: "Deployment", step: str) -> dict[str, int]:
    """Executions of kernels: paged attention and products of experts where the platform has kernels that take the shapes."""
    from prfaas_jax.ops import moe
    from prfaas_jax.ops.paged_attention import needs_current_in_pool

    steps = deployed.steps()
    attention = sum(
        len(group.layers)
        for group, name in zip(steps.spec.groups, steps.implementations, strict=True)
        if name is not None and needs_current_in_pool(name)
    )
    kernels = {"paged_attention": attention if step == "decode" else 0}
    for layer in deployed.config.layers:
        if isinstance(layer.mlp, MoeConfig):
            shape = {"width": deployed.config.hidden_size, "intermediate": layer.mlp.intermediate_size // deployed.mesh.model}
            name, _ = moe.default_implementation(deployed.platform, **shape)
            of_layer = {"ragged": {"ragged-dot-metadata": 1, "ragged-dot-none": 3}, "pallas_gpu": {"expert_products": 2}}.get(name, {})
            kernels |= {kernel: kernels.get(kernel, 0) + times for kernel, times in of_layer.items()}
    return {name: times for name, times in kernels.items() if times}


# The permutes are those of the rings.
_KINDS = {
    "gathers": ("all-gather", "all-gather in a ring"),
    "reductions": ("reduce-scatter", "all-reduce", "reduce-scatter in a ring"),
    "moves": ("collective-permute",),
}


def _check_collectives(deployed: "Deployment", report: "StepReport") -> Iterator[Check]:
    config, pattern, decode = deployed.config, deployed.config.pattern, report.step == "decode"
    tensor, found = deployed.spread.heads, report.collectives

    def count(field: str) -> dict[str, float]:
        """By what they do; those that nothing is expected of stand by their own names."""
        seen = {what: sum(c[field] for kind, c in found.items() if kind in kinds) for what, kinds in _KINDS.items()}
        seen |= {kind: c[field] for kind, c in found.items() if not any(kind in kinds for kinds in _KINDS.values())}
        # What rings move is no collective of its own.
        if any("in a ring" in kind and c[field] for kind, c in found.items()):
            seen["moves"] = 0
        return {what: round(n, 6) for what, n in seen.items() if n}

    body = config.layers[pattern.head : pattern.head + pattern.body_layers]
    gathers = 0 if decode else 2
    norms = sum(joint_norms(layer, tensor) for layer in body) / max(1, len(body))
    expected = {what: n for what, n in {"gathers": gathers, "reductions": 2 + norms}.items() if n} if body else {}
    seen = count("per_layer")
    yield "collectives per layer", seen == {k: round(v, 6) for k, v in expected.items()}, f"{seen}, expected {expected}"

    # Beside head and tail layers: partial rows of the embedding are summed, and prompts' last tokens are looked up in gathered rows.
    alone = config.num_layers - len(body)
    expected = {what: n for what, n in {"gathers": gathers * alone, "reductions": 2 * alone + 1}.items() if n}
    seen = count("outside_large")
    looked_up = {**expected, "gathers": gathers * alone + 1}
    ok = seen == expected or (not decode and seen == looked_up)
    yield "large collectives outside the body", ok, f"{seen}, expected {expected}{'' if decode else ' or a gather more'}"

    activations = deployed.activation_bytes(report.step)
    largest = max((c["largest_bytes"] for c in found.values()), default=0)
    yield "largest collective", largest <= activations, f"{largest:.0f} bytes, at most {activations}, one layer's activations"


def joint_norms(layer: Layer, devices: int) -> int:
    """Norms over more heads than a device has: each reduces one number per token."""
    match layer.mixer:
        case AttentionConfig(qk_norm="all", num_kv_heads=kv_heads) if devices > 1:
            return 2 if kv_heads % devices == 0 else 1
        case LightningConfig(norm_groups=groups) if groups % devices:
            return 1
    return 0


# What islands multiply with stands in formulas.
_IN_ISLANDS = ("experts", "shared", "k_up", "v_up", "q_conv", "k_conv", "v_conv")
_NO_MATRIX = ("sinks", "a_log", "dt_bias", "correction_bias", "bias", "shared_gate")


def matmul_flops(deployed: "Deployment", report: "StepReport") -> float:
    """Per chip: two per weight of the chip and token of its data shard in the layers, and per row in the head.

    Of weights that all chips hold because there are fewer kv heads than chips, each needs those of one head.
    """
    from prfaas_jax.models.params import flat_names

    steps, data = deployed.steps(), deployed.mesh.data
    shard = steps.sharders["decode"]
    placed, total = flat_names(steps.params_shardings), 0.0
    head = "embed" if deployed.config.tie_embeddings else "lm_head"
    for name, leaf in flat_names(steps.abstract_params).items():
        parts = name.split("/")
        if set(parts) & {*_IN_ISLANDS, *_NO_MATRIX} or any("norm" in part for part in parts) or (name == "embed" != head):
            continue
        uses = report.rows if name == head else report.tokens
        heads = [int(axis.partition("/")[2]) for axis in leaf.axes if "/" in axis]
        needed = math.prod(1 / n for n in heads if shard.copies(n) > 1)
        total += 2 * uses / data * needed * math.prod(placed[name].get_value().shard_shape(leaf.shape))
    return total


def _mergeable_flops(deployed: "Deployment", report: "StepReport") -> float:
    """Per chip: shared experts' wide parts, which GPU compilers may multiply together with the router, under its name, in one dtype."""
    config = deployed.config
    if deployed.platform != "cuda" or config.dtype != "float32":
        return 0.0
    shared = sum(layer.mlp.shared_size for layer in config.layers if isinstance(layer.mlp, MoeConfig))
    return 4.0 * report.tokens * config.hidden_size * shared / deployed.mesh.size


def check_case(case: Case, show: Any) -> tuple[list[Check], dict[str, Any]]:
    """Compiles a case and checks its steps; also returns the reports."""
    from prfaas_jax.engine.aot import DoesNotFit, compile_steps, deployment
    from prfaas_jax.sharding import MeshSpec

    target = Target.parse(case.target)

    def compiled(factor: int) -> "tuple[Deployment, dict[Any, StepReport | DoesNotFit]]":
        options = EngineOptions(checkpoint=f"random:{case.model}", mesh=case.mesh, max_length=case.context, max_rows=case.batch)
        data = MeshSpec.parse(case.mesh).data
        pages, slots = factor * options.pages_per_shard(data), factor * options.slots_per_shard(data)
        options = dataclasses.replace(options, pages=pages, slots=slots)
        deployed = deployment(load_model_config(case.model), target, options)
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


def _in_worker(case: Case) -> tuple[list[Check], dict[str, Any]]:
    """A case in a process of its own."""
    if "jax" not in sys.modules:
        prepare_environment()
    return check_case(case, show=lambda text: print(text, file=sys.stderr, flush=True))


def main(argv: list[str]) -> None:
    """Every case that can be compiled here, a table, and the headline."""
    del argv
    cases = [c for c in CASES if (not TARGETS.value or c.target in TARGETS.value) and (not MODELS.value or c.model in MODELS.value)]
    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    total, failed, skipped, reports = 0, [], [], {}
    missing = {case.name: reason for case in cases if (reason := Target.parse(case.target).missing())}
    for name, reason in missing.items():
        print(f"SKIP  {name}: needs {reason}")
        skipped.append(f"{name}: needs {reason}")
    context = multiprocessing.get_context("spawn")  # each process prepares its environment before it imports jax
    with concurrent.futures.ProcessPoolExecutor(max(1, WORKERS.value), mp_context=context) as pool:
        running = {pool.submit(_in_worker, case): case for case in cases if case.name not in missing}
        for done in concurrent.futures.as_completed(running):
            case = running[done]
            checks, reports[case.name] = done.result()
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

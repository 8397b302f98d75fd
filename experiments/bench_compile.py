"""Compile time of one layer pattern at several depths: it follows head, body and tail, not how often the body repeats.

    python -m experiments.bench_compile [--model=paper_1t] [--repeats=7,14] [--rounds=3]

paper_1t is (head 0, body 4 x 14, tail 1): 57 layers, and 29 with half the repeats. Traces, lowers and compiles the prefill and decode
steps on one CPU device, compile cache off, the depths in turns; nothing is allocated or run. The last line is JSON: layers, seconds
(medians), and ratio, deepest against shallowest. Exit code 1 when a ratio passes --limit.
"""

import dataclasses
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags
from tqdm import tqdm

from configs.models import load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

if TYPE_CHECKING:
    from prfaas_jax.models.config import ModelConfig

MODEL = flags.DEFINE_string("model", "paper_1t", "model config whose pattern is compiled: a name or file under configs/models")
REPEATS = flags.DEFINE_list("repeats", ["7", "14"], "how often the body repeats, ascending")
ROUNDS = flags.DEFINE_integer("rounds", 3, "compilations of each step at each depth", lower_bound=1)
LIMIT = flags.DEFINE_float("limit", 1.2, "largest ratio that passes")
WORKDIR = flags.DEFINE_string("workdir", None, "where to keep environment and summary")


def at_depth(config: "ModelConfig", repeats: int) -> "ModelConfig":
    """The model with its body repeated `repeats` times; raises InvalidInput when it has no body, or the pattern would change."""
    pattern = config.pattern
    body = config.layers[pattern.head : pattern.head + pattern.period]
    tail = config.layers[pattern.head + pattern.body_layers :]
    deep = dataclasses.replace(config, layers=(*config.layers[: pattern.head], *body * repeats, *tail))
    if not pattern.period or dataclasses.replace(pattern, repeats=repeats) != deep.pattern:
        raise InvalidInput("repeats", repeats, f"a number of repeats that keeps the pattern of {config.name}, {pattern}")
    return deep


def compile_seconds(config: "ModelConfig") -> dict[str, float]:
    """Seconds to trace, lower and compile each step, from nothing."""
    import jax
    import numpy as np

    from prfaas_jax.engine.options import EngineOptions
    from prfaas_jax.engine.plan import plan_decode, plan_prefill
    from prfaas_jax.engine.runner import choose_implementations, pool_geometry
    from prfaas_jax.engine.steps import Steps
    from prfaas_jax.kvcache.pools import pool_shapes
    from prfaas_jax.kvcache.spec import cache_spec
    from prfaas_jax.sharding import MeshSpec, make_mesh

    jax.clear_caches()
    options = EngineOptions("random:", chunk=256, max_length=512, max_rows=8)
    geometry = pool_geometry(cache_spec(config), options, 1)
    steps = Steps(config, make_mesh(MeshSpec()), "sharded", geometry, choose_implementations(config, options, "cpu"))
    pools = pool_shapes(steps.spec, geometry, steps.sharders["decode"])
    plans: dict[str, Any] = {"prefill": plan_prefill([], 1, 256, geometry.width), "decode": plan_decode([], 8, geometry.width)}
    seconds = {}
    for name, plan in plans.items():
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), plan)
        start = time.perf_counter()
        getattr(steps, name).lower(steps.abstract_params, pools, shapes).compile()
        seconds[name] = time.perf_counter() - start
    return seconds


def main(argv: list[str]) -> None:
    """Measures, reports, judges."""
    del argv
    if not all(r.isdecimal() and int(r) >= 2 for r in REPEATS.value) or len(REPEATS.value) < 2:
        raise InvalidInput("repeats", ",".join(REPEATS.value), "at least two integers >= 2, such as 7,14")
    config = load_model_config(MODEL.value)
    models = [at_depth(config, int(r)) for r in REPEATS.value]
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    samples: dict[int, list[dict[str, float]]] = {m.num_layers: [] for m in models}
    compile_seconds(models[0])  # imports and first use of everything are not compile time
    for _ in tqdm(range(ROUNDS.value), desc="compiling", unit="round", leave=False):
        for model in models:
            samples[model.num_layers].append(compile_seconds(model))
    medians = {step: {n: statistics.median(s[step] for s in taken) for n, taken in samples.items()} for step in ("prefill", "decode")}
    first, last = models[0].num_layers, models[-1].num_layers
    ratio = {step: round(by_depth[last] / by_depth[first], 3) for step, by_depth in medians.items()}
    print(f"{'':8} {'layers':>7} {'seconds':>9}")
    for step, by_depth in medians.items():
        for layers, seconds in by_depth.items():
            print(f"{step:8} {layers:>7} {seconds:>9.2f}")
    pattern = dataclasses.asdict(config.pattern)
    result: dict[str, Any] = {
        "model": config.name,
        "pattern": {k: pattern[k] for k in ("head", "period", "tail")},
        "layers": [m.num_layers for m in models],
        "seconds": {step: {str(n): round(s, 2) for n, s in by_depth.items()} for step, by_depth in medians.items()},
        "ratio": ratio,
        "passed": max(ratio.values()) <= LIMIT.value,
    }
    if WORKDIR.value:
        workdir = Workdir(WORKDIR.value)
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_summary(result)
    headline(result)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    run_main(main)

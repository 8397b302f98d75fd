"""Colocated against disaggregated over prompt lengths, meshes and page sizes; every disaggregated run over two processes and gRPC.

    python -m experiments.check_equivalence [--model=qwen3_toy] [--full]

Default: six layouts in which every mesh and page size meets every other. --full: all of them.
The last line is JSON: cases, mismatches (0 expected), max_logit_diff (below 1e-4 in float32), bit_equal_promised, bit_equal.
"""

import dataclasses
import pathlib
import sys
import tempfile

from absl import flags

from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

MODEL = flags.DEFINE_string("model", "qwen3_toy", "model config by name or path (random weights), or a checkpoint directory")
FULL = flags.DEFINE_boolean("full", False, "every combination of meshes and page sizes instead of a pairwise subset")
CHUNK = flags.DEFINE_integer("prefill_chunk", 128, "prompt tokens per row and prefill step")
SEED = flags.DEFINE_integer("seed", 0, "seed of weights and prompts")
WORKDIR = flags.DEFINE_string("workdir", None, "where to keep cases, environment, summary and server logs")


def main(argv: list[str]) -> None:
    """Runs the matrix and reports every case that breaks a promise."""
    del argv
    from configs.models import load_model_config
    from prfaas_jax.testing import equivalence

    checkpoint = MODEL.value if pathlib.Path(MODEL.value).is_dir() else f"random:{MODEL.value}@{SEED.value}"
    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    with tempfile.TemporaryDirectory(prefix="prfaas-") as scratch:
        logs = workdir.path if workdir else pathlib.Path(scratch)
        matrix = equivalence.Matrix(checkpoint, CHUNK.value, logs, load_model_config, SEED.value)
        cases = list(matrix.run(equivalence.FULL if FULL.value else equivalence.PAIRWISE))
    bad = [case for case in cases if case.error]
    for case in bad:
        where = "together" if case.together else "alone"
        print(f"MISMATCH {case.layout} length {case.length} {where}: {case.error}", file=sys.stderr)
    result = {
        "cases": len(cases),
        "mismatches": len(bad),
        "max_logit_diff": max(case.max_diff for case in cases),
        "bit_equal_promised": sum(case.bit_equal_promised for case in cases),
        "bit_equal": sum(case.bit_equal for case in cases),
        "kv_bytes_moved": sum(case.bytes_moved for case in cases),
    }
    if workdir:
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_requests([{**dataclasses.asdict(case.layout), **dataclasses.asdict(case), "layout": ""} for case in cases])
        workdir.write_summary(result)
    headline(result)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_main(main)

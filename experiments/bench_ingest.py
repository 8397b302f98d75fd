"""Four running decodes keep their pace while a 2,000-token KV arrives: inter-token latency with and without, in the same run.

    python -m experiments.bench_ingest [--checkpoint=random:smollm2_135m] [--tokens=2000] [--tokens_per_s=2000]

A decode server as a process; the KV comes over gRPC from a prefill server without a model, which sends real bytes at a set pace, so
that nothing but the transfer is added. The last line is JSON: itl_ms {quiet, arriving: {p50, p99}}, ratio_p99, passed (ratio <= 2).
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

from absl import flags
from tqdm import tqdm

from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

CHECKPOINT = flags.DEFINE_string("checkpoint", "random:smollm2_135m", "checkpoint directory, GGUF file or random:<model config>")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "weights, activations and cache")
STREAMS = flags.DEFINE_integer("streams", 4, "requests that decode all the time", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 2000, "prompt tokens of the request whose KV arrives", lower_bound=1)
TOKENS_PER_S = flags.DEFINE_float("tokens_per_s", 2000, "pace at which its prefill makes KV")
ROUNDS = flags.DEFINE_integer("rounds", 4, "rounds, each with a quiet part and arrivals", lower_bound=1)
ARRIVALS = flags.DEFINE_integer("arrivals", 3, "2,000-token requests per round, one after the other", lower_bound=1)
QUIET_S = flags.DEFINE_float("quiet_s", 4.0, "seconds of undisturbed decoding per round")
LIMIT = flags.DEFINE_float("limit", 2.0, "largest ratio of the two p99 that passes")
WORKDIR = flags.DEFINE_string("workdir", None, "where to keep gaps, summary and server logs")


def main(argv: list[str]) -> None:
    """Starts both servers, measures, reports."""
    del argv
    from configs.models import load_model_config
    from prfaas_jax.models.source import read_config
    from prfaas_jax.serving.launcher import Processes, environment, module_command
    from prfaas_jax.serving.pair import READY_S, launch_server
    from prfaas_jax.testing.pace import Gap, Pace, percentiles

    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    vocab = read_config(CHECKPOINT.value, DTYPE.value, load_model_config).vocab_size
    options = EngineOptions(CHECKPOINT.value, dtype=DTYPE.value, max_length=-(-TOKENS.value // 1024) * 1024 + 64, max_rows=8)
    gaps: list[Gap] = []
    with tempfile.TemporaryDirectory(prefix="prfaas-") as scratch, Processes(workdir.path if workdir else Path(scratch)) as processes:
        decode = launch_server(processes, "decode", "decode", options)
        decode.wait_ready(READY_S)
        played = {"model": CHECKPOINT.value, "dtype": DTYPE.value, "fingerprint": decode.ready["fingerprint"]}
        command = module_command("experiments.serve_profiled", {**played, "tokens_per_s": TOKENS_PER_S.value})
        prefill = processes.spawn("prefill", command, environment())
        pace = Pace(decode.ready["address"], prefill.ready["prefill"]["address"], vocab, STREAMS.value, TOKENS.value)
        try:
            for number in tqdm(range(ROUNDS.value), desc="rounds", unit="round"):
                gaps += pace.round(number, ARRIVALS.value, QUIET_S.value)
        finally:
            pace.close()
    phases = {"quiet": False, "arriving": True}
    itl = {name: dict(zip(("p50", "p99"), percentiles(gaps, arriving), strict=True)) for name, arriving in phases.items()}
    ratio = itl["arriving"]["p99"] / itl["quiet"]["p99"]
    result = {
        "itl_ms": itl,
        "gaps": {"quiet": sum(not g.arriving for g in gaps), "arriving": sum(g.arriving for g in gaps)},
        "ratio_p99": ratio,
        "passed": ratio <= LIMIT.value,
    }
    if workdir:
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_requests([dataclasses.asdict(g) for g in gaps])
        workdir.write_summary(result)
    headline(result)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    run_main(main)

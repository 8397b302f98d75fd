"""Simulates a study: its clusters, its workload or a trace, one policy; latencies, goodput, use of pools and links over time.

    python -m experiments.simulate --config=configs/studies/paper_case.py [--config.policy=shadow_price] [--config.load=0.7]
    python -m experiments.simulate --config.trace=mooncake_conversation_trace.jsonl.gz --config.sim.decode_cache_bytes=4e12 --seeds=5

Policies are those of `prfaas_jax.simulation.contenders`; the planner sets roles, threshold and rate where the config leaves them open.
Writes, of the first seed, requests.csv (a row per request), usage.csv, trace.json for ui.perfetto.dev and figure.png; of all seeds
summary.json with means and 95 % confidence intervals. The same config and seed give the same bits. The last line is JSON:
requests_per_s (simulated per wall second, one process, without writing), ttft_p50_s, ttft_p90_s, goodput_rps, and so on.
"""

import csv
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from configs.studies import runs_of
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main
from prfaas_jax.simulation.recorder import RequestTable, Timeline, Usage
from prfaas_jax.simulation.runs import Estimate, Run, prepare, sweep

CONFIG = config_flags.DEFINE_config_file("config", "configs/studies/paper_case.py", "the study", lock_config=True)
SEEDS = flags.DEFINE_integer("seeds", 1, "runs with seeds seed, seed + 1, ..", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "first seed", lower_bound=0)
PROCESSES = flags.DEFINE_integer("processes", 1, "simulations at once", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/simulate", "where to keep config, environment, tables, trace, summary and picture")

ESTIMATED = ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "ttft_mean_s", "tpot_p90_s", "e2e_p90_s", "goodput_rps", "slo_share", "egress_gbps")


def record(run: Run, workdir: Path) -> None:
    """Runs once more, and writes what happened: requests.csv, usage.csv, trace.json."""
    timeline = Timeline()
    with RequestTable(workdir / "requests.csv") as table:

        def finished(job: Any) -> None:
            table.add(job, simulation)
            timeline.add(job, simulation)

        simulation, _ = prepare(run, finished)
        usage = Usage(simulation)
        simulation.run(run.requests)
    Workdir(workdir, overwrite=True).write_rows("usage.csv", usage.samples.rows)
    timeline.write(workdir / "trace.json", usage)


def draw(workdir: Path) -> None:
    """Writes figure.png from requests.csv and usage.csv: TTFT over prompt length, its distribution, use of pools and links."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (workdir / "requests.csv").open() as file:
        requests = [(int(r["tokens"]), float(r["ttft_s"]), bool(r["prefill"])) for r in csv.DictReader(file)]
    with (workdir / "usage.csv").open() as file:
        usage = list(csv.DictReader(file))
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for remote, label in ((False, "local"), (True, "remote")):
        points = [(tokens, ttft) for tokens, ttft, far in requests if far == remote][:4000]
        axes[0, 0].plot(*(zip(*points, strict=True) if points else ((), ())), ".", ms=2, label=label)
    axes[0, 0].set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="TTFT, s")
    axes[0, 0].legend()
    ordered = sorted(ttft for _, ttft, _ in requests)
    axes[0, 1].plot(ordered, [i / len(ordered) for i in range(1, len(ordered) + 1)])
    axes[0, 1].set(xscale="log", xlabel="TTFT, s", ylabel="share of requests")
    times = [float(row["time_s"]) for row in usage]
    for column in usage[0] if usage else ():
        axis = axes[1, 1] if "->" in column else axes[1, 0] if column.startswith(("prefill", "decode")) else None
        if axis is not None:
            axis.plot(times, [float(row[column]) for row in usage], lw=0.7, label=column)
    axes[1, 0].set(xlabel="simulated s", ylabel="share in use")
    axes[1, 1].set(xlabel="simulated s", ylabel="Gbit/s")
    for axis in axes[1]:
        axis.legend(fontsize="small")
    figure.savefig(workdir / "figure.png", dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Flags to runs, their figures, files and headline."""
    del argv
    config = CONFIG.value
    runs = runs_of(config, range(SEED.value, SEED.value + SEEDS.value))
    base = runs[0]
    workdir = Workdir(WORKDIR.value, overwrite=True)
    workdir.write_config(config)
    workdir.write_env()
    results = list(sweep(runs, PROCESSES.value))
    record(runs[0], workdir.path)
    draw(workdir.path)

    estimates = {name: Estimate.of([r[name] for r in results]) for name in ESTIMATED if all(name in r for r in results)}
    region = base.ground.topology.regions[0]
    parameter = f" {base.parameter:g}" if base.parameter else ""
    print(f"{base.policy}{parameter}, {region.prefill} local prefill and {region.decode} decode instances, {len(runs)} seeds")
    for name, estimate in estimates.items():
        width = f" ± {estimate.half_width:.3g}" if len(runs) > 1 else ""
        print(f"  {name:14} {estimate.mean:10.4g}{width}")
    result: dict[str, Any] = {
        "policy": base.policy,
        "parameter": base.parameter,
        "n_prefill_local": region.prefill,
        "n_decode": region.decode,
        "seeds": len(runs),
        "requests": sum(r["requests"] for r in results),
        "requests_per_s": sum(r["requests_per_s"] for r in results) / len(results),
        **{name: estimate.mean for name, estimate in estimates.items()},
    }
    if len(runs) > 1:
        result["half_width"] = {name: estimate.half_width for name, estimate in estimates.items()}
    for name in ("offload_share", "fallbacks", "cached_share", "arrival_rps"):
        result[name] = sum(r[name] for r in results) / len(results)
    workdir.write_summary({**result, "runs": results})
    headline(result)


if __name__ == "__main__":
    run_main(main)

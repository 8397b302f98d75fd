"""Every placement policy on the same clusters, links and workloads: who keeps the SLO for most requests.

    python -m experiments.compare_policies [--suite=smoke|paper|full] [--processes=2] [--config.trace=mooncake_conversation_trace.jsonl.gz]

The rules are those of `prfaas_jax.simulation.contest`: SLO TTFT <= 3 x unloaded T(l) + 0.5 s and TPOT <= 50 ms, 0.9 of the load that the
planner's best roles sustain in the cell, the same hardware for all, each baseline with the best parameter of its grid, tuned on other
seeds; cells marked * were never looked at while our policy's constants were chosen. "ahead" means at least 10 % more goodput or 25 % lower
P90 TTFT than the paper's rule. A second table holds the money constant: homogeneous PD clusters for the same cost, at the same arrivals.
The last line is JSON: cells, ours_vs_best_static_min, ours_ahead_share (of the hard cells: at most 12 Gbps, bursts, sessions).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from configs.studies.contest import SUITES, cells
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main
from prfaas_jax.simulation.contest import OURS, Contest, Verdict
from prfaas_jax.simulation.scenario import SimOptions

CONFIG = config_flags.DEFINE_config_file("config", "configs/studies/contest.py", "the study", lock_config=True)
SUITE = flags.DEFINE_enum("suite", "smoke", sorted(SUITES), "which cells")
SEEDS = flags.DEFINE_integer("seeds", None, "seeds of the evaluation; default: 2 for smoke, else 5", lower_bound=1)
REQUESTS = flags.DEFINE_integer("requests", None, "requests per run; default: 1500 for smoke, else 4000", lower_bound=100)
POINTS = flags.DEFINE_integer("points", None, "values to tune each baseline's parameter over; default: 4 for smoke, else 6", lower_bound=1)
PROCESSES = flags.DEFINE_integer("processes", 1, "simulations at once", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/compare_policies", "where to keep config, environment, cells, summary and picture")


def table(verdicts: list[Verdict]) -> str:
    """One line per cell."""
    lines = [f"{'cell':18} {'req/s':>6} {'N_p':>3} {'best static':>16} {'ours/best':>15} {'ours/paper':>15} {'P90/paper':>15}  ahead"]
    for v in verdicts:
        name = f"{v.cell}{'*' if v.held_out else ''}{' !' if v.hard else ''}"
        numbers = (f"{e.mean:7.3f} ±{e.half_width:6.3f}" for e in (v.vs_best, v.vs_paper, v.p90_vs_paper))
        lines.append(f"{name:18} {v.load_rps:6.2f} {v.n_p:3d} {v.best_static:>16} {' '.join(numbers)}  {'yes' if v.ahead else 'no'}")
    return "\n".join(lines)


def equal_cost_table(verdicts: list[Verdict]) -> str:
    """Ours against homogeneous clusters for the same money."""
    lines = [f"{'cell':18} {'ours goodput':>13} {'homogeneous':>12} {'ours P90 s':>11} {'homogeneous':>12}"]
    for v in verdicts:
        mine, other = v.policies[OURS], v.equal_cost
        cells_ = (mine["goodput_rps"], other["goodput_rps"], mine["ttft_p90_s"], other["ttft_p90_s"])
        lines.append(f"{v.cell:18} {cells_[0]:13.3f} {cells_[1]:12.3f} {cells_[2]:11.2f} {cells_[3]:12.2f}")
    return "\n".join(lines)


def draw(workdir: Path) -> None:
    """Writes figure.png from cells.json: our goodput over the best static baseline's and the paper's, P90 TTFT over the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads((workdir / "cells.json").read_text())
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(rows)), layout="constrained")
    for i, (field, label) in enumerate(
        (("vs_best", "goodput / best static"), ("vs_paper", "goodput / paper"), ("p90_vs_paper", "P90 TTFT / paper"))
    ):
        means = [r[field]["mean"] for r in rows]
        axes.plot(means, [j + 0.2 * (i - 1) for j in range(len(rows))], "os^"[i], label=label)
    axes.axvline(1.0, color="gray", lw=1)
    axes.set(yticks=range(len(rows)), yticklabels=[r["cell"] + ("*" if r["held_out"] else "") for r in rows], xscale="log", xlabel="ratio")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(workdir / "figure.png", dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Flags to cells, the contest, its tables, files and headline."""
    del argv
    config = CONFIG.value
    smoke = SUITE.value == "smoke"
    contest = Contest(
        SimOptions(**config.sim.to_dict()),
        requests=REQUESTS.value or (1500 if smoke else 4000),
        seeds=SEEDS.value or (2 if smoke else 5),
        points=POINTS.value or (4 if smoke else 6),
        load=config.load,
        processes=PROCESSES.value,
    )
    todo = list(cells(config, SUITE.value))
    workdir = Workdir(WORKDIR.value, overwrite=True)
    workdir.write_config({**config.to_dict(), "contest": dataclasses.asdict(contest), "suite": SUITE.value})
    workdir.write_env()
    verdicts: list[Verdict] = []
    for verdict in contest.judge(todo):
        verdicts.append(verdict)
        workdir.write_json("cells.json", [_plain(v) for v in verdicts])  # a long run that is stopped keeps what it has
    print(table(verdicts))
    print("\nthe same money in homogeneous clusters, same arrivals\n" + equal_cost_table(verdicts))
    if not config.trace and "trace" in SUITES[SUITE.value][1]:
        print("\nno trace cells: --config.trace names no file")
    hard = [v for v in verdicts if v.hard]
    result: dict[str, Any] = {
        "cells": len(verdicts),
        "ours_vs_best_static_min": min(v.vs_best.mean for v in verdicts),
        "ours_ahead_share": sum(v.ahead for v in hard) / len(hard) if hard else None,
        "held_out": [v.cell for v in verdicts if v.held_out],
        "behind": [v.cell for v in verdicts if v.vs_best.mean < 0.99],
    }
    draw(workdir.path)
    workdir.write_summary(result)
    headline(result)


def _plain(verdict: Verdict) -> dict[str, Any]:
    """JSON has no infinities: the interval of a single seed is absent."""
    row = dataclasses.asdict(verdict)
    for field in ("vs_best", "vs_paper", "p90_vs_paper"):
        if row[field]["half_width"] == float("inf"):
            del row[field]["half_width"]
    return {**row, "ahead": verdict.ahead}


if __name__ == "__main__":
    run_main(main)

"""Every placement policy on the same clusters, links and workloads: who keeps the SLO for most requests.

    python -m experiments.compare_policies [--suite=smoke|paper|full] [--only=8/*,wave/paper] [--processes=2] [--config.trace=FILE]

The rules are those of `prfaas_jax.simulation.contest`: SLO TTFT <= 3 x unloaded T(l) + 0.5 s and TPOT <= 50 ms, 0.9 of the load that the
planner's best roles sustain in the cell, the same hardware for all, each baseline with the best parameter of its grid. Baselines are
tuned, and the best of them and of the paper's rules chosen, on other seeds than those of the evaluation, and in the first third of a
trace, which the evaluation does not play (each seed has a window of its own, so its runs may be shorter than --requests). Cells marked *
were never looked at while our policy's constants were chosen (those of its controllers were, with outage/* and 8/bursts in view), those
marked ! are hard (at most 12 Gbps, bursts, sessions). "ahead" means
at least 10 % more goodput or 25 % lower P90 TTFT than the best of the paper's rules, and an interval of 95 % without 1 (so one seed is
never ahead); "behind" means more than 1 % less goodput than the best static baseline.
`roles/ours` is what our policy gains where instances may change their roles while it runs.

A second table compares with the baseline that keeps the SLO for the largest share, whatever the others wait: P90 TTFT, and the seconds
until all are served after the last arrival. A third holds the money constant: homogeneous PD clusters for the same cost, judged by the same
SLO, at the same arrivals and at 0.9 of what their own planner says. The last line is JSON: cells, ours_vs_best_static_min, ours_ahead_share
(of the hard cells), held_out, behind, tuning_seeds, seeds, requests.
"""

import dataclasses
import fnmatch
import json
import math
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from configs.studies.contest import SUITES, cells
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main
from prfaas_jax.simulation.contest import OURS, Cell, Contest, Verdict
from prfaas_jax.simulation.runs import Estimate
from prfaas_jax.simulation.scenario import SimOptions

CONFIG = config_flags.DEFINE_config_file("config", "configs/studies/contest.py", "the study", lock_config=True)
SUITE = flags.DEFINE_enum("suite", "smoke", sorted(SUITES), "which cells")
ONLY = flags.DEFINE_list("only", [], "cells of the suite to play, such as 8/paper or outage/*; default: all")
SEEDS = flags.DEFINE_integer("seeds", None, "seeds of the evaluation; default: 2 for smoke, else 5", lower_bound=1)
TUNING_SEEDS = flags.DEFINE_integer("tuning_seeds", None, "seeds of the tuning; default: 1 for smoke, else 3", lower_bound=1)
REQUESTS = flags.DEFINE_integer("requests", None, "requests per run; default: 1500 for smoke, else 4000", lower_bound=100)
POINTS = flags.DEFINE_integer("points", None, "values to tune each baseline's parameter over; default: 4 for smoke, else 6", lower_bound=1)
PROCESSES = flags.DEFINE_integer("processes", 1, "simulations at once", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/compare_policies", "where to keep config, environment, cells, summary and picture")


def table(verdicts: list[Verdict]) -> str:
    """One line per cell."""
    head = f"{'cell':18} {'req/s':>6} {'N_p':>3} {'best static':>16} {'ours/best':>15} {'paper':>16} {'ours/paper':>15} {'P90/paper':>15}"
    lines = [f"{head} {'roles/ours':>15}"]
    for v in verdicts:
        row = f"{_name(v)} {v.load_rps:6.2f} {v.n_p:3d} {v.best_static:>16} {_ratio(v.vs_best)} {v.paper:>16} {_ratio(v.vs_paper)}"
        says = f"{' ahead' if v.ahead else ''}{' behind' if v.behind else ''}"
        lines.append(f"{row} {_ratio(v.p90_vs_paper)} {_ratio(v.roles_vs_ours)} {says}".rstrip())
    return "\n".join(lines)


def share_table(verdicts: list[Verdict]) -> str:
    """Ours against the baseline with the highest SLO share."""
    head = f"{'cell':18} {'most in the SLO':>16} {'share':>6} {'ours':>6} {'ours/theirs':>15}"
    lines = [f"{head} {'P90 s':>8} {'ours':>8} {'drain s':>8} {'ours':>8}"]
    for v in verdicts:
        mine, other = v.policies[OURS], v.share
        row = f"{_name(v)} {v.best_share:>16} {other['slo_share']:6.3f} {mine['slo_share']:6.3f} {_ratio(v.share_vs_best)}"
        times = (other["ttft_p90_s"], mine["ttft_p90_s"], other["drain_s"], mine["drain_s"])
        lines.append(f"{row} {' '.join(f'{x:8.2f}' for x in times)}")
    return "\n".join(lines)


def equal_cost_table(verdicts: list[Verdict]) -> str:
    """Ours against homogeneous clusters for the same money, at our arrivals and at their own load."""
    head = f"{'cell':18} {'ours':>7} {'goodput':>8} {'P90 s':>8} {'homogeneous':>12} {'P90 s':>8}"
    lines = [f"{head} {'own load':>9} {'goodput':>8} {'P90 s':>8}"]
    for v in verdicts:
        mine, other, own = v.policies[OURS], v.equal_cost, v.equal_cost_own
        row = f"{_name(v)} {v.load_rps:7.2f} {mine['goodput_rps']:8.3f} {mine['ttft_p90_s']:8.2f} {other['goodput_rps']:12.3f}"
        lines.append(f"{row} {other['ttft_p90_s']:8.2f} {own['load_rps']:9.2f} {own['goodput_rps']:8.3f} {own['ttft_p90_s']:8.2f}")
    return "\n".join(lines)


def _name(v: Verdict) -> str:
    return f"{v.cell + '*' * v.held_out + ' !' * v.hard:18}"


def _ratio(e: Estimate) -> str:
    return f"{e.mean:7.3f} ±{e.half_width:6.3f}"


# Panels of the picture: ratios that are better when high, and those of who is served in time.
PANELS = (
    ("goodput: ours over theirs", (("vs_best", "best static"), ("vs_paper", "the paper's best rule"))),
    ("ours over theirs", (("p90_vs_paper", "P90 TTFT, the paper's best rule"), ("share_vs_best", "SLO share, its best baseline"))),
)


def draw(workdir: Path) -> None:
    """Writes figure.png from cells.json: our goodput, P90 TTFT and SLO share over those of baselines, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = json.loads((workdir / "cells.json").read_text())
    figure, panels = plt.subplots(1, len(PANELS), sharey=True, figsize=(12, 1.8 + 0.3 * len(rows)), layout="constrained")
    for axes, (label, fields) in zip(panels, PANELS, strict=True):
        for i, (field, name) in enumerate(fields):
            means = [r[field]["mean"] for r in rows]
            half = [r[field].get("half_width", 0.0) for r in rows]  # a single seed has none
            below = [min(h, 0.99 * m) for h, m in zip(half, means, strict=True)]  # a logarithmic axis has no zero
            y = [j + 0.15 * (2 * i - 1) for j in range(len(rows))]
            axes.errorbar(means, y, xerr=[below, half], fmt="os"[i], ms=4, lw=1, label=name)
        # The means are what is shown; wide intervals run off the panel.
        shown = [1.0, *(r[field]["mean"] for r in rows for field, _ in fields)]
        axes.axvline(1.0, color="gray", lw=1)
        axes.set(xscale="log", xlabel=label, xlim=(max(min(shown), 1e-3) / 1.5, max(shown) * 1.5), ylim=(len(rows) - 0.4, -0.6))
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(fields), frameon=False)
    panels[0].set(yticks=range(len(rows)), yticklabels=[r["cell"] + "*" * r["held_out"] + " !" * r["hard"] for r in rows])
    figure.savefig(workdir / "figure.png", dpi=120)
    plt.close(figure)


def chosen(suite: list[Cell], only: list[str]) -> list[Cell]:
    """The cells whose names match one of the patterns, all without any; InvalidInput for a pattern that matches none."""
    names = [cell.name for cell in suite]
    for pattern in only:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise InvalidInput("only", pattern, f"cells of the suite: {', '.join(names)}")
    return [cell for cell in suite if not only or any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in only)]


def main(argv: list[str]) -> None:
    """Flags to cells, the contest, its tables, files and headline."""
    del argv
    config = CONFIG.value
    smoke = SUITE.value == "smoke"
    contest = Contest(
        SimOptions(**config.sim.to_dict()),
        requests=REQUESTS.value or (1500 if smoke else 4000),
        seeds=SEEDS.value or (2 if smoke else 5),
        tuning_seeds=TUNING_SEEDS.value or (1 if smoke else 3),
        points=POINTS.value or (4 if smoke else 6),
        load=config.load,
        processes=PROCESSES.value,
    )
    todo = chosen(list(cells(config, SUITE.value, contest)), ONLY.value)
    workdir = Workdir(WORKDIR.value, overwrite=True)
    workdir.write_config({**config.to_dict(), "contest": dataclasses.asdict(contest), "suite": SUITE.value, "only": ONLY.value})
    workdir.write_env()
    verdicts: list[Verdict] = []
    for verdict in contest.judge(todo):
        verdicts.append(verdict)
        workdir.write_json("cells.json", [_plain(v) for v in verdicts])  # a long run that is stopped keeps what it has
    tables = [
        table(verdicts),
        "who keeps the SLO for the largest share, whatever the others wait\n" + share_table(verdicts),
        "the same money in homogeneous clusters: at our arrivals, and at their own load\n" + equal_cost_table(verdicts),
    ]
    if not config.trace and "trace" in SUITES[SUITE.value][1]:
        tables.append("no trace cells: --config.trace names no file")
    for requests in sorted({v.requests for v in verdicts} - {contest.requests}):
        names = ", ".join(v.cell for v in verdicts if v.requests == requests)
        tables.append(f"runs of {requests} requests, all that its windows hold: {names}")
    print(*tables, sep="\n\n")
    workdir.write_text("tables.txt", "\n\n".join(tables) + "\n")
    hard = [v for v in verdicts if v.hard]
    result: dict[str, Any] = {
        "cells": len(verdicts),
        "ours_vs_best_static_min": min(v.vs_best.mean for v in verdicts),
        "ours_ahead_share": sum(v.ahead for v in hard) / len(hard) if hard else None,
        "held_out": [v.cell for v in verdicts if v.held_out],
        "behind": [v.cell for v in verdicts if v.behind],
        "tuning_seeds": contest.tuning_seeds,
        "seeds": contest.seeds,
        "requests": contest.requests,
    }
    draw(workdir.path)
    workdir.write_summary(result)
    headline(result)


def _plain(verdict: Verdict) -> dict[str, Any]:
    """JSON has no infinities: the interval of a single seed is absent."""
    row = dataclasses.asdict(verdict)
    for value in row.values():
        if isinstance(value, dict) and value.get("half_width") == math.inf:
            del value["half_width"]
    return {**row, "ahead": verdict.ahead, "behind": verdict.behind}


if __name__ == "__main__":
    run_main(main)

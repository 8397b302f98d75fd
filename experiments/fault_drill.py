"""Breaks a whole deployment of real processes in every way there is, under load, and checks that nothing is lost by it.

    python -m experiments.fault_drill [--only='kill|freeze'] [--workdir=runs/fault_drill] [--seed=0]

Servers of each role and the router are killed, frozen and drained; links are cut, black-holed, slowed, half-closed, corrupted and reset:
before, during and after a transfer. A prefill server lies about its model, all remote ones go at once, more comes than the router takes,
clients give up and let deadlines pass. Some ten minutes on two cores; --list prints what there is.

Prints a table and leaves requests.csv, faults.csv, summary.json, figure.png and the log of every process in --workdir. The last line is
JSON: faults, wrong_tokens, leaked_pages, hung_requests, worst_detection_s and more. A run in which an invariant broke prints INVALID and
what, and exits with code 1. Times of detection say little on a machine that has no core to spare: see machine_load in faults.csv.
"""

import csv
import os
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from configs.clusters import load_deployment
from configs.models import load_model_config
from prfaas_jax.models.source import read_config
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main
from prfaas_jax.testing.drill import Drill, DrillOptions
from prfaas_jax.testing.drill_faults import all_faults, chosen
from prfaas_jax.testing.drill_report import FaultReport, summary, table

CONFIG = config_flags.DEFINE_config_file("config", "configs/clusters/fault_drill_cpu.py", "what is broken", lock_config=True)
ONLY = flags.DEFINE_string("only", "", "a regular expression: only faults whose name it finds something in")
SEED = flags.DEFINE_integer("seed", 0, "of prompts and arrivals", lower_bound=0)
REQUESTS = flags.DEFINE_integer("requests", DrillOptions.prompts, "different prompts", lower_bound=2)
RATE = flags.DEFINE_float("rate", DrillOptions.per_s, "requests per second of the steady load", lower_bound=0.1)
WORKDIR = flags.DEFINE_string("workdir", "runs/fault_drill", "where files and logs go; an earlier run there is overwritten")
LIST = flags.DEFINE_boolean("list", False, "print the names of the faults and exit")


def draw(workdir: Path) -> None:
    """Writes figure.png from faults.csv: how soon each fault was seen, and what it cost the first token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (workdir / "faults.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.5 + 0.19 * len(rows)), sharey=True, layout="constrained")
    names = [row["fault"] for row in rows]
    for axis, column, label in ((axes[0], "detection_s", "seen after, s"), (axes[1], "extra_ttft_s", "worst extra TTFT, s")):
        points = [(float(row[column]), i) for i, row in enumerate(rows) if row[column]]
        axis.barh([i for _, i in points], [max(0.0, x) for x, _ in points])
        axis.set(xlabel=label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names, fontsize="x-small")
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.savefig(workdir / "figure.png", dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Flags to a deployment and faults, their reports to files, a table and a headline."""
    del argv
    deployment = load_deployment(CONFIG.value)
    faults = chosen(all_faults(deployment), ONLY.value)
    if LIST.value:
        print("\n".join(fault.name for fault in faults))
        return
    workdir = Workdir(WORKDIR.value, overwrite=True)
    workdir.write_config(CONFIG.value)
    workdir.write_env()
    options = DrillOptions(prompts=REQUESTS.value, per_s=RATE.value, seed=SEED.value)
    model = read_config(deployment.model, CONFIG.value.engine_options.get("dtype"), load_model_config)
    drill = Drill(deployment, model, workdir.path, options)
    began = time.monotonic()
    reports: list[FaultReport] = []

    def show(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {len(reports)}/{len(faults)}  {text}", file=sys.stderr, flush=True)

    for report in drill.run(faults, show):
        reports.append(report)
        for broken in report.broken:
            show(f"BROKEN: {broken}")
        # After each: what was found is not lost with a drill that is interrupted.
        workdir.write_requests(drill.requests)
        workdir.write_rows("faults.csv", [report.row() for report in reports])
    draw(workdir.path)
    print(table(reports))
    result = summary(reports, len(drill.requests), os.cpu_count() or 1) | {"wall_s": round(time.monotonic() - began, 1)}
    for report in reports:
        for broken in report.broken:
            print(f"INVALID: {report.fault.name}: {broken}")
    workdir.write_summary(result)
    headline(result)
    if result["broken"]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)

"""The PrfaaS paper's printed numbers beside ours, and the rows that it lacks. No accelerator, no jax.

    python -m experiments.reproduce_paper [--only=table1,table3,table5,table6,figure2,figure4,figure5,sizing,beyond,queues]

The paper's evaluation is analytic: profiled times in Eq. 1-8. Six coefficients are fitted to its Tables 5 and 6 (configs/profiles), and the
profiles behind Table 3 are made of it. So every check has a kind. `printed`: the paper's number, and no input of ours. `circular`: fitted,
or following from what was, so that it checks units and code only. `extension`: the paper lacks it.

`beyond`: length-blind and equal-cost baselines, exact E[T], sweeps over link and output length, beside what our first solution of the
equations gave. `queues`: TTFT of whole prompts first come first served, simulated, about a minute and a half. What the figures show is our
reading: figure 2 Phi_kv over length, figure 4 the length distribution with t and p, figure 5 Lambda_max over t and N_p.

Writes checks.csv, what each picture shows as csv, and the pictures. The last line is JSON: checks, by_kind, failed. Exit code 1 when a
check fails.
"""

import csv
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from configs.models import load_model_config
from configs.profiles import load_profile
from configs.studies import case_study, lengths_of
from configs.studies.paper_case import get_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.scheduling.planner import grid
from prfaas_jax.scheduling.throughput import phi_kv
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.serving.process import run_main
from prfaas_jax.testing import paper as numbers
from prfaas_jax.testing import paper_queues
from prfaas_jax.testing.paper import Check, Paper

PRINTED: dict[str, Callable[[Paper], Iterator[Check]]] = {
    "table1": numbers.table1,
    "table3": numbers.table3,
    "table5": numbers.table5,
    "table6": numbers.table6,
    "sizing": numbers.sizing,
    "beyond": numbers.beyond,
}
FIGURES = ("figure2", "figure4", "figure5")
SECTIONS = ("table1", "table3", "table5", "table6", *FIGURES, "sizing", "beyond", "queues")

ONLY = flags.DEFINE_list("only", list(SECTIONS), f"sections, comma-separated, of {', '.join(SECTIONS)}")
WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce_paper", "where to keep tables, summary and pictures")
REQUESTS = flags.DEFINE_integer("requests", 40_000, "arrivals of each simulated queue", lower_bound=100)
SEEDS = flags.DEFINE_integer("seeds", 2, "simulated queues of each system and load", lower_bound=1)


def read_paper() -> Paper:
    """Models, profiles and the case study from the configs."""
    config = get_config()
    return Paper(
        models={name: load_model_config(name) for name in numbers.TABLE_1},
        profiles={name: load_profile(f"h200_{name}") for name in numbers.TABLE_1},
        case=case_study(config),
        lengths=lengths_of(config),
        output_tokens=config.workload.output_tokens,
    )


def table(checks: list[Check]) -> str:
    """One line per check: kind, ours, what is printed, error, tolerance, verdict."""
    expected = "expected" if checks[0].section in ("beyond", "queues") else "printed"
    lines = [f"{'':54} {'kind':9} {expected:>18} {'ours':>18} {'error':>9} {'tolerance':>10}"]
    for c in checks:
        printed, ours = (x if isinstance(x, str) else f"{x:,.5g}" for x in (c.printed, c.ours))
        error = "" if c.error is None else f"{c.error:+.2%}".replace("-0.00%", "+0.00%")
        wide = c.absolute and (isinstance(c.printed, str) or c.absolute > c.tolerance * abs(c.printed))
        tolerance = "equal" if isinstance(c.printed, str) else f"+-{c.absolute:g}" if wide else f"{c.tolerance:.1%}"
        because = f"  ({c.because})" if c.because else ""
        lines.append(f"  {c.what:52} {c.kind:9} {printed:>18} {ours:>18} {error:>9} {tolerance:>10}  {'PASS' if c.ok else 'FAIL'}{because}")
    return "\n".join(lines)


def figure_rows(name: str, paper: Paper) -> list[dict[str, Any]]:
    """What the picture `name` shows."""
    mix = paper.mix()
    if name == "figure2":
        tokens = [round(x) for x in np.geomspace(1024, 130_000, 60)]
        return [
            {"model": model, "tokens": n, "gbps": phi_kv(paper.footprint(model), instance, n) / GBPS}
            for model, instance in paper.profiles.items()
            for n in tokens
        ]
    if name == "figure4":
        edges = np.geomspace(paper.lengths.low, paper.lengths.high, 61)
        shares = np.histogram(mix.tokens, edges, weights=mix.weight)[0]
        plan = grid(paper.case, mix)
        found = {"t": plan.t, "p": plan.p, "l_long": plan.l_long, "l_short": plan.l_short}
        return [{"low": low, "high": high, "share": s, **found} for low, high, s in zip(edges, edges[1:], shares, strict=False)]
    t = np.arange(0.0, 131_001.0, 500.0)
    return [
        {"n_p": n_p, "t": x, "lambda_max": y}
        for n_p in range(paper.case.n_pd)
        for x, y in zip(t, paper.case.operate(mix, t, n_p).lambda_max, strict=True)
    ]


def read_rows(path: Path) -> list[dict[str, str]]:
    """A csv file that was written here."""
    with path.open() as file:
        return list(csv.DictReader(file))


def draw(workdir: Path, name: str) -> None:
    """<name>.png from <name>.csv."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(workdir / f"{name}.csv")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    if name == "figure2":
        for model in dict.fromkeys(r["model"] for r in rows):
            mine = [r for r in rows if r["model"] == model]
            axes.plot([int(r["tokens"]) for r in mine], [float(r["gbps"]) for r in mine], label=model)
        axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="Gbit/s", title="Phi_kv of one instance of 8xH200")
    elif name == "figure4":
        t, p = float(rows[0]["t"]), float(rows[0]["p"])
        low, high, share = (np.array([float(r[field]) for r in rows]) for field in ("low", "high", "share"))
        remote = high > t
        axes.bar(low, share, high - low, align="edge", color=np.where(remote, "tab:orange", "tab:blue"))
        axes.axvline(t, color="black", label=f"t = {t:,.0f} tokens: p = {p:.1%} of the requests are prefilled remotely")
        for field in ("l_short", "l_long"):
            axes.axvline(float(rows[0][field]), color="gray", linestyle="--", label=f"{field} = {float(rows[0][field]):,.0f}")
        axes.set(xscale="log", xlabel="prompt tokens", ylabel="share of requests per bin", title="Prompt lengths of the case study")
    else:
        for n_p in dict.fromkeys(r["n_p"] for r in rows):
            mine = [r for r in rows if r["n_p"] == n_p]
            axes.plot([float(r["t"]) for r in mine], [float(r["lambda_max"]) for r in mine], label=f"N_p = {n_p}")
        best = max(rows, key=lambda r: float(r["lambda_max"]))
        axes.plot(float(best["t"]), float(best["lambda_max"]), "k*", markersize=12)
        axes.set(xlabel="threshold t, tokens", ylabel="Lambda_max, requests/s", title="Throughput over threshold and roles")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(workdir / f"{name}.png", dpi=120)
    plt.close(figure)


def beyond_rows(paper: Paper) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Baselines, link sweep and output sweep, as tables."""
    links = [
        {"gbps": gbps, "lambda_max": coarse.lambda_max, "t": coarse.t, "n_p": coarse.n_p}
        | {"fine_lambda_max": fine.lambda_max, "fine_t": fine.t, "fine_n_p": fine.n_p, "egress_gbps": fine.egress_gbps}
        for gbps, coarse, fine in numbers.link_sweep(paper)
    ]
    outputs = [
        {"output_tokens": n, "lambda_max": plan.lambda_max, "t": plan.t, "n_p": plan.n_p}
        | {"over_homogeneous": gain, "over_naive": over_naive}
        for n, plan, gain, over_naive in numbers.output_sweep(paper)
    ]
    return numbers.baselines(paper), links, outputs


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """An aligned table."""
    columns = list(rows[0])
    cells = [[_cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(text) for text in (c, *(row[i] for row in cells))) for i, c in enumerate(columns)]
    print(f"\n{title}")
    for line in (columns, *cells):
        print("  " + "  ".join(f"{text:<{w}}" if i == 0 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(line, widths, strict=True))))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def simulated(paper: Paper) -> list[paper_queues.Queue]:
    """All queues, with progress on stderr."""
    todo = paper_queues.runs(paper, SEEDS.value)
    return list(tqdm(paper_queues.simulate(paper, todo, REQUESTS.value), total=len(todo), desc="queues", file=sys.stderr))


def main(argv: list[str]) -> None:
    """Checks, tables, pictures, headline."""
    del argv
    only = [name.strip() for name in ONLY.value]
    if unknown := [name for name in only if name not in SECTIONS]:
        raise InvalidInput("only", unknown, f"sections of {', '.join(SECTIONS)}")
    workdir = Workdir(WORKDIR.value, overwrite=True)
    paper = read_paper()
    checks: list[Check] = []
    for name in SECTIONS:
        if name not in only:
            continue
        found: list[Check] = []
        if name in PRINTED:
            found = list(PRINTED[name](paper))
        elif name == "queues":
            queues = simulated(paper)
            workdir.write_rows("queues.csv", [dataclasses.asdict(q) for q in queues])
            found = list(paper_queues.checks(queues))
            rows = [
                {"system": s, **{f"P90 at {load}, s": paper_queues.p90_s(queues, s, load) for load in paper_queues.LOADS}}
                for s in paper_queues.MGC_P90_S
            ]
            print_rows("TTFT with queues, each system at shares of its own Lambda_max (Table 6 has none)", rows)
        else:
            workdir.write_rows(f"{name}.csv", figure_rows(name, paper))
            draw(workdir.path, name)
            print(f"\n{name}: {workdir.path / name}.png")
        if name == "beyond":
            baselines, links, outputs = beyond_rows(paper)
            print_rows("Lambda_max in requests/s: T at the mean length, and exact E[T]", baselines)
            print_rows("Link sweep: thresholds in steps of 1,000 tokens, and in steps of 100", links)
            print_rows("Output length, thresholds in steps of 500 tokens", outputs)
            for file, rows in (("baselines", baselines), ("links", links), ("outputs", outputs)):
                workdir.write_rows(f"{file}.csv", rows)
        if found:
            print(f"\n{name}")
            print(table(found))
        checks += found
    failed = [f"{c.section}: {c.what}" for c in checks if not c.ok]
    workdir.write_config(flags.FLAGS.flag_values_dict())
    workdir.write_env()
    workdir.write_rows("checks.csv", [{**dataclasses.asdict(c), "error": c.error, "ok": c.ok} for c in checks])
    by_kind = {kind: sum(c.kind == kind for c in checks) for kind in numbers.KINDS}
    result = {"checks": len(checks), "by_kind": by_kind, "failed": failed}
    workdir.write_summary(result)
    headline(result)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)

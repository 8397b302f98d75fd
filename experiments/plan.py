"""Is a PrfaaS pilot worth it? From hardware, link, model and workload: capacity, threshold, roles, what binds, cost, and a roll-out.

    python -m experiments.plan --config=configs/studies/paper_case.py
    python -m experiments.plan --config=configs/studies/paper_case.py --config.link_gbps=8
    python -m experiments.plan --config=configs/studies/paper_case.py --config.workload.mu=9.0 --config.workload.sigma=1.2
    python -m experiments.plan --config=configs/studies/paper_case.py --config.workload.output_tokens=2048
    python -m experiments.plan --config=configs/studies/paper_case.py --config.trace=requests.jsonl.gz
    python -m experiments.plan --config=configs/studies/paper_case.py --config.rate=3

Rates are requests/s that the system sustains, by the paper's Eq. 1-8 in the study's reading; the linear program allows any placement and
takes exact expectations. TTFT is without queues. A pilot is worth it when it sustains at least 1.05 times what a homogeneous cluster of
equal cost would. For a rate that is given the cheapest system is searched among all with up to twice the study's instances, with or
without a PrfaaS cluster. The last line is JSON: threshold (null: nothing is offloaded), n_prefill_local, n_decode, lambda_max,
gain_over_homogeneous, gain_over_naive, gain_over_length_blind, gain_over_equal_cost, egress_gbps, bottleneck, cheapest (n_prfaas,
n_prefill_local, n_decode, cost_per_hour, lambda_max; null: no rate is given, or no such system sustains it), worth_it.
"""

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.studies import case_study, mix_of
from prfaas_jax.results import Workdir, headline
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.planner import PILOT_LOAD, Advice, advise, bottleneck, grid, length_blind_ttft, topology_of
from prfaas_jax.scheduling.sizing import MAX_SIZES, cheapest
from prfaas_jax.scheduling.throughput import CaseStudy
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.serving.process import run_main

CONFIG = config_flags.DEFINE_config_file("config", "configs/studies/paper_case.py", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/plan", "where to keep config, environment, tables, summary and picture")


def tokens(t: float) -> str:
    """A threshold for people."""
    return "none is offloaded" if math.isinf(t) else "all are offloaded" if t == 0 else f"{t:,.0f} tokens"


def comparison(case: CaseStudy, mix: Mix, advice: Advice) -> list[dict[str, Any]]:
    """Rows of the plan and its alternatives."""
    plan = advice.plan
    cost, pd_cost = advice.cost_per_hour, case.pd.cost_per_hour

    def ttft(t: float) -> tuple[float, float]:
        seconds = case.ttft(mix, t)
        return mix.mean(seconds), mix.quantile(seconds, 0.9)

    equal, costly = advice.homogeneous, advice.homogeneous_equal_cost
    nothing = ttft(math.inf)
    rows: list[tuple[str, str, float, float, tuple[float, float] | None]] = [
        ("this plan", f"{case.n_prfaas} + {plan.n_p} / {plan.n_d}", cost, plan.lambda_max, ttft(plan.t)),
        ("homogeneous, equal GPUs", f"{equal.n_p} / {equal.n_d}", (equal.n_p + equal.n_d) * pd_cost, equal.lambda_max, nothing),
        ("homogeneous, equal cost", f"{costly.n_p} / {costly.n_d}", (costly.n_p + costly.n_d) * pd_cost, costly.lambda_max, nothing),
        ("naive, all remote", f"{case.n_prfaas} + 0 / {case.n_pd}", cost, advice.naive.lambda_max, ttft(0.0)),
        (
            "length-blind, balanced",
            f"{case.n_prfaas} + {advice.length_blind_n_p} / {case.n_pd - advice.length_blind_n_p}",
            cost,
            advice.length_blind,
            length_blind_ttft(case, mix, advice.length_blind_n_p, plan.reading),
        ),
        (
            "any placement, exact E[T]",
            f"{case.n_prfaas} + {advice.best_n_p} / {case.n_pd - advice.best_n_p}",
            cost,
            advice.best.lambda_max,
            None,
        ),
    ]
    return [
        {"system": name, "instances": instances, "cost_per_hour": money, "lambda_max": rate, "plan_gain": plan.lambda_max / rate}
        | ({"ttft_mean_s": times[0], "ttft_p90_s": times[1]} if times else {})
        for name, instances, money, rate, times in rows
    ]


def cheapest_for(rate: float, case: CaseStudy, mix: Mix) -> tuple[str, dict[str, Any] | None]:
    """The cheapest system that sustains `rate` requests/s, of up to twice the instances: for people, and as data."""
    most = {"prfaas": 2 * case.n_prfaas, "pd": 2 * case.n_pd}
    what = f"up to {most['prfaas']} PrfaaS and {most['pd']} PD instances"
    if (most["prfaas"] + 1) * most["pd"] > MAX_SIZES:
        return f"not searched: {what} make more than {MAX_SIZES} combinations", None
    found = cheapest(topology_of(case, 0), mix, rate, most)
    if found is None:
        return f"none of {what} sustains {rate:g} requests/s", None
    (region,), far = found[0].regions, sum(c.instances for c in found[0].prefill)
    money, sustained = found[0].cost_per_hour, found[1].lambda_max
    text = f"{far} PrfaaS + {region.prefill} / {region.decode} for {rate:g} requests/s: {money:g} per hour, sustains {sustained:.3f}"
    counts = {"n_prfaas": far, "n_prefill_local": region.prefill, "n_decode": region.decode}
    return text, {**counts, "cost_per_hour": money, "lambda_max": sustained}


def curves(config: ConfigDict, case: CaseStudy, mix: Mix, advice: Advice) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(Lambda_max over the threshold at the plan's roles, Lambda_max over the link with roles and threshold of each)."""
    plan = advice.plan
    t = np.linspace(0.0, float(mix.uncached.max()), 400)
    at = case.operate(mix, t, plan.n_p, plan.reading)
    thresholds = [{"t": x, "lambda_max": rate} for x, rate in zip(t, at.lambda_max, strict=True)]
    links = []
    roles = None if config.n_prefill_local < 0 else config.n_prefill_local
    for gbps in np.geomspace(0.1, 2, 14) * max(advice.needed_gbps, config.link_gbps / 4):
        found = grid(dataclasses.replace(case, b_out=float(gbps) * GBPS), mix, plan.reading, 1000.0, roles)
        threshold = found.t if math.isfinite(found.t) else ""
        links.append({"gbps": float(gbps), "lambda_max": found.lambda_max, "t": threshold, "n_p": found.n_p})
    return thresholds, links


def draw(workdir: Path, title: str) -> None:
    """figure.png from thresholds.csv and links.csv."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, name, x in ((axes[0], "thresholds", "t"), (axes[1], "links", "gbps")):
        with (workdir / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        axis.plot([float(r[x]) for r in rows], [float(r["lambda_max"]) for r in rows], "." if name == "links" else "-")
        axis.grid(alpha=0.3)
    ticks = [float(r["gbps"]) for r in rows[1::3]]
    axes[1].set(xscale="log")
    axes[1].set_xticks(ticks, [f"{gbps:.2g}" for gbps in ticks])
    axes[1].minorticks_off()
    axes[0].set(xlabel="threshold, tokens", ylabel="requests/s", title=title)
    axes[1].set(xlabel="link, Gbit/s", title="best threshold and roles for each link", ylim=(0, None))
    figure.savefig(workdir / "figure.png", dpi=120)
    plt.close(figure)


def show(config: ConfigDict, case: CaseStudy, mix: Mix, advice: Advice, rows: list[dict[str, Any]], binds: str) -> None:
    """Prints the plan for people."""
    plan = advice.plan
    print(f"{config.model}: {case.n_prfaas} x {case.prfaas.name} ({case.prfaas.basis}) -> {case.n_pd} x {case.pd.name} ({case.pd.basis})")
    lengths = f"prompts of {mix.mean(mix.tokens):,.0f} tokens on average (P90 {mix.quantile(mix.tokens, 0.9):,.0f})"
    held = f", {mix.mean(mix.cached_pd) / mix.mean(mix.tokens):.0%} of them held by the PD cluster" if mix.cached_pd.any() else ""
    print(f"{lengths}{held}, {mix.mean(mix.output):,.0f} output tokens; link {config.link_gbps:g} Gbit/s, {config.rtt_ms:g} ms\n")
    print(f"capacity          {plan.lambda_max:.3f} requests/s ({config.reading} reading)")
    print(f"threshold         {tokens(plan.t)}: {plan.p:.1%} of the requests")
    print(f"PD roles          {plan.n_p} prefill, {plan.n_d} decode")
    print(f"bandwidth         {plan.egress_gbps:.2f} Gbit/s at capacity; {advice.needed_gbps:.2f} on a link that never binds")
    print(f"bottleneck        {binds}")
    each = 1000 * advice.cost_per_hour / plan.lambda_max / 3600
    print(f"cost              {advice.cost_per_hour:g} per hour, {each:.3g} per 1,000 requests")

    print(f"\n{'':26} {'instances':>12} {'cost/h':>8} {'requests/s':>11} {'plan gains':>11} {'TTFT mean, s':>13} {'P90, s':>8}")
    for r in rows:
        times = f"{r['ttft_mean_s']:>13.2f} {r['ttft_p90_s']:>8.2f}" if "ttft_mean_s" in r else f"{'-':>13} {'-':>8}"
        print(f"  {r['system']:24} {r['instances']:>12} {r['cost_per_hour']:>8g} {r['lambda_max']:>11.3f} {r['plan_gain']:>10.2f}x {times}")

    print(f"\none more            {'price, requests/s':>18} {'with new roles, requests/s':>27}")
    for gain in advice.gains:
        print(f"  {gain.what:18}{gain.price:>18.3f} {gain.requests_per_s:>27.3f}")

    if advice.phases:
        load = f"egress at {PILOT_LOAD:.0%} load, Gbit/s"
        print(f"\nroll-out  {'over':>8} {'share':>6} {'offloaded':>10} {'PrfaaS':>7} {'N_p / N_d':>10} {'requests/s':>11} {load:>28}")
        for i, phase in enumerate(advice.phases, 1):
            roles = f"{phase.n_p} / {case.n_pd - phase.n_p}"
            what = f"  phase {i} {phase.threshold:>8,.0f} {phase.share:>6.0%} {phase.offloaded:>10.1%} {phase.n_prfaas:>7}"
            print(f"{what} {roles:>10} {phase.lambda_max:>11.3f} {phase.egress_gbps:>28.2f}")
    print()
    for reason in advice.reasons:
        print(reason)


def main(argv: list[str]) -> None:
    """The study planned, compared, printed and kept."""
    del argv
    config = CONFIG.value
    case, mix = case_study(config), mix_of(config)
    workdir = Workdir(WORKDIR.value, overwrite=True) if WORKDIR.value else None
    n_p = None if config.n_prefill_local < 0 else config.n_prefill_local
    advice = advise(case, mix, config.reading, config.t_step, n_p, config.rate or None)
    plan, binds = advice.plan, bottleneck(case, advice.plan, mix)
    rows = comparison(case, mix, advice)
    show(config, case, mix, advice, rows, binds)
    text, least = cheapest_for(config.rate, case, mix) if config.rate else ("", None)
    if text:
        print(f"\ncheapest          {text}")
    result = {
        "threshold": plan.t if math.isfinite(plan.t) else None,
        "n_prefill_local": plan.n_p,
        "n_decode": plan.n_d,
        "lambda_max": plan.lambda_max,
        "gain_over_homogeneous": plan.lambda_max / advice.homogeneous.lambda_max,
        "gain_over_naive": plan.lambda_max / advice.naive.lambda_max,
        "gain_over_length_blind": plan.lambda_max / advice.length_blind,
        "gain_over_equal_cost": plan.lambda_max / advice.homogeneous_equal_cost.lambda_max,
        "egress_gbps": plan.egress_gbps,
        "bottleneck": binds,
        "cheapest": least,
        "worth_it": advice.worth_it,
    }
    if workdir:
        workdir.write_config(config)
        workdir.write_env()
        thresholds, links = curves(config, case, mix, advice)
        workdir.write_rows("systems.csv", rows)
        workdir.write_rows("phases.csv", [dataclasses.asdict(phase) for phase in advice.phases])
        workdir.write_rows("thresholds.csv", thresholds)
        workdir.write_rows("links.csv", links)
        draw(workdir.path, f"N_p = {plan.n_p}, N_d = {plan.n_d}")
        gains = [dataclasses.asdict(gain) for gain in advice.gains]
        workdir.write_summary({**result, "needed_gbps": advice.needed_gbps, "reasons": advice.reasons, "one_more": gains})
    headline(result)


if __name__ == "__main__":
    run_main(main)

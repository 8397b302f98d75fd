"""Plays a workload, open loop, against live clusters: what policies give, what systems sustain, what a cut link or a restart does.

    python -m experiments.bench_serving [--policies=threshold,shadow_price] [--config.load=0.7]
    python -m experiments.bench_serving --trace=mooncake_conversation_trace.jsonl.gz --config.time_scale=4
    python -m experiments.bench_serving --config=configs/clusters/two_sites_cpu.py
    python -m experiments.bench_serving --mode=saturate --config.time_scale=3 --config.requests=600
    python -m experiments.bench_serving --mode=cut --config.time_scale=2 --config.requests=1200 --policies=threshold,shadow_price_roles
    python -m experiments.bench_serving --mode=router
    python -m experiments.bench_serving --mode=tenants

load      At config.load of Lambda_max (or config.rate): TTFT, its parts and TPOT, goodput at the SLO, offload share, egress, failures. The
          router is started again for each policy, the other servers stay. With profiles the simulator's figures stand beside them, and
          requests that are alone (`probe`) say what TTFT is without queues, against `simulation.unloaded`.
saturate  PrfaaS under the planner's threshold, homogeneous, naive and length-blind systems (`testing.live_systems`), each offered
          --overload of what the planner says that it sustains, with the same prompts. Lambda_live is all requests over the time until the
          last first token (`live_bench.lambda_live` says why); ratios to PrfaaS beside the planner's, as printed for the whole distribution
          and exact for the very prompts that were drawn, and the simulator's of the same run.
cut       In mid-run every link is cut to --cut_gbps. Offered is --overload of the planner's optimum for that, with the best roles, so that
          a system which adapts just keeps up and one that does not falls behind. First tokens per second from --cut_periods control
          periods (30 s each, `controllers.CONTROL_PERIOD_S`) after the cut to the last arrival, over that optimum, and over the one with
          the roles as they were; "drained" is until the last first token, so that a backlog that is left counts: the shorter the run the
          more, as at its very end only what is last goes on.
router    The router alone, before profiled servers: milliseconds from receiving to sending on at --router_rps, CPU per request; memory
          while --router_queue requests wait; requests that a restart in mid-run loses, which must be none.
tenants   A polite tenant at --polite_load of Lambda_max, alone, and beside one that asks for --greedy times Lambda_max and may have --quota
          requests running: by how much the polite one's P90 TTFT grows. What the quota lets in is load like any other: where the system
          is busy it slows everybody, with one tenant or two.

Times and rates are the model's; `late_p99_s` and what the router takes are wall seconds. Prompts are seeded; those of a trace are made of
its hash ids. A run is INVALID, and ends with code 1, where KV bytes do not add up to the cache, tokens were computed twice or are wrong,
the load generator was later than --max_late_s, or fewer than --min_completions requests were done. Writes config.json, env.json,
requests_<point>.csv, egress_<point>.csv, summary.json and figure.png; the last line is JSON.
"""

import sys
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.clusters import load_deployment
from configs.models import load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.deployment import Deployment
from prfaas_jax.serving.process import run_main
from prfaas_jax.testing import live_bench, live_router, live_systems, live_tables, live_tenants
from prfaas_jax.testing.live_cluster import LiveCluster
from prfaas_jax.testing.live_cut import Cut, by_period, optima, reached, sustained
from prfaas_jax.testing.replay import ReplayInvalid
from prfaas_jax.testing.replay_script import Ask, Recorded, Script, as_played, asks_of

CONFIG = config_flags.DEFINE_config_file("config", "configs/clusters/paper_profiled.py", "the deployment", lock_config=True)
MODE = flags.DEFINE_enum("mode", "load", ["load", "saturate", "cut", "router", "tenants"], "what is measured")
POLICIES = flags.DEFINE_list("policies", [], "of load and cut, with the planner's parameters; default: the config's own")
SYSTEMS = flags.DEFINE_list("systems", list(live_systems.SYSTEMS), "of saturate; prfaas among them")
TRACE = flags.DEFINE_string("trace", None, "instead of the config's workload: .jsonl or .csv, also .gz")
SEED = flags.DEFINE_integer("seed", 0, "of arrivals and prompts", lower_bound=0)
MIN_COMPLETIONS = flags.DEFINE_integer("min_completions", 300, "fewer per point are INVALID", lower_bound=1)
MAX_LATE_S = flags.DEFINE_float("max_late_s", 0.1, "wall seconds that a percent of the requests may be sent late", lower_bound=1e-3)
PROBE = flags.DEFINE_integer("probe", 20, "requests of load that are alone, before the others; 0: none", lower_bound=0)
OVERLOAD = flags.DEFINE_float("overload", None, "offered over what is sustained; default: 1.25 of saturate, 0.95 of cut", lower_bound=0.01)
CUT_GBPS = flags.DEFINE_float("cut_gbps", 8.0, "Gbit/s of the model that every link is cut to", lower_bound=1e-3)
CUT_PERIODS = flags.DEFINE_integer("cut_periods", 3, "control periods that a system has to adapt", lower_bound=0)
ROUTER_RPS = flags.DEFINE_float("router_rps", 300.0, "requests per wall second", lower_bound=0.1)
ROUTER_REQUESTS = flags.DEFINE_integer("router_requests", 6000, "requests at that rate", lower_bound=2)
ROUTER_QUEUE = flags.DEFINE_integer("router_queue", 10_000, "requests that wait at once", lower_bound=1)
ROUTER_TOKENS = flags.DEFINE_integer("router_tokens", 128, "prompt tokens", lower_bound=1)
RESTART_RPS = flags.DEFINE_float("restart_rps", 40.0, "requests per wall second around the restart", lower_bound=0.1)
POLITE_LOAD = flags.DEFINE_float("polite_load", 0.4, "of the polite tenant, over Lambda_max", lower_bound=0.01)
GREEDY = flags.DEFINE_float("greedy", 1.0, "what the greedy tenant asks for, over Lambda_max", lower_bound=0.01)
QUOTA = flags.DEFINE_integer("quota", 4, "requests of the greedy tenant that run at once", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/bench_serving", "where to keep config, environment, rows, summary and picture")

# Requests of others that a server takes beside those of the workload.
CROWD = 64
# Requests that are in flight as the router is restarted say so many tokens.
_RESTART_TOKENS = 20


def read(config: ConfigDict) -> Deployment:
    """The deployment, with room for every request at once, and for a crowd beside."""
    deployment = load_deployment(config)
    return live_systems.with_room(deployment, deployment.requests + CROWD)


class Bench:
    """The points of one run: each plays requests, and leaves its rows and what is wrong with them."""

    def __init__(self, config: ConfigDict, workdir: Workdir):
        self.deployment, self.workdir = read(config), workdir
        self.vocab = live_bench.vocab_size(self.deployment, load_model_config)
        self.broken: list[str] = []
        self.points: list[str] = []

    def recorded(self, rate: float | None = None, seed: int | None = None) -> Recorded:
        """The arrivals, at `rate` requests per model second or the deployment's own."""
        deployment = self.deployment
        if deployment.workload is None:
            raise InvalidInput("config.rate", 0.0, "requests/s: without profiles there is no Lambda_max to take a share of")
        workload = deployment.workload.scaled(rate / deployment.rate) if rate else deployment.workload
        return as_played(workload, SEED.value if seed is None else seed, deployment.requests, deployment.scale.tokens)

    def play(self, live: LiveCluster, recorded: Recorded, name: str, **more: Any) -> tuple[live_bench.Played, dict[str, Any]]:
        """One point: its rows and figures."""
        asks = asks_of(recorded, live.deployment.scale.tokens)
        played = live_bench.play(live, self.script(live, asks, recorded), self.workdir.path, name, **more)
        figures = live_bench.live_figures(played.rows, recorded, live.deployment, live_bench.byte_scale(live))
        self.keep(name, [row.flat() for row in played.rows], played.broken)
        self.workdir.write_rows(f"egress_{name}.csv", played.egress)
        return played, {"late_p99_s": played.late_p99_s} | figures

    def script(self, live: LiveCluster, asks: tuple[Ask, ...], recorded: Recorded) -> Script:
        """The requests with all that their generator needs."""
        return live_bench.script_of(live, asks, SEED.value, self.vocab, recorded.block_tokens, late_s=MAX_LATE_S.value)

    def keep(self, name: str, rows: list[dict[str, Any]], broken: list[str]) -> None:
        """Writes the rows of a point; notes what is wrong with it."""
        self.workdir.write_rows(f"requests_{name}.csv", rows)
        self.points.append(name)
        done = sum(not row["error"] for row in rows)
        if done < MIN_COMPLETIONS.value:
            broken = [*broken, f"{done} requests were done, {MIN_COMPLETIONS.value} are asked for"]
        self.broken += [f"{name}: {line}" for line in broken]


def policies(config: ConfigDict) -> Iterator[tuple[str, Deployment]]:
    """The deployment under each policy, with the planner's parameter where it is not the config's own."""
    for name in POLICIES.value or [config.policy]:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            if name != config.policy:
                changed.policy, changed.parameter = name, -1.0
        yield name, read(changed)


def converted(live: LiveCluster, deployment: Deployment) -> None:
    """Starts the regions again, with the roles of the deployment: the policy before may have changed them."""
    for name in list(live.processes):
        if name.partition("/")[0] in {region.name for region in deployment.regions}:
            live.stop(name)
            live.restart(name)


def load(bench: Bench, config: ConfigDict) -> dict[str, Any]:
    """Every policy at one load."""
    found: dict[str, Any] = {}
    recorded = bench.recorded()
    with LiveCluster(bench.deployment, bench.workdir.path) as live:
        before = ""
        for name, deployment in policies(config):
            if before.endswith("_roles"):
                converted(live, deployment)
            live_bench.restart_router(live, deployment)
            if not found and PROBE.value and deployment.ground is not None:
                asks = live_bench.probe_asks(deployment, recorded, PROBE.value)
                alone = live_bench.play(live, bench.script(live, asks, recorded), bench.workdir.path, "probe")
                bench.broken += [f"probe: {line}" for line in alone.broken]
                bench.workdir.write_rows("requests_probe.csv", [row.flat() for row in alone.rows])
                probe: dict[str, Any] | None = live_bench.probe_errors(deployment, alone.rows)
            elif not found:
                probe = None
            figures = bench.play(live, recorded, name)[1]
            if deployment.ground is not None:
                simulated = live_bench.simulated(deployment, recorded).figures
                figures |= {"simulated": simulated, "errors": live_bench.errors(figures, simulated)}
            found[name], before = figures, name
    columns = ("ttft_p50_s", "ttft_p90_s", "tpot_p90_s", "throughput_rps", "goodput_rps", "slo_share", "offload_share", "egress_gbps")
    print(live_tables.table(("policy", *columns, "failed"), [_figures(n, f, columns) for n, f in found.items()]))
    print(live_tables.table(("TTFT is the sum of", *next(iter(found.values()))["parts_mean_s"]), _parts(found)))
    if probe is not None:
        print(f"{probe['requests']} requests alone: TTFT {probe['ttft_mean_s']:.3f} s, unloaded {probe['unloaded_mean_s']:.3f} s")
    return {"policies": found, "queue_free": probe}


def _figures(name: str, figures: dict[str, Any], columns: tuple[str, ...]) -> tuple[Any, ...]:
    return (name, *(figures.get(column) for column in columns), sum(figures["failed"].values()))


def _parts(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(name, *figures["parts_mean_s"].values()) for name, figures in found.items()]


def saturate(bench: Bench, config: ConfigDict) -> dict[str, Any]:
    """Every system beyond what it sustains."""
    names = tuple(SYSTEMS.value)
    if "prfaas" not in names:
        raise InvalidInput("systems", names, "prfaas among them: the others are compared with it")
    rows: dict[str, dict[str, float]] = {}
    for name, system in live_systems.systems(bench.deployment, names).items():
        planned = system.planned_rps
        recorded = bench.recorded((OVERLOAD.value or 1.25) * planned)
        simulated = live_bench.simulated(system.deployment, recorded)
        folder = Workdir(bench.workdir.path / name, overwrite=True)
        with LiveCluster(system.deployment, folder.path) as live:
            played, figures = bench.play(live, recorded, name)
        rows[name] = {
            "planned_rps": planned,
            "drawn_rps": system.lambda_max(live_systems.drawn_mix(recorded), "exact"),
            "simulated_rps": live_bench.lambda_live([job.first_s for job in simulated.jobs], 0.0),
            "live_rps": live_bench.lambda_live([r.first_s for r in played.rows if r.done and r.first_s is not None], 0.0),
            "completed": sum(row.done for row in played.rows),
            "late_p99_s": figures["late_p99_s"],
        }
    columns = ("planned_rps", "drawn_rps", "simulated_rps", "live_rps")
    ratios = {column: live_systems.ratios({name: row[column] for name, row in rows.items()}) for column in columns}
    print(live_tables.table(("Lambda_max, requests/s", *columns), [(n, *(row[c] for c in columns)) for n, row in rows.items()]))
    others = [name for name in rows if name != "prfaas"]
    apart = {name: ratios["live_rps"][name] / ratios["drawn_rps"][name] - 1 for name in others}
    lines = [(name, *(ratios[column][name] for column in columns), apart[name]) for name in others]
    print(live_tables.table(("prfaas over", *columns, "live / drawn - 1"), lines))
    return {"lambda_max": rows, "ratios": ratios, "errors": apart}


def cut(bench: Bench, config: ConfigDict) -> dict[str, Any]:
    """Every policy while the link is cut."""
    topology, mix = bench.deployment.topology, bench.deployment.mix
    if topology is None or mix is None:
        raise InvalidInput("config.clusters", "no profiles", "a profile for each cluster: the planner says what is possible")
    offered = (OVERLOAD.value or 0.95) * optima(topology, mix, Cut(1.0, CUT_GBPS.value))["after_best_roles_rps"]
    recorded = bench.recorded(offered)
    arrived = [a.time_s for a in recorded.recorded]
    change = Cut(arrived[-1] / 3, CUT_GBPS.value, periods=CUT_PERIODS.value)
    change.check(arrived[-1])
    best = optima(topology, live_systems.drawn_mix(recorded), change)
    found: dict[str, Any] = {}
    for name, deployment in policies(config):
        folder = Workdir(bench.workdir.path / name, overwrite=True)
        with LiveCluster(deployment, folder.path) as live:
            played, figures = bench.play(live, recorded, name, begun=lambda at, live=live: change.arm(live, at))
            conversions = live.router_status().conversions
        simulated = live_bench.simulated(deployment, recorded, change.steps(deployment))
        first = [row.first_s for row in played.rows if row.first_s is not None]
        simulated_first = [job.first_s for job in simulated.jobs]
        after, drained = reached(first, change.settled_s, arrived[-1]), sustained(first, change.settled_s)
        bench.workdir.write_rows(f"periods_{name}.csv", by_period(first, arrived, change))
        found[name] = {
            "before_rps": sum(at <= change.at_s for at in first) / change.at_s,
            "after_rps": after,
            "drained_rps": drained,
            "drain_s": max(first) - arrived[-1],
            "simulated_after_rps": reached(simulated_first, change.settled_s, arrived[-1]),
            "simulated_drained_rps": sustained(simulated_first, change.settled_s),
            "of_optimum": after / best["after_best_roles_rps"],
            "of_optimum_drained": drained / best["after_best_roles_rps"],
            "of_optimum_same_roles": after / best["after_rps"],
            "conversions": conversions,
            "figures": figures,
        }
    shares = ("of_optimum", "of_optimum_drained", "of_optimum_same_roles")
    columns = ("before_rps", "after_rps", "simulated_after_rps", *shares, "drain_s", "conversions")
    lines = [(name, *(point[column] for column in columns)) for name, point in found.items()]
    print(live_tables.table((f"links cut to {CUT_GBPS.value:g} Gbit/s", *columns), lines))
    print(f"optimum, requests/s: {', '.join(f'{n} {v:.3f}' for n, v in best.items())}; offered {len(arrived) / arrived[-1]:.3f}")
    return {"cut": {"at_s": change.at_s, "settled_s": change.settled_s, "gbps": change.gbps}, "optimum": best, "policies": found}


def router(bench: Bench, config: ConfigDict) -> dict[str, Any]:
    """The router's own cost."""
    shape = live_router.Shape(ROUTER_TOKENS.value)
    long = live_router.Shape(ROUTER_TOKENS.value, _RESTART_TOKENS)
    source = live_router.Source(SEED.value, bench.vocab, bench.workdir.path, MAX_LATE_S.value)
    rate = live_router.measure_rate(bench.deployment, shape, ROUTER_RPS.value, ROUTER_REQUESTS.value, source)
    queue = live_router.measure_queue(bench.deployment, shape, ROUTER_QUEUE.value, source)
    requests = max(MIN_COMPLETIONS.value, int(10 * RESTART_RPS.value))
    restart = live_router.measure_restart(bench.deployment, long, RESTART_RPS.value, requests, source)
    for name, result in (("rate", rate), ("restart", restart)):
        bench.keep(name, [row.flat() for row in result.pop("rows")], result.pop("broken"))
    print(f"receive to dispatch at {rate['offered_rps']:g}/s: P50 {rate['route_p50_ms']:.3f} ms, P99 {rate['route_p99_ms']:.3f} ms")
    print(f"CPU of the router: {rate['cpu_ms_per_request']['router']:.2f} ms per request")
    print(f"{queue['queued']} requests wait: {queue['bytes_per_request']['router'] / 1024:.1f} KiB each in the router")
    print(f"restart: {restart['running_then']} running, {restart['came_back']} came back, {restart['lost']} lost of {restart['requests']}")
    return {"rate": rate, "queue": queue, "restart": restart}


def tenants(bench: Bench, config: ConfigDict) -> dict[str, Any]:
    """What one tenant notices of another."""
    deployment = live_tenants.with_quota(bench.deployment, QUOTA.value)
    scale, most = deployment.scale.tokens, deployment.rate if config.rate else deployment.rate / config.load
    recorded = bench.recorded(POLITE_LOAD.value * most)
    crowd = bench.recorded(GREEDY.value * most, SEED.value + 1).filling(recorded.recorded[-1].time_s)
    polite = asks_of(recorded, scale, live_tenants.POLITE)
    both = live_tenants.merged(polite, asks_of(crowd, scale, live_tenants.GREEDY))
    found: dict[str, Any] = {}
    with LiveCluster(deployment, bench.workdir.path) as live:
        for name, asks in (("alone", polite), ("beside", both)):
            live_bench.restart_router(live, deployment)
            played = live_bench.play(live, bench.script(live, asks, recorded), bench.workdir.path, name)
            bench.keep(name, [row.flat() for row in played.rows], played.broken)
            bench.workdir.write_rows(f"egress_{name}.csv", played.egress)
            found[name] = {tenant: live_tenants.of(played.rows, tenant) for tenant in {ask.tenant for ask in asks}}
    alone, beside = (found[name][live_tenants.POLITE]["ttft_p90_s"] for name in ("alone", "beside"))
    columns = ("asked", "done", "refused", "failed", "ttft_p50_s", "ttft_p90_s")
    rows = [(f"{tenant} {name}", *(f[c] for c in columns)) for name, point in found.items() for tenant, f in point.items()]
    print(live_tables.table(("tenant", *columns), rows))
    return {"tenants": found, "p90_growth": beside / alone - 1}


def main(argv: list[str]) -> None:
    """Flags to points, their tables, files and the headline."""
    del argv
    config = CONFIG.value
    if TRACE.value:
        with config.unlocked():
            config.trace = TRACE.value
    bench = Bench(config, Workdir(WORKDIR.value, overwrite=True))
    workdir = bench.workdir
    workdir.write_config(config)
    workdir.write_env()
    modes = {"load": load, "saturate": saturate, "cut": cut, "router": router, "tenants": tenants}
    try:
        found = modes[MODE.value](bench, config)
    except ReplayInvalid as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    files = {kind: {name: workdir.path / f"{kind}_{name}.csv" for name in bench.points} for kind in ("requests", "egress")}
    drawn = {name: path for name, path in files["egress"].items() if path.is_file()}
    marks = {"link cut": found["cut"]["at_s"]} if "cut" in found else {}
    live_tables.draw(workdir.path / "figure.png", files["requests"], drawn, marks)
    result = {"mode": MODE.value, "valid": not bench.broken, "scale": bench.deployment.scale, **found, "broken": bench.broken[:20]}
    workdir.write_summary(result)
    for line in bench.broken[:10]:
        print(f"INVALID: {line}", file=sys.stderr)
    headline(result)
    if bench.broken:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)

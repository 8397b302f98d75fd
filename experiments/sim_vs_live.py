"""Plays the same arrivals in the simulator and on a live cluster with profiled engines, and says how far apart they are.

    python -m experiments.sim_vs_live [--also=configs/clusters/paper_profiled_small.py]
    python -m experiments.sim_vs_live --config=configs/clusters/paper_profiled_small.py [--config.policy=least_ttft] [--config.load=0.5]

Both get the same profiles, policy, parameter, arrivals and prompts; both count by `simulation.summary`. Live runs of several configs come
one after the other, at `load` of Lambda_max. The last line is JSON: `errors` per config, live over simulated - 1, of `ttft_p50`,
`ttft_p90`, `throughput` (counted requests until the last first token) and `egress` (bytes of KV over the time of arrivals), and `chaos`,
the same (root mean square) of twenty simulations whose arrivals are late by up to 30 ms of wall time, as a live system's are.

What the simulator does not have, with its size in model seconds at the default scale (as fast as the clock), as `parts` show it:
* messages between client, router, decode and prefill servers, and making the segments of the last chunk: 20 to 30 ms of wall time per
  request on two idle cores, which is 1 to 2 % of TTFT here, the whole error of p50; it grows with the scale and with the machine's load;
* gRPC's own bytes on the link, and probes of its rate while it is idle, up to a fortieth of it; the figure `egress` counts KV alone, on
  both sides, egress.csv has what the relays saw;
* KV bytes in whole elements: the byte scale is the one that was found, to 1e-3;
* reports of servers come every quarter of a wall second, where the simulator's policy sees each change at once. A policy that looks at
  queues soon decides otherwise, and what it decides changes the queues: `same_placement` says for how many requests it did not, `chaos`
  what so much difference makes of the figures. P90 of shadow_price on the small system has 3 to 7 % with 500 requests, 2 to 3 with 2000,
  1.6 with 4000, so play many;
* the order of transfers on a link. Ours leave with least left first, which `--config.sim.link_order=least_left` simulates; with `fair` they
  share the link. A scaled link is in between: half a MiB, 26 MB of the model's on the small system, is in flight and nobody overtakes it.
  With the placements of 2000 live requests there, P50 and P90 are 1.05 and 2.66 s by the one, 1.15 and 2.84 s by the other, 1.18 and
  2.82 s live;
* memory of decode instances, which a live request holds from its arrival on and a simulated one from its commit: it binds nowhere here.
What the live side does not have: the network inside a region (2 ms of the simulated TTFT), and prefix caches (off in the simulation).

Writes per config, in a folder of its name: live.csv and simulated.csv (a row per request), egress.csv, usage.csv, figure.png; and
config.json, env.json, summary.json. A live run that breaks an invariant prints INVALID and ends with code 1.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.clusters import load_deployment
from configs.models import load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.deployment import Deployment
from prfaas_jax.serving.process import run_main
from prfaas_jax.testing import live_bench, live_systems, live_tables
from prfaas_jax.testing.live_cluster import LiveCluster
from prfaas_jax.testing.replay import ReplayInvalid
from prfaas_jax.testing.replay_script import as_played, asks_of

CONFIG = config_flags.DEFINE_config_file("config", "configs/clusters/paper_profiled.py", "profiled engines", lock_config=True)
ALSO = flags.DEFINE_list("also", [], "files of more deployments, each as it is")
REQUESTS = flags.DEFINE_integer("requests", None, "of each; default: the config's", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of arrivals and prompts", lower_bound=0)
MAX_LATE_S = flags.DEFINE_float("max_late_s", 0.1, "wall seconds that a percent of the requests may be sent late", lower_bound=1e-4)
WORKDIR = flags.DEFINE_string("workdir", "runs/sim_vs_live", "where to keep config, environment, rows, summary and pictures")


def read(path: str) -> ConfigDict:
    """The config of a file; InvalidInput where it is none."""
    spec = importlib.util.spec_from_file_location(f"_deployment_{Path(path).stem}", path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise InvalidInput("also", path, "a .py file with get_config()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config: ConfigDict = module.get_config()
    return config


def compare(deployment: Deployment, workdir: Workdir, label: str) -> dict[str, Any]:
    """Both runs, their files and picture; `broken` says what makes the live one invalid."""
    assert deployment.workload is not None  # there are profiles, so it has a rate
    scale = deployment.scale
    recorded = as_played(deployment.workload, SEED.value, deployment.requests, scale.tokens)
    simulated = live_bench.simulated(deployment, recorded)
    workdir.write_rows("simulated.csv", simulated.rows)
    workdir.write_rows("usage.csv", simulated.usage)
    with LiveCluster(deployment, workdir.path) as live:
        asks = asks_of(recorded, scale.tokens)
        vocab = live_bench.vocab_size(deployment, load_model_config)
        script = live_bench.script_of(live, asks, SEED.value, vocab, recorded.block_tokens, late_s=MAX_LATE_S.value)
        played = live_bench.play(live, script, workdir.path, label)
        found = live_bench.live_figures(played.rows, recorded, deployment, live_bench.byte_scale(live))
    workdir.write_rows("live.csv", [row.flat() for row in played.rows])
    workdir.write_rows("egress.csv", played.egress)
    files = {name: workdir.path / f"{name}.csv" for name in ("live", "simulated", "egress", "usage")}
    live_tables.draw(
        workdir.path / "figure.png",
        {name: files[name] for name in ("simulated", "live")},
        {"simulated": files["usage"], "live": files["egress"]},
    )
    result = {
        "policy": deployment.policy,
        "parameter": deployment.parameter,
        "errors": live_bench.errors(found, simulated.figures),
        "chaos": live_bench.chaos(deployment, recorded, simulated.figures),
        "same_placement": live_bench.same_placement(played.rows, simulated.rows),
        "late_p99_s": played.late_p99_s,
        "live": found,
        "simulated": simulated.figures,
        "broken": played.broken + [f"{code}: {count} requests" for code, count in found["failed"].items()],
    }
    workdir.write_summary(result)
    return result


def table(label: str, result: dict[str, Any]) -> str:
    """The figures of both side by side."""
    live, simulated = result["live"], result["simulated"]
    names = [name for name in ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p50_s", "e2e_p50_s") if name in live]
    names += ["throughput_rps", "goodput_rps", "slo_share", "offload_share", "egress_gbps"]
    chaos = {field: result["chaos"][name] for name, field in live_bench.COMPARED.items()}
    rows = [(n, simulated[n], live[n], live[n] / simulated[n] - 1 if simulated[n] else None, chaos.get(n)) for n in names]
    return live_tables.table((label, "simulated", "live", "live / simulated - 1", "chaos"), rows)


def main(argv: list[str]) -> None:
    """Configs to runs, tables, files and the headline."""
    del argv
    configs = {"config": CONFIG.value} | {Path(path).stem: read(path) for path in ALSO.value}
    for config in configs.values() if REQUESTS.value else ():
        with config.unlocked():
            config.requests = REQUESTS.value
    workdir = Workdir(WORKDIR.value, overwrite=True)
    workdir.write_config({name: config.to_dict() for name, config in configs.items()})
    workdir.write_env()
    deployments = {name: load_deployment(config) for name, config in configs.items()}
    deployments = {name: live_systems.with_room(deployment, deployment.requests) for name, deployment in deployments.items()}
    for name, deployment in deployments.items():
        if deployment.engine != "profiled":
            raise InvalidInput(f"{name}.engine", deployment.engine, "profiled: there is nothing to hold real engines against")
    results = {}
    try:
        for name, deployment in deployments.items():
            results[name] = compare(deployment, Workdir(workdir.path / name, overwrite=True), name)
            print(table(name, results[name]), end="\n\n", flush=True)
    except ReplayInvalid as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    broken = [f"{name}: {line}" for name, result in results.items() for line in result["broken"]]
    result = {
        "errors": {name: found["errors"] for name, found in results.items()},
        "chaos": {name: found["chaos"] for name, found in results.items()},
        "same_placement": {name: found["same_placement"] for name, found in results.items()},
        "requests": {name: found["live"]["requests"] for name, found in results.items()},
        "valid": not broken,
    }
    workdir.write_summary(result)
    for line in broken[:10]:
        print(f"INVALID: {line}", file=sys.stderr)
    headline(result)
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)

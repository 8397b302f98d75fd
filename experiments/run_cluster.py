"""Runs a whole deployment on this machine: its servers as processes, relays for the links between its sites, and the router.

    python -m experiments.run_cluster --config=configs/clusters/two_sites_cpu.py [--config.clusters.far.prefill=2] [--workdir=runs/cluster]

Prints where everything is reached, then `READY {"router", "servers", "lanes", "controls", "metrics"}`, and runs until ctrl-C or SIGTERM,
which end all of it, exit code 0. A process that ends by itself ends the run, exit code 1, naming it; with --restart it is started again.
Leaves config.json, env.json, servers.json, deployment.json and a log of each process in --workdir.

Links are emulated: a rate per direction and a round trip, in model units times the deployment's scales. The relays end TCP on both sides,
so nothing here says how the kernel's TCP does under loss, reordering or congestion.
"""

import json
import signal
import sys
import time

from absl import flags, logging
from ml_collections import config_flags

from configs.clusters import load_deployment
from prfaas_jax.errors import PrfaasError
from prfaas_jax.results import Workdir
from prfaas_jax.serving.launcher import READY
from prfaas_jax.serving.process import run_main
from prfaas_jax.serving.signals import EndSignals
from prfaas_jax.testing.live_cluster import LiveCluster
from prfaas_jax.testing.status_line import StatusLine

CONFIG = config_flags.DEFINE_config_file("config", "configs/clusters/two_sites_cpu.py", "the deployment", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/cluster", "where files and logs go; an earlier run there is overwritten")
RESTART = flags.DEFINE_boolean("restart", False, "start a process again that has ended by itself, instead of ending the run")

_WATCH_S = 0.2
# A process that ends again and again has a reason that a restart does not mend.
_MAX_RESTARTS, _WITHIN_S = 5, 60.0


class ProcessEnded(PrfaasError):
    """A process ended that should not have; the message ends with the last lines of its log."""


def main(argv: list[str]) -> None:
    """Starts, says where, watches until a signal."""
    del argv
    deployment = load_deployment(CONFIG.value)
    workdir = Workdir(WORKDIR.value, overwrite=True)
    workdir.write_config(CONFIG.value)
    workdir.write_env()
    starting = LiveCluster(deployment, workdir.path)
    # Until all is up a signal interrupts the start; what was started so far is ended on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StatusLine(starting.startup) as status, starting as live:
            status.end()
            with EndSignals() as ends:
                show(live)
                watch(live, ends)
    except KeyboardInterrupt:
        print("interrupted: every process has been stopped", file=sys.stderr)
    except ProcessEnded as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def show(live: LiveCluster) -> None:
    """A table of addresses, the links, and READY as the last line."""
    metrics = live.metrics_addresses
    rows = [("server", "address", "metrics", "log")]
    for name, address in live.addresses.items():
        rows.append((name, address, metrics.get(name, "-"), str(live.process_of(name).log_path)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, lane in live.lanes.items():
        gbps = lane.status()["down"]["gbps"]
        print(f"link {name}: {gbps:.4g} Gbit/s each way, lane {lane.address}, control {live.controls[name].address}")
    print("links end TCP on both sides: kernel loss, retransmission and congestion control are not emulated")
    lanes, controls = ({name: relay.address for name, relay in relays.items()} for relays in (live.lanes, live.controls))
    ready = {"router": live.router_address, "servers": live.addresses, "lanes": lanes, "controls": controls, "metrics": metrics}
    print(READY + json.dumps(ready), flush=True)


def watch(live: LiveCluster, ends: EndSignals) -> None:
    """Returns when told to stop; raises ProcessEnded for a process that ends before, unless it is to be restarted."""
    restarts: dict[str, list[float]] = {}
    while not ends.wait(_WATCH_S):
        for name in live.ended():
            process = live.processes[name]
            why = f"{name} ended with code {process.popen.returncode}; its log {process.log_path} ends with\n{process.log_tail()}"
            recent = [at for at in restarts.get(name, []) if time.monotonic() - at < _WITHIN_S]
            if not RESTART.value or len(recent) >= _MAX_RESTARTS or ends.wait(0):
                raise ProcessEnded(why)
            logging.warning("starting %s again: it ended with code %s", name, process.popen.returncode)
            restarts[name] = [*recent, time.monotonic()]
            live.restart(name, wait=False)  # a signal must not have to wait for it


if __name__ == "__main__":
    run_main(main)

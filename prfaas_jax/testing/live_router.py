"""A router between a load generator and profiled servers that cost little: what a request costs it, idle, overrun and restarted.

No relays, and no prefill servers beside the decode server, which computes short prompts itself: the machine is the router's, as far as
there is room on it. Wall seconds throughout.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profiles import prefill_s
from prfaas_jax.serving.deployment import ClusterServers, Deployment
from prfaas_jax.serving.launcher import Process, Processes, module_command
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc
from prfaas_jax.testing.live_launches import Launch, relay_keys, router_launch, server_launches
from prfaas_jax.testing.replay import ReplayProcess
from prfaas_jax.testing.replay_script import Ask, Row, Script, violations
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS
from prfaas_jax.transfer.security import open_channel

_READY_S, _STATUS_S, _QUEUED_S, _GONE_S = 120.0, 10.0, 600.0, 120.0
_NOWHERE = "127.0.0.1:9"
# Prefill instances of the region are busy for this share of the time.
_BUSY = 0.3
# Engines that finish nothing while a queue builds up.
_SLOW = 1e-3
_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of the requests: prompt tokens, live tokens generated."""

    tokens: int = 128
    new_tokens: int = 2


@dataclasses.dataclass(frozen=True)
class Source:
    """Where requests come from: the seed of their prompts, ids below `vocab_size`, files, wall seconds that a percent may be sent late."""

    seed: int
    vocab_size: int
    workdir: Path
    late_s: float = 0.1


def quick(deployment: Deployment, rate: float, shape: Shape) -> Deployment:
    """The deployment, as much faster as its first region needs to compute `rate` short prompts per wall second by itself.

    Raises InvalidInput for a deployment without profiled engines, or a region without prefill instances.
    """
    if deployment.engine != "profiled":
        raise InvalidInput("config.engine", deployment.engine, "profiled: engines that leave the machine to the router")
    region = deployment.regions[0]
    if not region.prefill or region.instance is None:
        raise InvalidInput(f"config.clusters.{region.name}.prefill", region.prefill, "at least one instance")
    return at_speed(deployment, rate * prefill_s(region.instance.prefill, shape.tokens) / (region.prefill * _BUSY))


def at_speed(deployment: Deployment, time_scale: float) -> Deployment:
    """The deployment at another time scale."""
    scale = dataclasses.replace(deployment.scale, time=time_scale)
    return dataclasses.replace(deployment, scale=scale, config={**deployment.config, "time_scale": time_scale})


class RouterCluster:
    """A router and profiled servers; use it as a context manager. `most`: requests that each of them takes at once."""

    def __init__(self, deployment: Deployment, workdir: Path, most: int, grace_s: float = 0.5):
        """Starts nothing yet; `grace_s` is what a router gives its requests as it ends."""
        self._deployment, self._workdir, self._most, self._grace_s = deployment, workdir, most, grace_s
        self._running = Processes(workdir)
        self.processes: dict[str, Process] = {}
        self._router: Launch | None = None

    def __enter__(self) -> Self:
        self._running.__enter__()
        try:
            self._start()
        except BaseException:
            self._running.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.__exit__(None, None, None)

    @property
    def address(self) -> str:
        """Of the router."""
        return str(self.processes["router"].ready["address"])

    def memory(self) -> dict[str, int]:
        """Resident bytes of every process."""
        return {name: psutil.Process(process.pid).memory_info().rss for name, process in self.processes.items()}

    def cpu_s(self, name: str) -> float:
        """Seconds of CPU that a process has taken."""
        times = psutil.Process(self.processes[name].pid).cpu_times()
        return times.user + times.system

    def streams(self) -> int:
        """Requests that the router has."""
        with open_channel(self.address, FRONT_CHANNEL_OPTIONS, self._deployment.security) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            status: generation_pb2.GenerationStatus = stub.Status(common_pb2.StatusRequest(), timeout=_STATUS_S)
            return status.streams

    def restart_router(self) -> float:
        """Ends it and starts another one at its address; seconds until that is ready."""
        assert self._router is not None  # _start
        began = time.monotonic()
        self.processes["router"].stop()
        self._launch("router", self._router)
        self.processes["router"].wait_ready(_READY_S)
        return time.monotonic() - began

    def _launch(self, name: str, launch: Launch) -> None:
        self.processes[name] = self._running.launch(name.replace("/", "_"), module_command(launch.module, launch.flags), launch.env)

    def _start(self) -> None:
        deployment, most = self._deployment, self._most
        lanes = {key: _NOWHERE for link in deployment.links for key in relay_keys(deployment, link)}
        for name, launch in server_launches(deployment, lanes, self._workdir).items():
            launch.flags |= {"max_queue": most, "max_requests" if "decode" not in launch.services else "decode_max_requests": most}
            self._launch(name, launch)
        servers = []
        for cluster in deployment.clusters:
            process = self.processes[f"{cluster.name}/0"]
            process.wait_ready(_READY_S)
            role = "decode" if cluster.kind == "region" else "prefill"
            address: str = process.ready[role]["address"]
            alone = {"prefill": (), "decode": ()} | {role: (address,)}
            servers.append(ClusterServers(cluster.name, cluster.kind, alone["prefill"], alone["decode"]))
        self._router = router_launch(deployment, servers, self._workdir)
        self._router.flags |= {"max_requests": most, "grace_s": self._grace_s}
        self._launch("router", self._router)
        self.processes["router"].wait_ready(_READY_S)
        self._router.keep(self.processes["router"].ready)


def asks(shape: Shape, rate: float, count: int, seed: int) -> tuple[Ask, ...]:
    """`count` requests in Poisson arrivals of `rate` per second; all at once where that is 0."""
    gaps = np.random.default_rng([seed, 2]).exponential(1 / rate, count) if rate else np.zeros(count)
    return tuple(Ask(i, float(at), shape.tokens, shape.new_tokens) for i, at in enumerate(np.cumsum(gaps) - gaps[0]))


@contextlib.contextmanager
def _replaying(cluster: RouterCluster, requests: tuple[Ask, ...], source: Source, label: str) -> Iterator[ReplayProcess]:
    script = Script((cluster.address,), requests, source.seed, source.vocab_size, check=True, late_s=source.late_s)
    paths = [os.fspath(source.workdir / f".{label}.{name}.json") for name in ("script", "rows")]
    try:
        with ReplayProcess(label) as process:
            process.start(script, *paths)
            yield process
    finally:
        for path in paths:
            Path(path).unlink(missing_ok=True)


def measure_rate(deployment: Deployment, shape: Shape, rate: float, count: int, source: Source) -> dict[str, Any]:
    """What a request costs the router at `rate` per second: milliseconds from receiving to sending on, CPU; `rows` of all."""
    with RouterCluster(quick(deployment, rate, shape), source.workdir, 4 * count) as cluster:
        before = {name: cluster.cpu_s(name) for name in cluster.processes}
        with _replaying(cluster, asks(shape, rate, count, source.seed), source, "rate") as process:
            began = time.monotonic()
            rows, said = process.wait()
            seconds = time.monotonic() - began
        cpu_s = {name: cluster.cpu_s(name) - before[name] for name in cluster.processes}
    done = [row for row in rows if row.done]
    route_ms = np.array([row.parts["route"] for row in done]) * 1e3
    p50, p99 = np.percentile(route_ms, (50, 99)).tolist()
    return {
        "offered_rps": rate,
        "completed": len(done),
        "completed_rps": len(done) / seconds,
        "route_p50_ms": p50,
        "route_p99_ms": p99,
        "cpu_ms_per_request": {name: value / len(rows) * 1e3 for name, value in cpu_s.items()},
        "late_p99_s": said["late_p99_s"],
        "broken": broken(rows),
        "rows": rows,
    }


def measure_queue(deployment: Deployment, shape: Shape, count: int, source: Source) -> dict[str, Any]:
    """Resident bytes of every process before `count` requests wait at once, while they do, and after their clients are gone.

    Twice: allocators keep what they had, so it is the second queue that tells whether anything grows.
    """
    with RouterCluster(at_speed(deployment, _SLOW), source.workdir, 2 * count) as cluster:
        memory = {"before": cluster.memory()}
        for queued, after in (("queued", "after"), ("queued_again", "after_again")):
            with _replaying(cluster, asks(shape, 0.0, count, source.seed), source, "queue"):
                _until(lambda: cluster.streams() == count, _QUEUED_S, f"{count} requests in the router's queue")
                time.sleep(1.0)  # they reach the decode server, too
                memory[queued] = cluster.memory()
            _until(lambda: cluster.streams() == 0, _GONE_S, "an empty router")
            memory[after] = cluster.memory()
    per_request = {name: (memory["queued"][name] - memory["before"][name]) / count for name in memory["before"]}
    return {"queued": count, "memory_mib": {k: _mib(v) for k, v in memory.items()}, "bytes_per_request": per_request}


def measure_restart(deployment: Deployment, shape: Shape, rate: float, count: int, source: Source) -> dict[str, Any]:
    """Ends the router in the middle of a run, and starts another one: how many requests were under way, came back, were lost."""
    with (
        RouterCluster(quick(deployment, rate, shape), source.workdir, 4 * count) as cluster,
        _replaying(cluster, asks(shape, rate, count, source.seed), source, "restart") as process,
    ):
        time.sleep(max(0.0, process.began + count / rate / 2 - time.monotonic()))
        running = cluster.streams()
        down_s = cluster.restart_router()
        rows, _ = process.wait()
    lost = [row for row in rows if not row.done]
    return {
        "requests": count,
        "running_then": running,
        "router_down_s": down_s,
        "came_back": sum(row.returns > 0 for row in rows),
        "lost": len(lost),
        "broken": broken(rows),
        "rows": rows,
    }


def broken(rows: list[Row]) -> list[str]:
    """What makes a run invalid: as `violations`, and every request that was not answered."""
    return [*violations(rows), *(f"request {row.number}: {row.error or 'no answer'}" for row in rows if not row.done)]


def _until(holds: Callable[[], bool], deadline_s: float, what: str) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {deadline_s:.0f} s")
        time.sleep(_POLL_S)


def _mib(sizes: Mapping[str, int]) -> dict[str, float]:
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}

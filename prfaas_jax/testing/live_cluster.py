"""A whole deployment on this machine: every server and the router as processes, and relays for every link between two sites.

The relays run in this process, so that what crosses a link can be watched, slowed down and broken. A prefill server has two for each
region that it has a link to: one for its lane, with the KV, and one for its control stream; each has the link's rate in both directions.
Several prefill servers of one cluster have an equal part of it each, since relays do not share a line: together they never get more than
the link has, but one that is alone gets less. A profiled cluster is one server, so there it is exact. Prefill servers of a region stand
beside its decode servers, without a relay.
"""

import contextlib
import dataclasses
import math
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.deployment import ClusterServers, DeployedCluster, Deployment
from prfaas_jax.serving.launcher import LaunchFailed, Process, Processes, module_command
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from prfaas_jax.testing.live_launches import Launch, Role, relay_keys, router_launch, server_launches
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS
from prfaas_jax.transfer.security import open_channel

READY_S = 900.0
_STATUS_S = 30.0
_LOG_TAIL_BYTES = 4096
# A relay's target before the server behind it has a port: nothing listens there.
_NOWHERE = "127.0.0.1:9"
# "compiling SmolLM2:  50%|#####     | 1/2 [00:03<00:03,  3.20s/program]", as tqdm writes it.
_BAR = re.compile(r"(?P<what>[^\r\n:|]+):\s+\d+%\|[^|]*\|\s*(?P<done>\d+/\d+)")

Status = generation_pb2.GenerationStatus | prefill_pb2.PrefillStatus


class LiveCluster:
    """Starts everything when the block is entered and ends it when the block is left, however that happens.

    Raises LaunchFailed, with the end of the log, when a process does not come up.

    Attributes:
        processes: by name: "router"; of a prefill cluster "far/0", ..; of a region "home/prefill/0", .. and "home/decode/0", ..; a
            profiled cluster is one, "far/0" or "home/0", and servers of a region that change their role are "home/0", ..
        addresses: of every server by the same names, but processes that are both have "home/prefill/0" and "home/decode/0", ..
        lanes: the relays that KV crosses, by link, "far->home"; with several servers "far->home/0", ..
        controls: those of the control streams.
        servers: what the router was told.
    """

    def __init__(self, deployment: Deployment, workdir: Path, log_dir: Path | None = None):
        """Starts nothing yet. What the processes read is written into `workdir`; each logs to `<log_dir>/<name>.log`, or `workdir`.

        Raises InvalidInput for a prefill server with several sender processes behind a link: their ports are not to be chosen here.
        """
        for cluster in deployment.prefill:
            if cluster.prefill_server.get("sender_processes", 0) > 1:
                field = f"config.clusters.{cluster.name}.prefill_server.sender_processes"
                raise InvalidInput(field, cluster.prefill_server["sender_processes"], "0 or 1 behind the relay of a link")
        self.deployment, self._workdir, self._log_dir = deployment, workdir, log_dir or workdir
        self.processes: dict[str, Process] = {}
        self.addresses: dict[str, str] = {}
        self.lanes: dict[str, Relay] = {}
        self.controls: dict[str, Relay] = {}
        self.servers: tuple[ClusterServers, ...] = ()
        self._launches: dict[str, Launch] = {}
        self._stopped: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            # All is well: from here on leaving the block ends it.
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def router_address(self) -> str:
        """host:port of the router."""
        return self.addresses["router"]

    @property
    def metrics_addresses(self) -> dict[str, str]:
        """host:port of the Prometheus metrics of the servers that have them, by the names of `addresses`."""
        found = {}
        for name, launch in self._launches.items():
            for role, service in launch.ready(self.processes[name].ready).items():
                found[launch.services[role]] = service.get("metrics_address", "")
        return {name: address for name, address in found.items() if address}

    def process_of(self, name: str) -> Process:
        """The process of a server, by its name in `addresses`; raises InvalidInput for an unknown one."""
        for process, launch in self._launches.items():
            if name in launch.services.values():
                return self.processes[process]
        raise InvalidInput("name", name, f"one of {', '.join(self.addresses)}")

    # --- while it runs

    def ended(self) -> tuple[str, ...]:
        """Processes that have ended without being told to by `stop`."""
        return tuple(n for n, process in self.processes.items() if n not in self._stopped and process.popen.poll() is not None)

    def stop(self, name: str) -> int:
        """Ends a process: SIGTERM first; its exit code."""
        process = self._process(name)
        self._stopped.add(name)
        return process.stop()

    def restart(self, name: str, wait: bool = True) -> Process:
        """Starts a process that has ended again, at the addresses that it had; with `wait`, returns once it is ready. Its old log is kept.

        Raises InvalidInput for one that still runs, LaunchFailed when it is waited for and does not come up.
        """
        old = self._process(name)
        if old.popen.poll() is None:
            raise InvalidInput("name", name, f"a process that has ended; this one runs as {old.pid}")
        launch = self._launches[name]
        os.replace(old.log_path, old.log_path.with_suffix(f".{launch.starts}.log"))
        self._launch(name)
        self._stopped.discard(name)
        if wait:
            self.processes[name].wait_ready(READY_S)
        return self.processes[name]

    def status(self, name: str, timeout_s: float = _STATUS_S) -> Status:
        """A server's own account, by its name in `addresses`; raises grpc.RpcError when it does not answer."""
        if name not in self.addresses:
            raise InvalidInput("name", name, f"one of {', '.join(self.addresses)}")
        with open_channel(self.addresses[name], FRONT_CHANNEL_OPTIONS, self.deployment.security) as channel:
            prefills = name != "router" and "/decode/" not in name
            stub: Any = (prefill_pb2_grpc.PrefillStub if prefills else generation_pb2_grpc.GenerationStub)(channel)
            return stub.Status(common_pb2.StatusRequest(), timeout=timeout_s)

    def router_status(self) -> generation_pb2.GenerationStatus:
        """The router's own account; raises grpc.RpcError when it does not answer."""
        status = self.status("router")
        assert isinstance(status, generation_pb2.GenerationStatus)  # it is no prefill server
        return status

    def statuses(self, timeout_s: float = 2.0) -> dict[str, Status]:
        """Of every server, without those that do not answer in `timeout_s` seconds."""
        found = {}
        for name in self.addresses:
            with contextlib.suppress(grpc.RpcError):
                found[name] = self.status(name, timeout_s)
        return found

    def startup(self) -> str:
        """One line on where every process that has been started stands; thread-safe, for a status display."""
        return ", ".join(
            f"{p.name}: {'ready' if p.ready else phase(_tail(p.log_path)) or 'starting'}" for p in list(self.processes.values())
        )

    def _process(self, name: str) -> Process:
        if name not in self.processes:
            raise InvalidInput("name", name, f"one of {', '.join(self.processes)}")
        return self.processes[name]

    # --- starting

    def _start(self, stack: contextlib.ExitStack) -> None:
        deployment = self.deployment
        for link in deployment.links:
            for key in relay_keys(deployment, link):
                for relays in (self.lanes, self.controls):
                    relays[key] = stack.enter_context(Relay(_NOWHERE, rtt_ms=deployment.scale.link_rtt_ms(link)))
        self._running = stack.enter_context(Processes(self._log_dir))
        self._launches = server_launches(deployment, {key: relay.address for key, relay in self.lanes.items()}, self._workdir)
        for name in self._launches:
            self._launch(name)
        self._wait_ready()
        self.servers = tuple(self._connect(cluster) for cluster in deployment.clusters)
        self._launches["router"] = router_launch(deployment, self.servers, self._workdir)
        self._launch("router")
        self._wait_ready()
        self._launches["router"].keep(self.processes["router"].ready)
        self.addresses["router"] = self.processes["router"].ready["address"]

    def _launch(self, name: str) -> None:
        launch = self._launches[name]
        self.processes[name] = self._running.launch(name, module_command(launch.module, launch.flags), launch.env)
        launch.starts += 1

    def _wait_ready(self) -> None:
        """Waits for all at once, so that the first to fail is heard although another one is still compiling."""
        deadline = time.monotonic() + READY_S
        while waiting := [p for p in self.processes.values() if not p.answered.wait(0.05)]:
            for process in self.processes.values():
                if process.answered.is_set():
                    process.wait_ready(0.0)
            if time.monotonic() > deadline:
                names = ", ".join(p.name for p in waiting)
                raise LaunchFailed(f"{names} not ready after {READY_S:.0f} s; logs in {self._log_dir}\n{waiting[0].log_tail()}")
        for process in self.processes.values():
            process.wait_ready(0.0)

    def _connect(self, cluster: DeployedCluster) -> ClusterServers:
        """Where the servers of a cluster are reached, once they are ready; its relays get their targets and rates."""
        deployment = self.deployment
        reached: dict[Role, list[str]] = {"prefill": [], "decode": []}
        lanes: list[str] = []
        bytes_scale = deployment.scale.bytes
        for name, launch in self._launches.items():
            if name.partition("/")[0] != cluster.name:
                continue
            ready = self.processes[name].ready
            # What a profiled server was asked for is met as closely as whole elements allow.
            bytes_scale = ready.get("byte_scale", bytes_scale)
            launch.keep(ready)
            for role, service in launch.ready(ready).items():
                self.addresses[launch.services[role]] = service["address"]
                reached[role].append(service["address"])
                lanes += service.get("lane_addresses", ())[:1]
        via: dict[str, dict[str, str]] = {}
        scale = dataclasses.replace(deployment.scale, bytes=bytes_scale)
        for link in deployment.links:
            if link.prefill != cluster.name:
                continue
            via[link.decode] = {}
            gbps = scale.link_gbps(link) / len(lanes)
            for key, address, lane in zip(relay_keys(deployment, link), reached["prefill"], lanes, strict=True):
                for relay, target in ((self.lanes[key], lane), (self.controls[key], address)):
                    relay.set_target(target)
                    relay.set_rate(gbps if gbps < math.inf else None)
                via[link.decode][address] = self.controls[key].address
        return ClusterServers(cluster.name, cluster.kind, tuple(reached["prefill"]), tuple(reached["decode"]), via)


def phase(log: str) -> str:
    """What the last progress bar in a log says, as "compiling SmolLM2 1/2"; empty when there is none."""
    bars = list(_BAR.finditer(log))
    return f"{bars[-1]['what'].strip()} {bars[-1]['done']}" if bars else ""


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""

"""The faults of a drill: what is broken, when, and how it is made whole again."""

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.serving.deployment import Deployment
from prfaas_jax.serving.launcher import Process, Processes, environment, module_command
from prfaas_jax.testing.live_cluster import LiveCluster
from prfaas_jax.testing.relay import Relay

# Of the transfer of a request that the fault is to meet: placed, but nothing has arrived; KV is arriving; tokens are.
Phase = Literal["before", "during", "after"]
PHASES: Final[tuple[Phase, ...]] = ("before", "during", "after")
ROLE_FAULTS: Final = ("kill", "freeze", "drain")
LINK_FAULTS: Final = ("cut", "black hole 1 s", "black hole 10 s", "black hole", "slow 10x", "half-close", "flip bytes", "reset after bytes")
CLIENT_FAULTS: Final = ("cancel", "deadline")

# A black hole or slow link "for ever" lasts until whoever met it has given up on it, which takes an idle timer.
_FOR_EVER_S = 5.0
_FROZEN_S = 3.0
_SLOW_S = 4.0
_DEAD_S = 1.0
_NOWHERE = "127.0.0.1:9"
_FLIPPED: Final = (40_000, 200_000, 200_100)
_RESET_AFTER: Final = (1, 65_536, 300_000)
_READY_S = 300.0
# A server's own grace, and what it takes to end.
_DRAIN_S = 30.0
# For the operating system to end a process that was killed.
_EXIT_S = 5.0


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: what.
        target: the process, by its name in `LiveCluster.processes`, or the link, "from->to"; empty: the client or the whole system.
        phase: of the request that it is to meet; None: whatever runs.
    """

    kind: str
    target: str = ""
    phase: Phase | None = None

    @property
    def name(self) -> str:
        """As in tables: "kill alpha/0 during"."""
        return " ".join(part for part in (self.kind, self.target, self.phase) if part)

    @property
    def breaks(self) -> Literal["process", "link", "client", "system"]:
        """What it is that breaks."""
        if self.kind in ROLE_FAULTS:
            return "process"
        return "link" if self.kind in LINK_FAULTS else "client" if self.kind in CLIENT_FAULTS else "system"


def all_faults(deployment: Deployment) -> tuple[Fault, ...]:
    """Every fault of every role and link; servers of one role, and links, take turns, so that each meets every kind.

    Raises InvalidInput for a deployment that lacks a role: the drill needs prefill clusters, and a region that prefills and decodes.
    """
    region = deployment.regions[0]
    roles = {
        "far prefill": [f"{c.name}/{i}" for c in deployment.prefill for i in range(c.prefill)],
        "near prefill": [f"{region.name}/prefill/{i}" for i in range(region.prefill)],
        "decode": [f"{region.name}/decode/{i}" for i in range(region.decode)],
    }
    if missing := [role for role, servers in roles.items() if not servers]:
        raise InvalidInput("deployment", missing, "a deployment with servers of every role")
    if region.decode < 2 or len(deployment.prefill) < 2:
        raise InvalidInput("deployment", region.decode, "two decode servers and two prefill clusters: one takes over from the other")
    found = []
    for servers in roles.values():
        turn = itertools.cycle(servers)
        found += [Fault(kind, next(turn), phase) for kind in ROLE_FAULTS for phase in PHASES]
    found += [Fault(kind, "router", "during") for kind in ROLE_FAULTS]
    links = itertools.cycle(f"{link.prefill}->{link.decode}" for link in deployment.links)
    found += [Fault(kind, next(links), phase) for kind in LINK_FAULTS for phase in PHASES]
    found += [Fault("liar joins"), Fault("liar in its place", roles["far prefill"][0]), Fault("all remotes gone"), Fault("overload")]
    found += [Fault(kind, "", phase) for kind in CLIENT_FAULTS for phase in PHASES]
    return tuple(found)


def chosen(faults: Sequence[Fault], pattern: str) -> tuple[Fault, ...]:
    """Those whose name a regular expression finds something in; raises InvalidInput for one that is malformed or finds none."""
    try:
        found = tuple(fault for fault in faults if re.search(pattern, fault.name))
    except re.error as error:
        raise InvalidInput("only", pattern, f"a regular expression ({error})") from error
    if not found:
        raise InvalidInput("only", pattern, f"a pattern that some fault matches, such as {faults[0].name}")
    return found


class Injector:
    """Breaks a running system, and makes it whole again."""

    def __init__(self, live: LiveCluster, workdir: Path):
        """Extra processes that a fault needs log into `workdir`."""
        self._live, self._workdir = live, workdir
        self._extra: Processes | None = None
        self._liar: Process | None = None
        self._exits: dict[str, _Exit] = {}
        self.exit_code: int | None = None  # of a server that was drained

    @property
    def remotes(self) -> list[str]:
        """Every prefill server, far and near."""
        return [name for name in self._live.processes if name != "router" and "/decode/" not in name]

    @property
    def liar_address(self) -> str:
        """Where the liar serves."""
        return self._liar.ready["address"] if self._liar is not None else ""

    def inject(self, fault: Fault) -> float:
        """Does it; for how many seconds the system is to be left like that. Returns at once, but for a liar that must start first."""
        match fault.kind, fault.breaks:
            case "kill", _:
                self._signal(fault.target, signal.SIGKILL)
                return _DEAD_S
            case "freeze", _:
                self._signal(fault.target, signal.SIGSTOP)
                return _FROZEN_S
            case "drain", _:
                self._signal(fault.target, signal.SIGTERM)
                return _DEAD_S
            case _, "link":
                return self._inject_link(fault)
            case "liar joins", _:
                self._start_liar({"join": self._live.router_address, "cluster": self._live.deployment.prefill[0].name})
                return _DEAD_S
            case "liar in its place", _:
                self._end(fault.target)
                ready = self._live.processes[fault.target].ready
                self._start_liar({"address": ready["address"], "lane_address": ready["lane_addresses"][0]})
                return _DEAD_S
            case "all remotes gone", _:
                for name in self.remotes:
                    self._signal(name, signal.SIGKILL)
                return _DEAD_S
        return 0.0

    def exit_s(self, name: str) -> float | None:
        """Seconds from SIGKILL until the process had ended, if it was killed last time and has."""
        return self._exits[name].seconds() if name in self._exits else None

    def heal(self, fault: Fault) -> None:
        """Restarts what has ended, at its address, and returns once it is ready; links are as they were."""
        match fault.kind, fault.breaks:
            case "freeze", _:
                self._signal(fault.target, signal.SIGCONT)
            case "kill", _:
                self._restart([fault.target])
            case "drain", _:
                self.exit_code = self._live.processes[fault.target].popen.wait(_DRAIN_S)
                self._restart([fault.target])
            case _, "link":
                self._heal_link(fault)
            case "liar joins" | "liar in its place", _:
                assert self._extra is not None  # inject
                self._extra.__exit__(None, None, None)
                self._extra = self._liar = None
                if fault.target:
                    self._restart([fault.target])
            case "all remotes gone", _:
                self._restart(self.remotes)

    def close(self) -> None:
        """Ends what a fault has started, if that has not been healed."""
        if self._extra is not None:
            self._extra.__exit__(None, None, None)

    # --- processes

    def _signal(self, name: str, number: int) -> None:
        process = self._live.processes[name]
        self._exits.pop(name, None)
        if number == signal.SIGKILL:
            self._exits[name] = _Exit(process.pid)
        process.signal_group(number)

    def _end(self, name: str) -> None:
        self._signal(name, signal.SIGKILL)
        self._live.processes[name].popen.wait(_READY_S)

    def _restart(self, names: Sequence[str]) -> None:
        for name in names:
            self._live.processes[name].popen.wait(_READY_S)
        started = [self._live.restart(name, wait=False) for name in names]
        for process in started:
            process.wait_ready(_READY_S)

    def _start_liar(self, where: dict[str, str]) -> None:
        """A prefill server with other weights."""
        deployment = self._live.deployment
        engine = deployment.prefill[0].prefill_engine
        assert engine is not None  # the drill needs real engines
        flags = dataclasses.asdict(dataclasses.replace(engine, checkpoint=f"{engine.checkpoint}@1")) | where
        self._extra = Processes(self._workdir)
        command = module_command("experiments.serve_prefill", flags)
        self._liar = self._extra.spawn("liar", command, environment(deployment.platform), _READY_S)

    # --- links

    def _relays(self, link: str) -> tuple[Relay, Relay]:
        """Of its lane, and of its control streams."""
        return self._live.lanes[link], self._live.controls[link]

    def _inject_link(self, fault: Fault) -> float:
        lane, control = both = self._relays(fault.target)
        match fault.kind:
            case "cut":
                for relay in both:
                    relay.set_target(_NOWHERE)
                    relay.reset()
                return _FOR_EVER_S
            case "black hole 1 s" | "black hole 10 s":
                seconds = float(fault.kind.split()[-2])
                for relay in both:
                    relay.black_hole(seconds)
                return seconds
            case "black hole":
                for relay in both:
                    relay.pause()
                return _FOR_EVER_S
            case "slow 10x":
                for relay in both:
                    relay.set_rate(self._gbps(fault.target) / 10)
                return _SLOW_S
            case "half-close":
                for relay in both:
                    relay.half_close("down")
                return _DEAD_S
            case "flip bytes":
                lane.flip_byte_after(_FLIPPED)
                return _DEAD_S
        for nbytes in _RESET_AFTER:
            lane.reset_after(nbytes)
        control.reset_after(1)
        return _DEAD_S

    def _heal_link(self, fault: Fault) -> None:
        lane, control = self._relays(fault.target)
        name = f"{fault.target.partition('->')[0]}/0"
        ready = self._live.processes[name].ready
        for relay, target in ((lane, ready["lane_addresses"][0]), (control, ready["address"])):
            relay.set_target(target)
            relay.resume()
            relay.set_rate(self._gbps(fault.target))

    def _gbps(self, name: str) -> float:
        link = next(x for x in self._live.deployment.links if f"{x.prefill}->{x.decode}" == name)
        return link.bytes_per_s / GBPS


class _Exit:
    """How long a child of ours that is killed now takes to end."""

    def __init__(self, pid: int):
        self._began = time.monotonic()
        self._seconds: float | None = None
        self._thread = threading.Thread(target=self._wait, args=(pid,), name="exit", daemon=True)
        self._thread.start()

    def _wait(self, pid: int) -> None:
        with contextlib.suppress(ChildProcessError):  # whoever started it has reaped it
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._seconds = time.monotonic() - self._began

    def seconds(self) -> float | None:
        self._thread.join(_EXIT_S)
        return self._seconds

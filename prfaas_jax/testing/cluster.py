"""A small Prefill-as-a-Service system on this machine: a prefill server behind an emulated WAN, a decode server, a router.

Three processes on free loopback ports. The relays of the WAN run in this process, so that what crosses it can be watched. Timers
that tell a dead peer are longer than between real hosts: where all compute on the same few cores, a peer that is late is just busy.
"""

import contextlib
import dataclasses
import os
import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.serving.launcher import LaunchFailed, Process, Processes, environment, module_command
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS, PING_TIMEOUT_ENV
from prfaas_jax.transfer.security import NONE, Security, open_channel

READY_S = 900.0
_STATUS_S = 30.0
_PATIENCE = {PING_TIMEOUT_ENV: "20"}
_IDLE_S, _POLL_S = 30.0, 3.0
_LOG_TAIL_BYTES = 4096
# "compiling SmolLM2:  50%|#####     | 1/2 [00:03<00:03,  3.20s/program]", as tqdm writes it.
_BAR = re.compile(r"(?P<what>[^\r\n:|]+):\s+\d+%\|[^|]*\|\s*(?P<done>\d+/\d+)")


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """What to start.

    Attributes:
        prefill: engine of the prefill server.
        decode: engine of the decode server.
        threshold_tokens: longer prompts are prefilled remotely.
        tokenizer: directory or GGUF file for the router; None when prompts are token ids.
        gbps: Gbit/s of the WAN in each direction; None is unlimited. Lane and control stream each have a link of their own.
        rtt_ms: its round trip.
        platform: what JAX runs on ("cpu", ..); None leaves the choice to JAX.
        security: of all three processes, and of what this one asks them.
    """

    prefill: EngineOptions
    decode: EngineOptions
    threshold_tokens: int
    tokenizer: str | None = None
    gbps: float | None = 1.0
    rtt_ms: float = 20.0
    platform: str | None = "cpu"
    security: Security = NONE


class Cluster:
    """Starts everything when the block is entered and ends it when the block is left, however that happens.

    Raises LaunchFailed, with the end of the log, when a process does not come up.
    """

    def __init__(self, options: ClusterOptions, log_dir: Path):
        """Starts nothing yet. Each process logs to `<log_dir>/<name>.log`."""
        self._options, self._log_dir = options, log_dir
        self._stack = contextlib.ExitStack()
        self._starting: dict[str, Process] = {}

    def __enter__(self) -> "Cluster":
        with contextlib.ExitStack() as stack:
            self._start(stack)
            # All is well: from here on leaving the block ends it.
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def _start(self, stack: contextlib.ExitStack) -> None:
        options = self._options
        # The prefill server is told what to advertise before it has a port of its own: the lane's target follows.
        self.lane = stack.enter_context(Relay("127.0.0.1:9", gbps=options.gbps, rtt_ms=options.rtt_ms))
        processes = stack.enter_context(Processes(self._log_dir))
        security = dataclasses.asdict(options.security)
        engine_env = environment(options.platform) | _PATIENCE
        sites: dict[str, dict[str, Any]] = {
            "prefill": dataclasses.asdict(options.prefill) | {"advertise_lane": self.lane.address},
            "decode": dataclasses.asdict(options.decode) | {"idle_s": _IDLE_S},
        }
        for name, flags in sites.items():
            self._starting[name] = processes.launch(name, module_command(f"experiments.serve_{name}", flags | security), engine_env)
        self._wait_ready()
        prefill, decode = (self._starting[name].ready for name in sites)
        self.lane.set_target(prefill["lane_addresses"][0])
        self.control = stack.enter_context(Relay(prefill["address"], gbps=options.gbps, rtt_ms=options.rtt_ms))
        self.decode_address: str = decode["address"]
        router: dict[str, Any] = {
            "decode": self.decode_address,
            "prefill": self.control.address,
            "policy": "threshold",
            "threshold_tokens": options.threshold_tokens,
            "tokenizer": options.tokenizer,
            "poll_s": _POLL_S,
        }
        command = module_command("experiments.serve_router", router | security)
        self._starting["router"] = processes.launch("router", command, environment(moves_kv=False) | _PATIENCE)
        self._wait_ready()
        self.address: str = self._starting["router"].ready["address"]

    def _wait_ready(self) -> None:
        """Waits for all at once, so that the first to fail is heard although another one is still compiling."""
        deadline = time.monotonic() + READY_S
        while waiting := [p for p in self._starting.values() if not p.answered.wait(0.05)]:
            for process in self._starting.values():
                if process.answered.is_set():
                    process.wait_ready(0.0)
            if time.monotonic() > deadline:
                names = ", ".join(p.name for p in waiting)
                raise LaunchFailed(f"{names} not ready after {READY_S:.0f} s; logs in {self._log_dir}\n{waiting[0].log_tail()}")
        for process in self._starting.values():
            process.wait_ready(0.0)

    def startup(self) -> str:
        """One line on where every process that has been started stands; thread-safe, for a status display."""
        return ", ".join(
            f"{p.name}: {'ready' if p.ready else phase(_tail(p.log_path)) or 'starting'}" for p in list(self._starting.values())
        )

    def decode_status(self) -> generation_pb2.GenerationStatus:
        """The decode server's own account of what it did."""
        with open_channel(self.decode_address, FRONT_CHANNEL_OPTIONS, self._options.security) as channel:
            return generation_pb2_grpc.GenerationStub(channel).Status(common_pb2.StatusRequest(), timeout=_STATUS_S)

    def prefill_status(self) -> prefill_pb2.PrefillStatus:
        """The prefill server's, asked over the WAN."""
        with open_channel(self.control.address, FRONT_CHANNEL_OPTIONS, self._options.security) as channel:
            return prefill_pb2_grpc.PrefillStub(channel).Status(common_pb2.StatusRequest(), timeout=_STATUS_S)


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


class LinkTrace:
    """Samples how many bytes have passed a relay, while the block runs.

    Attributes:
        samples: (monotonic seconds, bytes that have come down since the block was entered).
    """

    def __init__(self, relay: Relay, period_s: float = 0.01):
        self._relay, self._period_s = relay, period_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link trace", daemon=True)
        self._before = relay.passed("down")
        self.samples: list[tuple[float, int]] = []

    @property
    def passed(self) -> int:
        """Bytes by the last sample."""
        return self.samples[-1][1] if self.samples else 0

    def __enter__(self) -> "LinkTrace":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._done.wait(self._period_s):
            self._sample()

    def _sample(self) -> None:
        """Only changes, and the last moment before one: idle seconds are two samples."""
        sample = (time.monotonic(), self._relay.passed("down") - self._before)
        if len(self.samples) > 1 and self.samples[-1][1] == self.samples[-2][1] == sample[1]:
            self.samples[-1] = sample
        else:
            self.samples.append(sample)

"""Starts processes: environment before exec, readiness with a deadline, and an end that no child outlives."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.transfer.channel import MOVER_ENV

READY = "READY "
# Set in a child's environment: its standard input is a pipe that its parent holds open for as long as it lives.
_LIFELINE = "PRFAAS_LIFELINE"
_TAIL_LINES = 20
_ORPHAN_GRACE_S = 10.0
_KILL_S = 10.0
_COPY_S = 2.0
_UNREADY_GRACE_S = 2.0


class LaunchFailed(PrfaasError):
    """A process ended, or said nothing, before it was ready; the message ends with the last lines of its log."""


def environment(
    platform: str | None = None,
    cpu_devices: int | None = None,
    threads: int | None = None,
    compile_cache: str | os.PathLike[str] | None = None,
    moves_kv: bool = True,
) -> dict[str, str]:
    """The environment of a process to come, all that must be set before exec; based on this process's own.

    Args:
        platform: what JAX runs on ("cpu", "cuda", "tpu"); None leaves the choice to JAX.
        cpu_devices: devices that the CPU platform pretends to have.
        threads: threads of BLAS and OpenMP pools.
        compile_cache: folder of compiled programs, shared by processes and runs.
        moves_kv: it receives or sends KV, and wants the allocator and gRPC settings for that.
    """
    for field, value in (("cpu_devices", cpu_devices), ("threads", threads)):
        if value is not None and value < 1:
            raise InvalidInput(field, value, "a positive integer")
    env = dict(os.environ)
    # Output must reach the log when it is written, not when a buffer fills.
    env["PYTHONUNBUFFERED"] = "1"
    if platform is not None:
        env["JAX_PLATFORMS"] = platform
    if cpu_devices is not None:
        env["JAX_NUM_CPU_DEVICES"] = str(cpu_devices)
    if threads is not None:
        env["OMP_NUM_THREADS"] = env["OPENBLAS_NUM_THREADS"] = str(threads)
    if compile_cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = os.fspath(compile_cache)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if moves_kv:
        env |= MOVER_ENV
    return env


def module_command(module: str, flags: Mapping[str, Any]) -> list[str]:
    """`python -m module --flag=value ...` with this interpreter; booleans become --flag or --noflag, None is left out."""
    command = [sys.executable, "-m", module]
    for name, value in flags.items():
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no{name}")
        elif value is not None:
            command.append(f"--{name}={value}")
    return command


@dataclasses.dataclass
class Process:
    """A child in a session of its own. `ready` is what it printed after READY; empty until then."""

    name: str
    log_path: pathlib.Path
    popen: "subprocess.Popen[bytes]"
    ready: dict[str, Any] = dataclasses.field(default_factory=dict)
    answered: threading.Event = dataclasses.field(default_factory=threading.Event)
    copied: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def pid(self) -> int:
        """Process id, and id of the process group."""
        return self.popen.pid

    def wait_ready(self, ready_s: float) -> None:
        """Returns once it is ready; raises LaunchFailed, and ends it, when it ends or is silent for `ready_s` seconds."""
        ending = f"its log {self.log_path} ends with"
        try:
            if not self.answered.wait(ready_s):
                raise LaunchFailed(f"{self.name} was not ready after {ready_s} s; {ending}\n{self.log_tail()}")
            if not self.ready:
                code = self.popen.wait(_KILL_S)
                raise LaunchFailed(f"{self.name} ended with code {code} before it was ready; {ending}\n{self.log_tail()}")
        except BaseException:
            self.stop(_UNREADY_GRACE_S)
            raise

    def signal_group(self, number: int) -> None:
        """Sends a signal to the whole group; nothing happens when it is gone."""
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def stop(self, grace_s: float = 10.0) -> int:
        """SIGTERM, `grace_s` seconds, SIGKILL; returns the exit code. Idempotent."""
        self.signal_group(signal.SIGTERM)
        # A frozen group would not see SIGTERM before it goes on.
        self.signal_group(signal.SIGCONT)
        try:
            return self.popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.signal_group(signal.SIGKILL)
            return self.popen.wait(_KILL_S)
        finally:
            if self.popen.stdin is not None:
                self.popen.stdin.close()

    def log_tail(self) -> str:
        """The last lines of the log; of a process that has ended, with the last one that it printed."""
        if self.popen.poll() is not None:
            self.copied.wait(_COPY_S)  # a grandchild may hold the pipe open
        with open(self.log_path, errors="replace") as file:
            return "".join(collections.deque(file, _TAIL_LINES))


def launch(name: str, command: Sequence[str], log_path: pathlib.Path, env: Mapping[str, str]) -> Process:
    """Starts `command` and returns at once; everything it prints goes to `log_path`.

    The child must call `follow_parent` to end with its parent.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.unlink(missing_ok=True)
    with open(log_path, "ab") as log:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**env, _LIFELINE: "1"},
            start_new_session=True,  # ctrl-C reaches the parent alone, which ends its children in order
        )
    process = Process(name, log_path, popen)
    threading.Thread(target=_pump, args=(process,), name=f"log {name}", daemon=True).start()
    return process


def spawn(name: str, command: Sequence[str], log_path: pathlib.Path, env: Mapping[str, str], ready_s: float = 120.0) -> Process:
    """`launch`, then `Process.wait_ready`."""
    process = launch(name, command, log_path, env)
    process.wait_ready(ready_s)
    return process


def _pump(process: Process) -> None:
    """Copies the child's stdout to its log and looks for the READY line, until the child closes it."""
    assert process.popen.stdout is not None
    with open(process.log_path, "ab") as log, process.popen.stdout as lines:
        for line in lines:
            log.write(line)
            log.flush()
            if line.startswith(READY.encode()) and not process.ready:
                process.ready = json.loads(line[len(READY) :])
                process.answered.set()
    process.copied.set()
    process.answered.set()


class Processes:
    """A set of children that ends, last started first, when the block does: normally, by an error, or by ctrl-C."""

    def __init__(self, log_dir: pathlib.Path, grace_s: float = 10.0):
        self._log_dir, self._grace_s = log_dir, grace_s
        self._running: list[Process] = []

    def launch(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Process:
        """Starts a child without waiting for it; its log is `<log_dir>/<name>.log`."""
        process = launch(name, command, self._log_dir / f"{name}.log", env)
        self._running.append(process)
        return process

    def spawn(self, name: str, command: Sequence[str], env: Mapping[str, str], ready_s: float = 120.0) -> Process:
        """Starts a child and waits until it is ready; raises LaunchFailed."""
        process = self.launch(name, command, env)
        process.wait_ready(ready_s)
        return process

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in reversed(self._running):
            process.signal_group(signal.SIGTERM)
        for process in reversed(self._running):
            process.stop(self._grace_s)


def follow_parent() -> None:
    """In a child started by `spawn`: end, by SIGTERM first, as soon as the parent is gone, however it went. Elsewhere: nothing."""
    if os.environ.pop(_LIFELINE, None) is None:
        return
    threading.Thread(target=_watch_lifeline, name="lifeline", daemon=True).start()


def _watch_lifeline() -> None:
    while os.read(0, 1):
        pass  # nobody writes; the end of file is the message
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(1)

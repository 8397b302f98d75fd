"""What a transfer is measured against: raw sockets and the transfer engines of others, each moving bytes from process to process.

    with RawSockets(nbytes=512 << 20, checksum=False) as raw, Mooncake(nbytes=512 << 20, python=peers) as mooncake:
        for _ in range(9):
            samples["raw"].append(raw.run(512 << 20))
            samples["mooncake"].append(mooncake.run(512 << 20))

A pair is two long-lived processes with warm connections that do one transfer per call, so that transports can take turns. Every
transfer moves other bytes than the one before, and all of them are compared afterwards, outside the measurement. Packages that are
not part of this project may live in an interpreter of their own: `python`, and `env` on top of this process's environment.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.testing.json_child import JsonChild
from prfaas_jax.transfer.endpoint import parse_address

_READY_S = 120.0
# No transfer that is worth waiting for is slower.
_SLOWEST_BYTES_PER_S = 1e6
_LEAST_S = 60.0
_WARM_BYTES = 16 << 20
# Python imports from where it is started: another interpreter finds the mover although nothing is installed in it.
_ROOT = Path(__file__).parents[2]


class Unavailable(PrfaasError):
    """A transport cannot be used here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One transfer.

    Attributes:
        nbytes: how much.
        seconds: on the receiver's clock, from its request until the last byte had come (and its checksum was right).
        sender_cpu_s: core-seconds of the sending process in that time, all threads, user and system.
        receiver_cpu_s: those of the receiving process.
    """

    nbytes: int
    seconds: float
    sender_cpu_s: float
    receiver_cpu_s: float

    @property
    def gb_s(self) -> float:
        """10^9 bytes a second."""
        return self.nbytes / 1e9 / self.seconds

    @property
    def core_s_per_gb(self) -> float:
        """Core-seconds of both processes for 10^9 bytes."""
        return (self.sender_cpu_s + self.receiver_cpu_s) / (self.nbytes / 1e9)


class Pair:
    """A sender and a receiver process; they run while the block is entered, which includes a first transfer that warms them.

    `polls` says that its processes use their cores also when nothing is to be moved. They are frozen between transfers, or those who
    take turns with them would be measured on the cores that they leave.

    Entering raises Unavailable when the transport does not work here, LaunchFailed when a process does not come up. Subclasses say
    which transport.
    """

    polls = False

    def __init__(
        self,
        transport: str,
        nbytes: int,
        address: str = "127.0.0.1:0",
        python: str | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ):
        """Starts nothing yet.

        Args:
            transport: key of `transfer_transports.TRANSPORTS`.
            nbytes: size of the two buffers, and so the largest transfer.
            address: "host:port" that the sender listens on, port 0 for a free one.
            python: interpreter that has what the transport needs; None is this one.
            env: added to the environment of both processes.
            **options: the transport's own.
        """
        if nbytes < 1:
            raise InvalidInput("nbytes", nbytes, "a positive number of bytes")
        parse_address("address", address, allow_zero=True)
        self._transport, self._nbytes, self._run = transport, nbytes, 0
        self._python, self._children = python or sys.executable, list[JsonChild]()
        self._options = {"transport": transport, "nbytes": nbytes, "address": address, "dies_with_parent": self.polls} | options
        self._env = os.environ | dict(env or {})

    def __enter__(self) -> Self:
        try:
            sender = self._start("sender")
            self._start("receiver", control=sender["control"], peer=sender["hello"])
            self.run(min(self._nbytes, _WARM_BYTES))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._children:
            self._children.pop().__exit__(kind, error, trace)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of sender and receiver, while they run."""
        return tuple(child.pid for child in self._children)

    def _start(self, role: str, **more: Any) -> dict[str, Any]:
        options = self._options | {"role": role} | more
        command = [self._python, "-m", "prfaas_jax.testing.transfer_mover", json.dumps(options)]
        child = JsonChild(f"{self._transport} {role}", command, self._env, _READY_S, _ROOT)
        child.__enter__()
        self._children.append(child)
        if reason := child.ready.get("unavailable"):
            raise Unavailable(f"{self._transport}: {reason}")
        return child.ready

    def run(self, nbytes: int) -> Sample:
        """Moves so many bytes and compares them.

        Raises InvalidInput for more than the buffers hold, ChildFailed when the transfer failed, moved other bytes, or took longer
        than a minute and a second for each MB.
        """
        if not 1 <= nbytes <= self._nbytes:
            raise InvalidInput("nbytes", nbytes, f"1 to {self._nbytes}, what the buffers hold")
        for child in self._children if self.polls else ():
            child.thaw()
        try:
            return self._move(nbytes)
        finally:
            for child in self._children if self.polls else ():
                child.freeze()

    def _move(self, nbytes: int) -> Sample:
        sender, receiver = self._children
        deadline_s = _LEAST_S + nbytes / _SLOWEST_BYTES_PER_S
        self._run += 1
        what = {"nbytes": nbytes, "run": self._run}
        before = sender.ask({"do": "prepare"} | what, deadline_s)["cpu_s"]
        moved = receiver.ask({"do": "receive"} | what, deadline_s)
        sender_cpu_s = sender.ask({"do": "cpu"}, deadline_s)["cpu_s"] - before
        receiver.ask({"do": "check"} | what, deadline_s)
        return Sample(nbytes, moved["seconds"], sender_cpu_s, moved["cpu_s"])


class RawSockets(Pair):
    """sendall and recv_into over plain TCP into a preallocated buffer, a MiB at a time."""

    def __init__(
        self,
        nbytes: int,
        checksum: bool = False,
        connections: int = 1,
        via: str | None = None,
        address: str = "127.0.0.1:0",
        python: str | None = None,
    ):
        """Starts nothing yet.

        Args:
            nbytes: size of the two buffers.
            checksum: a CRC-32C for each MiB, computed on both sides.
            connections: connections, each with a thread on both sides and a share of the bytes.
            via: "host:port" that the receiver connects to instead, a relay whose target is `address`.
            address: where the sender listens.
            python: interpreter; None is this one.
        """
        if connections < 1:
            raise InvalidInput("connections", connections, "a positive integer")
        super().__init__("raw", nbytes, address, python, checksum=checksum, connections=connections, via=via)


class JaxTransfer(Pair):
    """`jax.experimental.transfer` on the CPU backend, at its defaults: the receiver pulls one array of bytes."""

    def __init__(self, nbytes: int, address: str = "127.0.0.1:0", python: str | None = None):
        """Starts nothing yet."""
        super().__init__("jax", nbytes, address, python, {"JAX_PLATFORMS": "cpu"})


class Mooncake(Pair):
    """mooncake-transfer-engine, protocol tcp, peer-to-peer handshake, else at its defaults.

    `write`: the sender writes into the receiver's memory, as its users move KV from prefill to decode; else the receiver reads.
    Its usual wheel does not load without a CUDA driver. Where there is none take mooncake-transfer-engine-non-cuda, which still wants
    libibverbs, libmlx5 and libnl (Debian: libibverbs1, ibverbs-providers, libnl-3-200, libnl-route-3-200).
    """

    def __init__(
        self, nbytes: int, write: bool = True, host: str = "127.0.0.1", python: str | None = None, env: Mapping[str, str] | None = None
    ):
        """Starts nothing yet. It chooses its ports itself."""
        super().__init__("mooncake", nbytes, f"{host}:0", python, env, write=write)


class Nixl(Pair):
    """NIXL with its UCX backend, which is told to use TCP where it would take shared memory; else at its defaults.

    `write`: the sender writes into the receiver's memory; else the receiver reads, as its users move KV from prefill to decode.
    """

    polls = True

    def __init__(self, nbytes: int, write: bool = False, python: str | None = None, env: Mapping[str, str] | None = None):
        """Starts nothing yet. It chooses its addresses itself."""
        super().__init__("nixl", nbytes, python=python, env={"UCX_TLS": "tcp"} | dict(env or {}), write=write)

"""One end of a pair that moves bytes: `python -m prfaas_jax.testing.transfer_mover JSON`, told what to do line by line on stdin.

`transfer_baselines` starts both ends and times nothing itself: the receiver's clock runs from its request to the last byte. The two
ends have a connection of their own, on which the receiver introduces itself and asks a sender that acts to do so.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import numpy as np

from prfaas_jax.testing.transfer_transports import PIECE_BYTES, TRANSPORTS, Transport

_DEADLINE_S = 120.0
_PR_SET_PDEATHSIG = 1


class Pattern:
    """Bytes that differ from piece to piece and from run to run, so that none that are missing or stale go unseen."""

    def __init__(self) -> None:
        self._pool = np.random.default_rng(0).integers(0, 256, 2 * PIECE_BYTES, np.uint8)

    def piece(self, index: int, run: int) -> np.ndarray:
        """A MiB."""
        start = (index * 4099 + run * 65_537) % PIECE_BYTES
        return self._pool[start : start + PIECE_BYTES]

    def write(self, buffer: np.ndarray, run: int) -> None:
        """Fills the buffer with the run's."""
        for at in range(0, len(buffer), PIECE_BYTES):
            part = buffer[at : at + PIECE_BYTES]
            part[:] = self.piece(at // PIECE_BYTES, run)[: len(part)]

    def check(self, seen: np.ndarray, nbytes: int, run: int) -> None:
        """Raises ValueError that names the first piece that differs."""
        if seen.shape != (nbytes,):
            raise ValueError(f"{seen.shape} bytes came, {nbytes} were sent")
        for at in range(0, nbytes, PIECE_BYTES):
            part = seen[at : at + PIECE_BYTES]
            if not np.array_equal(part, self.piece(at // PIECE_BYTES, run)[: len(part)]):
                raise ValueError(f"other bytes than were sent in the MiB at {at}")


def say(message: dict[str, Any]) -> None:
    """One line for the parent."""
    print(json.dumps(message), flush=True)


class Receiver:
    """Answers `receive` and `check`."""

    def __init__(self, transport: Transport, hello: dict[str, Any], peer: dict[str, Any], control: str):
        """Connects to the sender: its control address, and as its `hello` says."""
        self._transport, self._pattern = transport, Pattern()
        host, _, port = control.rpartition(":")
        sock = socket.create_connection((host, int(port)), _DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = sock.makefile("rwb")
        self._ask(hello)
        transport.meet(peer)

    def _ask(self, message: dict[str, Any]) -> None:
        self._lines.write(json.dumps(message).encode() + b"\n")
        self._lines.flush()
        if not self._lines.readline():
            raise EOFError("the sender is gone")

    def answer(self, do: str, nbytes: int, run: int) -> dict[str, Any]:
        """Does one of them."""
        if do == "check":
            self._pattern.check(self._transport.received(nbytes), nbytes, run)
            return {"checked": nbytes}
        began, cpu = time.perf_counter(), self._transport.cpu_s()
        self._transport.receive(nbytes, run, lambda: self._ask({"nbytes": nbytes}))
        return {"seconds": time.perf_counter() - began, "cpu_s": self._transport.cpu_s() - cpu}


class Sender:
    """Answers `prepare` and `cpu`, and in a thread of its own what the receiver asks for."""

    def __init__(self, transport: Transport, host: str):
        """Listens for the receiver on `control`."""
        self._transport, self._pattern = transport, Pattern()
        self._listener = socket.create_server((host, 0))
        self.control = "{}:{}".format(*self._listener.getsockname())
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            sock, _ = self._listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with sock, sock.makefile("rwb") as lines:
                self._transport.meet(json.loads(lines.readline()))
                lines.write(b"met\n")
                lines.flush()
                while line := lines.readline():
                    self._transport.send(json.loads(line)["nbytes"])
                    lines.write(b"sent\n")
                    lines.flush()
        except Exception as error:
            # The parent hears it from the receiver, whose line ends here, and reads the reason in this log.
            print(f"sender: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)

    def answer(self, do: str, nbytes: int, run: int) -> dict[str, Any]:
        """Does one of them; the core-seconds that this process has used so far."""
        if do == "prepare":
            self._pattern.write(self._transport.buffer[:nbytes], run)
            self._transport.prepare(nbytes, run)
        return {"cpu_s": self._transport.cpu_s()}


def _kind(name: str) -> type[Transport]:
    if name in ("lanes", "grpc"):
        # Not in every interpreter that this runs in.
        from prfaas_jax.testing.transfer_lanes import GrpcStream, Lanes

        return Lanes if name == "lanes" else GrpcStream
    return TRANSPORTS[name]


def main(options: dict[str, Any]) -> None:
    """Says what the other end must know, or why there can be none, and answers commands until stdin ends."""
    if options["dies_with_parent"]:
        # A process that is frozen does not see its stdin end.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    buffer = np.empty(options["nbytes"], np.uint8)
    buffer.fill(1)  # touched: page faults are not part of a transfer
    try:
        transport = _kind(options["transport"])(options["role"], buffer, options)
        hello = transport.hello()
    except (ImportError, OSError, RuntimeError) as error:
        say({"unavailable": f"{type(error).__name__}: {error}"})
        return
    end: Sender | Receiver
    if options["role"] == "sender":
        end = Sender(transport, options["address"].rpartition(":")[0])
        say({"control": end.control, "hello": hello})
    else:
        end = Receiver(transport, hello, options["peer"], options["control"])
        say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        say(end.answer(command["do"], command.get("nbytes", 0), command.get("run", 0)))
    # Libraries leave threads behind that would not let the interpreter end.
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

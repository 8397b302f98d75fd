"""How bytes get from one process to another: raw sockets, and what others made. Imported by `transfer_mover` alone, in both processes.

Runs in any interpreter that has numpy and the transport's own package, so it imports neither gRPC nor, except where it is the
transport, jax.
"""

import base64
import concurrent.futures
import importlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

Role = Literal["sender", "receiver"]

PIECE_BYTES = 1 << 20
_DEADLINE_S = 120.0
_POLL_S = 0.0002
_REQUEST = struct.Struct("<QQ")
_CRC = struct.Struct("<I")


class Transport:
    """One end. Both have a buffer of the same size; a transfer makes the receiver's first bytes those of the sender's."""

    def __init__(self, role: Role, buffer: np.ndarray, options: dict[str, Any]):
        """Raises ImportError or OSError when this transport cannot work here."""
        self.role, self.buffer, self.options = role, buffer, options

    def hello(self) -> dict[str, Any]:
        """What the other end must know of this one, as JSON."""
        return {}

    def meet(self, peer: dict[str, Any]) -> None:
        """Takes the other end's `hello`; the receiver's connections stand afterwards."""

    def prepare(self, nbytes: int, run: int) -> None:
        """At the sender, before the clock runs: the first bytes of the buffer are to be moved."""

    def receive(self, nbytes: int, run: int, ask: Callable[[], None]) -> None:
        """At the receiver: returns when they are here. `ask` has the sender's `send` called, and returns when that has."""
        ask()

    def send(self, nbytes: int) -> None:
        """At the sender, where it is the one that acts."""
        raise NotImplementedError

    def received(self, nbytes: int) -> np.ndarray:
        """At the receiver: what came."""
        return self.buffer[:nbytes]

    def cpu_s(self) -> float:
        """Core-seconds that this end has used so far, all its threads and processes."""
        return time.process_time()


class RawSockets(Transport):
    """sendall and recv_into, a MiB at a time, over `connections` connections, each with its thread and its share of the bytes."""

    def __init__(self, role: Role, buffer: np.ndarray, options: dict[str, Any]):
        """Options: address, via, connections, checksum."""
        super().__init__(role, buffer, options)
        self._crc = importlib.import_module("google_crc32c").value if options["checksum"] else None
        if role == "sender":
            host, _, port = options["address"].rpartition(":")
            self._listener = socket.create_server((host, int(port)))
            threading.Thread(target=self._accept, daemon=True).start()

    def hello(self) -> dict[str, Any]:
        """Where the sender listens."""
        return {"data": "{}:{}".format(*self._listener.getsockname())} if self.role == "sender" else {}

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(_tuned(sock),), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(None)
            while len(head := sock.recv(_REQUEST.size, socket.MSG_WAITALL)) == _REQUEST.size:
                start, end = _REQUEST.unpack(head)
                sock.settimeout(_DEADLINE_S)
                for at in range(start, end, PIECE_BYTES):
                    piece = self.buffer[at : min(at + PIECE_BYTES, end)]
                    if self._crc:
                        sock.sendall(_CRC.pack(self._crc(piece)))
                    sock.sendall(piece.data)
                # Between transfers it waits for as long as the receiver lives.
                sock.settimeout(None)

    def meet(self, peer: dict[str, Any]) -> None:
        """The receiver connects, to the sender or to what stands in between."""
        if self.role == "sender":
            return
        host, _, port = (self.options["via"] or peer["data"]).rpartition(":")
        self._socks = [_tuned(socket.create_connection((host, int(port)), _DEADLINE_S)) for _ in range(self.options["connections"])]
        self._pool = concurrent.futures.ThreadPoolExecutor(len(self._socks))

    def receive(self, nbytes: int, run: int, ask: Callable[[], None]) -> None:
        """Each connection gets whole pieces, as many as the others or one more."""
        pieces, count = -(-nbytes // PIECE_BYTES), len(self._socks)
        cuts = [min(nbytes, i * pieces // count * PIECE_BYTES) for i in range(count + 1)]
        if count == 1:
            self._fetch(self._socks[0], 0, nbytes)
        else:
            list(self._pool.map(self._fetch, self._socks, cuts[:-1], cuts[1:]))

    def _fetch(self, sock: socket.socket, start: int, end: int) -> None:
        sock.sendall(_REQUEST.pack(start, end))
        head = bytearray(_CRC.size)
        for at in range(start, end, PIECE_BYTES):
            piece = self.buffer[at : min(at + PIECE_BYTES, end)]
            if self._crc:
                _fill(sock, memoryview(head))
            _fill(sock, piece.data)
            # It takes an array over the bytes, but no memoryview.
            if self._crc and self._crc(piece) != _CRC.unpack(head)[0]:
                raise ValueError(f"checksum of the piece at {at}")


def _tuned(sock: socket.socket) -> socket.socket:
    sock.settimeout(_DEADLINE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _fill(sock: socket.socket, view: memoryview) -> None:
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError("the sender is gone")
        view = view[got:]


class JaxTransfer(Transport):
    """`jax.experimental.transfer` between two CPU backends, at its defaults but for addresses: the receiver pulls one array."""

    def __init__(self, role: Role, buffer: np.ndarray, options: dict[str, Any]):
        """Options: address."""
        super().__init__(role, buffer, options)
        self._jax = importlib.import_module("jax")
        start = importlib.import_module("jax.experimental.transfer").start_transfer_server
        self._device = self._jax.local_devices(backend="cpu")[0]
        host = options["address"].rpartition(":")[0]
        # Without an address for the bulk of the bytes it moves them within one process only.
        self._server = start(self._device.client, options["address"], [f"{host}:0"])

    def hello(self) -> dict[str, Any]:
        """Where the sender listens."""
        return {"data": self._server.address()}

    def meet(self, peer: dict[str, Any]) -> None:
        """The receiver connects."""
        if self.role == "receiver":
            self._connection = self._server.connect(peer["data"])

    def prepare(self, nbytes: int, run: int) -> None:
        """Offers an array of the bytes under the number of the run."""
        self._offered = self._jax.device_put(self.buffer[:nbytes], self._device).block_until_ready()
        self._server.await_pull(run, [self._offered])

    def receive(self, nbytes: int, run: int, ask: Callable[[], None]) -> None:
        """Pulls into an array of its own making."""
        sharding = self._jax.sharding.SingleDeviceSharding(self._device)
        wanted = self._jax.ShapeDtypeStruct((nbytes,), np.uint8, sharding=sharding)
        (self._pulled,) = self._connection.pull(run, [wanted])
        self._pulled.block_until_ready()

    def received(self, nbytes: int) -> np.ndarray:
        """The array, without a copy."""
        return np.asarray(self._pulled)


class Mooncake(Transport):
    """mooncake-transfer-engine over TCP at its defaults, peer to peer. `write`: the sender writes, else the receiver reads."""

    def __init__(self, role: Role, buffer: np.ndarray, options: dict[str, Any]):
        """Options: address, write."""
        super().__init__(role, buffer, options)
        self._engine = importlib.import_module("mooncake.engine").TransferEngine()
        host = options["address"].rpartition(":")[0]
        if code := self._engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
            raise OSError(f"initialize returned {code}")
        if code := self._engine.register_memory(buffer.ctypes.data, buffer.nbytes):
            raise OSError(f"register_memory returned {code}")
        self._name = f"{host}:{self._engine.get_rpc_port()}"

    def hello(self) -> dict[str, Any]:
        """Name of the segment, and where the buffer lies in it."""
        return {"name": self._name, "at": self.buffer.ctypes.data}

    def meet(self, peer: dict[str, Any]) -> None:
        """Keeps what it needs to name the other end's buffer."""
        self._peer = peer

    def receive(self, nbytes: int, run: int, ask: Callable[[], None]) -> None:
        """Reads, or has the sender write."""
        if self.options["write"]:
            ask()
        else:
            self._move(self._engine.transfer_sync_read, nbytes)

    def send(self, nbytes: int) -> None:
        """Writes."""
        self._move(self._engine.transfer_sync_write, nbytes)

    def _move(self, call: Callable[[str, int, int, int], int], nbytes: int) -> None:
        if code := call(self._peer["name"], self.buffer.ctypes.data, self._peer["at"], nbytes):
            raise OSError(f"the transfer returned {code}")


class Nixl(Transport):
    """NIXL over UCX, between buffers in host memory, one descriptor each. `write`: the sender writes, else the receiver reads."""

    def __init__(self, role: Role, buffer: np.ndarray, options: dict[str, Any]):
        """Options: write. Which UCX transport is for the environment to say (UCX_TLS)."""
        super().__init__(role, buffer, options)
        api = importlib.import_module("nixl._api")
        self._agent = api.nixl_agent(f"{role}", api.nixl_agent_config(backends=["UCX"]))
        self._agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")
        self._handles: dict[int, Any] = {}

    def hello(self) -> dict[str, Any]:
        """Its metadata, and where the buffer lies."""
        return {"metadata": base64.b64encode(self._agent.get_agent_metadata()).decode(), "at": self.buffer.ctypes.data}

    def meet(self, peer: dict[str, Any]) -> None:
        """Loads the other end's metadata; who will act connects."""
        name = self._agent.add_remote_agent(base64.b64decode(peer["metadata"]))
        self._peer = name.decode() if isinstance(name, bytes) else name
        self._peer_at = peer["at"]
        if (self.role == "sender") == self.options["write"]:
            self._agent.make_connection(self._peer)

    def receive(self, nbytes: int, run: int, ask: Callable[[], None]) -> None:
        """Reads, or has the sender write."""
        if self.options["write"]:
            ask()
        else:
            self._move("READ", nbytes)

    def send(self, nbytes: int) -> None:
        """Writes."""
        self._move("WRITE", nbytes)

    def _move(self, kind: str, nbytes: int) -> None:
        if nbytes not in self._handles:
            mine = self._agent.get_xfer_descs([(self.buffer.ctypes.data, nbytes, 0)], "DRAM")
            theirs = self._agent.get_xfer_descs([(self._peer_at, nbytes, 0)], "DRAM")
            self._handles[nbytes] = self._agent.initialize_xfer(kind, mine, theirs, self._peer)
        handle, deadline = self._handles[nbytes], time.monotonic() + _DEADLINE_S
        state = self._agent.transfer(handle)
        while state == "PROC":
            if time.monotonic() > deadline:
                raise TimeoutError(f"no transfer in {_DEADLINE_S} s")
            time.sleep(_POLL_S)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise OSError(f"the transfer ended as {state}")


TRANSPORTS: dict[str, type[Transport]] = {"raw": RawSockets, "jax": JaxTransfer, "mooncake": Mooncake, "nixl": Nixl}

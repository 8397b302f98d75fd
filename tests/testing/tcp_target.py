"""A TCP server to put a relay in front of, and what its clients do."""

import contextlib
import socket
import threading
import time


class Target:
    """A TCP server: echoes when `echo`, else sends `nbytes` of a pattern to whoever connects and keeps what it is sent."""

    def __init__(self, nbytes: int = 0, echo: bool = False):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.data, self.echo = pattern(nbytes), echo
        self.received = bytearray()
        self.ended = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which close does not
        self.listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), sock:
            if self.data:
                sock.sendall(self.data)
                sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(1 << 16):
                if self.echo:
                    sock.sendall(data)
                else:
                    self.received += data
        self.ended.set()


def pattern(nbytes: int) -> bytes:
    return (bytes(range(251)) * (nbytes // 251 + 1))[:nbytes]


def connect(relay) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", relay.port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 18):
        parts.append(data)
    return b"".join(parts)


def ping(sock: socket.socket) -> float:
    started = time.perf_counter()
    sock.sendall(b"p")
    assert sock.recv(1) == b"p"
    return time.perf_counter() - started


def wait_until(true, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)

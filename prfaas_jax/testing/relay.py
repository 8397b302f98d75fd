"""A userspace TCP relay that behaves like a WAN link and breaks like one: rate, delay, jitter, stalls, resets, flipped bytes.

    python -m prfaas_jax.testing.relay --listen=127.0.0.1:0 --target=127.0.0.1:7001 --gbps=1 --rtt_ms=20

prints {"address": "127.0.0.1:PORT", "port": PORT} and relays until SIGTERM or SIGINT. One thread, one event loop, big reads.
"""

import dataclasses
import json
import random
import selectors
import signal
import socket
import struct
import threading
import time
from collections import deque
from types import TracebackType
from typing import Literal

from absl import app, flags

from prfaas_jax.errors import InvalidInput

# "up" flows from the client to the target, "down" from the target to the client.
Direction = Literal["up", "down"]

_READ_BYTES = 256 << 10
# How far ahead of the link a read may run: the event loop's clock ticks in milliseconds.
_AHEAD_S = 0.004
# Depth of the token bucket: what a late wake-up of the loop may catch up on.
_BURST_S = 0.01
# Bounds what the kernel queues in front of the link; a real bottleneck does not buffer megabytes.
_SOCKET_BUFFER = 512 << 10
_FOREVER = float("inf")


@dataclasses.dataclass
class _Link:
    """One direction of the shared link: a serial line of `bytes_per_s`, then a delay."""

    bytes_per_s: float = _FOREVER
    delay_s: float = 0.0
    jitter_s: float = 0.0
    free_at: float = 0.0  # when the line has sent all it was given
    last_arrival: float = 0.0
    passed: int = 0  # bytes read so far
    flip_at: int | None = None  # absolute offsets in the count of `passed`
    reset_at: int | None = None

    def read_size(self) -> int:
        """Bytes per read: at most about two milliseconds of the line, so that slow links are smooth."""
        return int(min(_READ_BYTES, max(1024, self.bytes_per_s * 0.002)))

    def send(self, now: float, nbytes: int, rng: random.Random) -> float:
        """Puts bytes on the line; when their last one arrives."""
        self.free_at = max(now - _BURST_S, self.free_at) + nbytes / self.bytes_per_s
        # TCP keeps order, so jitter can only hold back what follows.
        self.last_arrival = max(self.last_arrival, max(now, self.free_at) + self.delay_s + rng.uniform(0, self.jitter_s))
        return self.last_arrival


@dataclasses.dataclass(eq=False)
class _Pipe:
    """One direction of one connection; `queue` holds (arrival time, bytes)."""

    source: socket.socket
    sink: socket.socket
    link: _Link
    queue: deque[tuple[float, memoryview]] = dataclasses.field(default_factory=deque)
    ended: bool = False  # the source has no more
    shut: bool = False  # the sink was told so
    blocked: bool = False  # the sink's buffer is full
    reset_after_queue: bool = False


class Relay:
    """Relays connections on `address` to `target` over one emulated link. Use as a context manager; every control is thread safe.

    The rate holds per direction and is shared by all connections. Offsets count the bytes of one direction, over all connections,
    from the call on.
    """

    def __init__(
        self,
        target: str,
        listen: str = "127.0.0.1:0",
        gbps: float | None = None,
        rtt_ms: float = 0.0,
        jitter_ms: float = 0.0,
        seed: int = 0,
    ):
        """Binds at once; raises InvalidInput for a malformed or busy address or a negative figure. See `set_link` for the units."""
        _check_link(gbps, rtt_ms, jitter_ms)
        self._target = _host_port("target", target)
        self._links: dict[Direction, _Link] = {"up": _Link(), "down": _Link()}
        self._rng = random.Random(seed)
        self._lock = threading.RLock()
        self._stalled_until = 0.0
        self._stop = False
        self._pipes: list[_Pipe] = []
        self._selector = selectors.DefaultSelector()
        self._interest: dict[socket.socket, int] = {}
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        try:
            self._listener.bind(_host_port("listen", listen))
        except OSError as error:
            self._listener.close()
            raise InvalidInput("listen", listen, f"an address that can be bound ({error})") from error
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.address = f"{listen.rpartition(':')[0]}:{self.port}"
        self.set_link(gbps, rtt_ms, jitter_ms)
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Resets every connection and ends the thread."""
        with self._lock:
            self._stop = True
            self._wake()
        self._thread.join(5.0)

    # --- controls

    def set_link(self, gbps: float | None = None, rtt_ms: float = 0.0, jitter_ms: float = 0.0) -> None:
        """Changes the link from now on.

        Args:
            gbps: Gbit/s per direction; None is unlimited.
            rtt_ms: round trip added, half of it in each direction.
            jitter_ms: up to this much more per direction, uniform.
        """
        _check_link(gbps, rtt_ms, jitter_ms)
        with self._lock:
            for link in self._links.values():
                link.bytes_per_s = _FOREVER if gbps is None else gbps * 1e9 / 8
                link.delay_s, link.jitter_s = rtt_ms / 2e3, jitter_ms / 1e3
            self._wake()

    def set_target(self, target: str) -> None:
        """Where connections go that are accepted from now on; a relay can so be known before the server behind it has a port."""
        with self._lock:
            self._target = _host_port("target", target)

    def black_hole(self, seconds: float = _FOREVER) -> None:
        """Nothing passes for `seconds`; connections stay open, and what was sent arrives afterwards."""
        with self._lock:
            self._stalled_until = time.monotonic() + seconds
            self._wake()

    def pause(self) -> None:
        """Nothing passes until `resume`."""
        self.black_hole()

    def resume(self) -> None:
        """Ends a pause or black hole."""
        self.black_hole(0.0)

    def flip_byte_after(self, nbytes: int, direction: Direction = "down") -> None:
        """Inverts one bit of the byte that follows the next `nbytes`."""
        with self._lock:
            self._links[direction].flip_at = self._links[direction].passed + nbytes

    def reset_after(self, nbytes: int, direction: Direction = "down") -> None:
        """Lets exactly `nbytes` more through, then resets the connection that would have carried the next one."""
        with self._lock:
            self._links[direction].reset_at = self._links[direction].passed + nbytes
            self._wake()

    def reset(self) -> None:
        """Resets every connection now."""
        with self._lock:
            while self._pipes:
                self._close(self._pipes[0])
            self._wake()

    def half_close(self, direction: Direction = "down") -> None:
        """Ends one direction of every connection with a FIN; the other goes on."""
        with self._lock:
            for pipe in self._pipes:
                if pipe.link is self._links[direction]:
                    pipe.ended = True
                    pipe.queue.clear()
            self._wake()

    def passed(self, direction: Direction = "down") -> int:
        """Bytes taken from senders so far."""
        with self._lock:
            return self._links[direction].passed

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        with self._lock:
            return len(self._pipes) // 2

    # --- event loop

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"x")
        except OSError:  # full: a wake-up is pending; closed: there is no loop to wake
            return

    def _run(self) -> None:
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        timeout: float | None = 0.0
        while True:
            ready = {key.fd: mask for key, mask in self._selector.select(timeout)}
            with self._lock:
                if self._stop:
                    break
                if self._wake_in.fileno() in ready:
                    self._wake_in.recv(4096)
                now = time.monotonic()
                if self._listener.fileno() in ready:
                    self._accept()
                for pipe in list(self._pipes):
                    if pipe in self._pipes:  # its twin may have closed both
                        self._serve(pipe, ready, now)
                timeout = self._arm(time.monotonic())
        with self._lock:
            while self._pipes:
                self._close(self._pipes[0])
        self._selector.close()
        for sock in (self._listener, self._wake_in, self._wake_out):
            sock.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        target = socket.socket()
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        for sock in (client, target):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Failure to connect shows as an error of the first recv, which resets the client.
        target.connect_ex(self._target)
        self._pipes += [_Pipe(client, target, self._links["up"]), _Pipe(target, client, self._links["down"])]

    def _serve(self, pipe: _Pipe, ready: dict[int, int], now: float) -> None:
        try:
            if ready.get(pipe.source.fileno(), 0) & selectors.EVENT_READ and self._may_read(pipe, now):
                self._read(pipe, now)
            if ready.get(pipe.sink.fileno(), 0) & selectors.EVENT_WRITE:
                pipe.blocked = False
            if now >= self._stalled_until:
                self._deliver(pipe, now)
        except OSError:
            self._close(pipe)

    def _may_read(self, pipe: _Pipe, now: float) -> bool:
        if pipe.ended or pipe.reset_after_queue or now < self._stalled_until or pipe.link.free_at - now > _AHEAD_S:
            return False
        # A sink that does not take what has arrived holds back its source.
        return not (pipe.blocked and sum(len(data) for arrival, data in pipe.queue if arrival <= now) > 4 * _READ_BYTES)

    def _read(self, pipe: _Pipe, now: float) -> None:
        link = pipe.link
        size = link.read_size()
        if link.reset_at is not None:
            size = min(size, link.reset_at - link.passed)
            if size <= 0:
                link.reset_at = None
                pipe.reset_after_queue = True
                return
        try:
            data = pipe.source.recv(size)
        except BlockingIOError:
            return
        if not data:
            pipe.ended = True
            return
        if link.flip_at is not None and link.passed <= link.flip_at < link.passed + len(data):
            flipped = bytearray(data)
            flipped[link.flip_at - link.passed] ^= 0x10
            data, link.flip_at = bytes(flipped), None
        link.passed += len(data)
        pipe.queue.append((link.send(now, len(data), self._rng), memoryview(data)))

    def _deliver(self, pipe: _Pipe, now: float) -> None:
        while pipe.queue and pipe.queue[0][0] <= now and not pipe.blocked:
            arrival, data = pipe.queue.popleft()
            try:
                sent = pipe.sink.send(data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                pipe.queue.appendleft((arrival, data[sent:]))
                pipe.blocked = True
        if pipe.queue:
            return
        if pipe.reset_after_queue:
            self._close(pipe)
        elif pipe.ended and not pipe.shut:
            pipe.shut = True
            pipe.sink.shutdown(socket.SHUT_WR)
            if self._twin(pipe).shut:
                self._close(pipe)

    def _arm(self, now: float) -> float | None:
        """Sets what the selector waits for and returns how long it may: None until something happens."""
        interest = {sock: 0 for pipe in self._pipes for sock in (pipe.source, pipe.sink)}
        wake_at = self._stalled_until if now < self._stalled_until < _FOREVER else _FOREVER
        for pipe in self._pipes:
            if self._may_read(pipe, now):
                interest[pipe.source] |= selectors.EVENT_READ
            elif pipe.link.free_at - now > _AHEAD_S:
                wake_at = min(wake_at, pipe.link.free_at - _AHEAD_S)
            if pipe.blocked:
                interest[pipe.sink] |= selectors.EVENT_WRITE
            elif now >= self._stalled_until:
                if pipe.queue:
                    wake_at = min(wake_at, pipe.queue[0][0])
                elif pipe.reset_after_queue or (pipe.ended and not pipe.shut):
                    wake_at = now
        for sock, events in interest.items():
            before = self._interest.get(sock, 0)
            if events and before:
                if events != before:
                    self._selector.modify(sock, events)
            elif events:
                self._selector.register(sock, events)
            elif before:
                self._selector.unregister(sock)
            self._interest[sock] = events
        return None if wake_at == _FOREVER else max(0.0, wake_at - now)

    def _twin(self, pipe: _Pipe) -> _Pipe:
        return next(other for other in self._pipes if other.source is pipe.sink)

    def _close(self, pipe: _Pipe) -> None:
        """Resets both sockets of the pipe's connection."""
        twin = self._twin(pipe)
        both_shut = pipe.shut and twin.shut
        self._pipes = [other for other in self._pipes if other is not pipe and other is not twin]
        for sock in (pipe.source, pipe.sink):
            if self._interest.pop(sock, 0):
                self._selector.unregister(sock)
            if not both_shut:
                # Linger of zero turns close into a reset.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


def _check_link(gbps: float | None, rtt_ms: float, jitter_ms: float) -> None:
    if gbps is not None and not gbps > 0:
        raise InvalidInput("gbps", gbps, "a positive number, or None for an unlimited link")
    for field, value in (("rtt_ms", rtt_ms), ("jitter_ms", jitter_ms)):
        if not 0 <= value < 60_000:
            raise InvalidInput(field, value, "milliseconds in [0, 60000)")


def _host_port(field: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidInput(field, address, "host:port")
    return host, int(port)


def main(argv: list[str]) -> None:
    """Relays until told to stop."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    flag = flags.FLAGS
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Relay(flag.target, flag.listen, flag.gbps, flag.rtt_ms, flag.jitter_ms, flag.seed) as relay:
        if flag.flip_byte_after is not None:
            relay.flip_byte_after(flag.flip_byte_after)
        if flag.reset_after is not None:
            relay.reset_after(flag.reset_after)
        print(json.dumps({"address": relay.address, "port": relay.port}), flush=True)
        stop.wait()


def _define_flags() -> None:
    flags.DEFINE_string("listen", "127.0.0.1:0", "host:port to listen on; port 0 takes a free one.")
    flags.DEFINE_string("target", None, "host:port to relay to.", required=True)
    flags.DEFINE_float("gbps", None, "Gbit/s per direction, shared by all connections; unlimited when not given.")
    flags.DEFINE_float("rtt_ms", 0.0, "Round trip added, in milliseconds.")
    flags.DEFINE_float("jitter_ms", 0.0, "Up to this much more delay per direction, in milliseconds.")
    flags.DEFINE_integer("seed", 0, "Seed of the jitter.")
    flags.DEFINE_integer("flip_byte_after", None, "Flip a bit of the byte after this many bytes to the client.")
    flags.DEFINE_integer("reset_after", None, "Reset after this many bytes to the client.")


if __name__ == "__main__":
    _define_flags()
    app.run(main)

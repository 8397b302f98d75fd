"""The event loop of a relay: accepts, connects, serves every pipe when the selector or the clock says so. One thread."""

import heapq
import itertools
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable

from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing.relay_link import FOREVER, Link
from prfaas_jax.testing.relay_pipe import Buffers, Pipe

# Reads and sends of every pipe between two looks at the selector and at the lock.
_ROUNDS = 8

Pair = tuple[Pipe, Pipe]


class Loop:
    """Relays connections to `target`, what clients send over `up` and what they get over `down`, from `start` to `close`.

    Attributes:
        lock: whoever reads or changes a link, a pipe or `target` holds it.
        pairs: the two pipes of each open connection.
        port: where it listens.
    """

    def __init__(self, target: tuple[str, int], listen: tuple[str, int], up: Link, down: Link, seed: int):
        """Binds at once; raises InvalidInput for an address that cannot be bound."""
        self.target, self._up, self._down = target, up, down
        self.lock = threading.RLock()
        self.pairs: list[Pair] = []
        self._rng = random.Random(seed)
        self._buffers = Buffers()
        self._plan: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._stop = False
        self._interest: dict[socket.socket, int] = {}
        self._listener = _listener(listen)
        self.port: int = self._listener.getsockname()[1]
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        """Begins to accept."""
        self._thread.start()

    def close(self) -> None:
        """Resets every connection and ends the thread."""
        with self.lock:
            self._stop = True
            self._wake()
        if self._thread.ident is None:
            self._end()
        else:
            self._thread.join(5.0)

    def do(self, after_s: float, act: Callable[[], None]) -> None:
        """Calls `act` with the lock held: now, or `after_s` seconds later in the loop's thread."""
        if not 0 <= after_s < FOREVER:
            raise InvalidInput("after_s", after_s, "seconds from now, not negative")
        with self.lock:
            if after_s:
                heapq.heappush(self._plan, (time.monotonic() + after_s, next(self._order), act))
            else:
                act()
            self._wake()

    def pipes(self) -> Iterable[Pipe]:
        """Both of every connection."""
        return itertools.chain.from_iterable(self.pairs)

    def reset(self) -> None:
        """Resets every connection."""
        for pair in list(self.pairs):
            self._close(pair, reset=True)

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
            ready = self._selector.select(timeout)
            with self.lock:
                if self._stop:
                    break
                for key, mask in ready:
                    self._note(key, mask)
                timeout = self._turn()
        self._end()

    def _end(self) -> None:
        with self.lock:
            self.reset()
        self._selector.close()
        for sock in (self._listener, self._wake_in, self._wake_out):
            sock.close()

    def _note(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.fileobj is self._wake_in:
            self._wake_in.recv(4096)
        elif key.fileobj is self._listener:
            self._accept()
        else:
            takes, gives = key.data
            takes.readable = takes.readable or bool(mask & selectors.EVENT_READ)
            gives.writable = gives.writable or bool(mask & selectors.EVENT_WRITE)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        target = socket.socket()
        for sock, link in ((client, self._up), (target, self._down)):
            sock.setblocking(False)
            # By itself the kernel would queue many megabytes. It queues twice what it is asked to.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, link.queue_size() // 2)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Failure to connect shows as an error of the first read, which resets the client.
        target.connect_ex(self.target)
        up = Pipe(client, target, self._up, self._rng, self._buffers)
        self.pairs.append((up, Pipe(target, client, self._down, self._rng, self._buffers)))

    def _turn(self) -> float | None:
        """Does what is due; how long the selector may wait then, None until something happens."""
        while self._plan and self._plan[0][0] <= time.monotonic():
            heapq.heappop(self._plan)[2]()
        for _ in range(_ROUNDS):
            if not sum(self._serve(pair) for pair in list(self.pairs)):
                break
        for link in (self._up, self._down):
            if not any(pipe.readable for pipe in self.pipes() if pipe.link is link):
                link.starve()
        wake_at = min((pipe.acts_at() for pipe in self.pipes()), default=FOREVER)
        if self._plan:
            wake_at = min(wake_at, self._plan[0][0])
        for pair in self.pairs:
            self._watch(pair)
        return None if wake_at == FOREVER else max(0.0, wake_at - time.monotonic())

    def _serve(self, pair: Pair) -> bool:
        """One read and all that has arrived, in both directions; whether anything moved."""
        now, did = time.monotonic(), False
        try:
            for pipe in pair:
                did = pipe.read(now) or did
                did = pipe.deliver(now) or did
        except OSError:
            self._close(pair, reset=True)
            return True
        if any(pipe.spent and now >= pipe.link.stalled_until for pipe in pair):
            self._close(pair, reset=True)
        elif all(pipe.shut for pipe in pair):
            self._close(pair, reset=False)
        return did

    def _watch(self, pair: Pair) -> None:
        """Has the selector report on a socket only what is not known yet."""
        for pipe, twin in (pair, pair[::-1]):
            sock = pipe.source
            events = 0 if pipe.readable or pipe.ended or pipe.resets else selectors.EVENT_READ
            events |= 0 if twin.writable else selectors.EVENT_WRITE
            before = self._interest.get(sock, 0)
            if events and before:
                if events != before:
                    self._selector.modify(sock, events, (pipe, twin))
            elif events:
                self._selector.register(sock, events, (pipe, twin))
            elif before:
                self._selector.unregister(sock)
            self._interest[sock] = events

    def _close(self, pair: Pair, reset: bool) -> None:
        self.pairs.remove(pair)
        for pipe in pair:
            pipe.drop()
            sock = pipe.source
            if self._interest.pop(sock, 0):
                self._selector.unregister(sock)
            if reset:
                # Linger of zero turns close into a reset.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


def _listener(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise InvalidInput("listen", "{}:{}".format(*address), f"an address that can be bound ({error})") from error
    sock.listen(128)
    sock.setblocking(False)
    return sock

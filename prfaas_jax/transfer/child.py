"""A process of a server's own that moves bytes for it: how it is started, how the two talk, and how each sees the other's end.

They share memory (`shared_memory.py`) and a socket pair that carries JSON messages; there is no pickle. Spawned, never forked: neither
JAX nor gRPC survives a fork. A child ignores the signals that end a server, which still needs it to drain, and ends with the socket.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

from absl import logging

from prfaas_jax.errors import InvalidInput, PrfaasError, TransferError
from prfaas_jax.transfer.channel import MOVER_ENV
from prfaas_jax.transfer.security import Security
from prfaas_jax.transfer.shared_memory import SharedMemory

Message = dict[str, Any]

MAX_PROCESSES = 64
_READY_S = 60.0
_KILL_S = 5.0
# Between attempts to start a process again.
_RESTART_S = 0.5
# A child that is silent for so long is frozen.
_SILENT_S = 5.0
_WATCH_S = 0.5


class Pipe:
    """One end of the socket pair. Any thread may `say`; one reads."""

    def __init__(self, fd: int):
        self._connection = Connection(fd)
        self._lock = threading.Lock()

    def say(self, message: Message) -> None:
        """Raises OSError once the other end is gone."""
        text = json.dumps(message).encode()
        with self._lock:
            self._connection.send_bytes(text)

    def heard(self) -> Iterator[Message]:
        """What the other end says, until it is gone."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                yield json.loads(self._connection.recv_bytes())

    def close(self) -> None:
        """Ends the conversation; idempotent."""
        if not self._connection.closed:
            self._connection.close()


class Child:
    """The server's end. What it says is queued and said by a thread of its own: a child that is frozen holds up nobody."""

    def __init__(
        self,
        kind: str,
        index: int,
        module: str,
        memory: SharedMemory,
        first: Message,
        on_message: "Callable[[Child, Message], None]",
        on_end: "Callable[[Child], None]",
    ):
        """Starts `python -m module`, which is told `first`; its own first message is `ready`, `on_message` hears all others.

        Both callbacks are called from one thread, `on_end` last and once, also after `stop`.
        Raises TransferError, after it has ended the child, unless its first message comes in time and has no "error".
        """
        self.name, self.index = (name := f"{kind} process {index}"), index
        self._on_message, self._on_end = on_message, on_end
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(memory.fd), str(memory.nbytes)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | MOVER_ENV,
                pass_fds=(theirs.fileno(), memory.fd),
            )
        self._pipe = Pipe(ours.detach())
        self._answer: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.ended = threading.Event()
        self._stopping = threading.Lock()
        self._heard = False
        self._reader = threading.Thread(target=self._listen, name=f"{name} listener", daemon=True)
        self._writer = threading.Thread(target=self._speak, name=f"{name} speaker", daemon=True)
        self._reader.start()
        self._writer.start()
        self.say(first)
        try:
            self.ready = self._answer.get(timeout=_READY_S) or {"error": "it ended"}
        except queue.Empty:
            self.ready = {"error": f"it said nothing for {_READY_S} s"}
        if error := self.ready.get("error"):
            self._popen.kill()
            self.stop(0.0)
            raise TransferError(f"{name} did not start: {error}")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    def say(self, message: Message) -> None:
        """Tells it something; nothing happens when it is gone."""
        self._outgoing.put(message)

    def silent(self) -> bool:
        """Whether it has said nothing since the last such question."""
        heard, self._heard = self._heard, False
        return not heard

    def kill(self) -> None:
        """Ends it at once; what follows follows from that."""
        self._popen.kill()

    def stop(self, grace_s: float) -> None:
        """Tells it to end, and kills it when it has not `grace_s` and a few seconds later; idempotent."""
        self._outgoing.put(None)
        with self._stopping:  # its end, too, has somebody stop it
            try:
                self._popen.wait(grace_s + _KILL_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait(_KILL_S)
            for thread in (self._reader, self._writer):
                thread.join(_KILL_S)
            self._pipe.close()

    def _listen(self) -> None:
        first = True
        for message in self._pipe.heard():
            self._heard = True
            if first:
                self._answer.put(message)
                first = False
                continue
            try:
                self._on_message(self, message)
            except Exception:
                # Ours to mend: the child goes on, and what it has said is lost to one transfer, whose idle timer ends it.
                logging.exception("%s said what could not be followed", self.name)
        self._answer.put(None)
        self._outgoing.put(None)
        self.ended.set()
        self._on_end(self)

    def _speak(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._outgoing.get()) is not None:
                self._pipe.say(message)
            self._pipe.say({"do": "end"})


class Worker(Protocol):
    """What a crew is made of: a child, or what keeps one."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def ended(self) -> threading.Event:
        """Set when its process is gone."""
        ...

    def silent(self) -> bool:
        """See Child.silent."""
        ...

    def kill(self) -> None:
        """See Child.kill."""
        ...

    def stop(self, grace_s: float) -> None:
        """See Child.stop; it may come a second time."""
        ...


_W = TypeVar("_W", bound=Worker)


class Crew(Generic[_W]):
    """So many workers; in place of one that ends another is started.

    They say something several times a second: one that does not is frozen, and is ended.
    """

    def __init__(self, count: int, make: Callable[[int, Callable[[], None]], _W]):
        """`make(index, on_end)` starts a worker that calls `on_end` once its process is gone. Raises InvalidInput for no such number."""
        if not 1 <= count <= MAX_PROCESSES:
            raise InvalidInput("processes", count, f"1..{MAX_PROCESSES}")
        self._make = make
        self._lock = threading.Lock()
        self._workers: list[_W | None] = [None] * count
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    def start(self) -> None:
        """Starts all of them; what one raises is raised after those that are up have been stopped."""
        try:
            for index in range(len(self._workers)):
                self._spawn(index)
            self._thread(self._watch)
        except BaseException:
            self.stop(0.0)
            raise

    @property
    def up(self) -> tuple[_W, ...]:
        """Workers whose process is there."""
        with self._lock:
            return tuple(worker for worker in self._workers if worker is not None and not worker.ended.is_set())

    def stop(self, grace_s: float) -> None:
        """Stops all of them, side by side, and waits for those that were being started."""
        self._stopping.set()
        with self._lock:
            workers = [worker for worker in self._workers if worker is not None]
        stops = [threading.Thread(target=worker.stop, args=(grace_s,), daemon=True) for worker in workers]
        for thread in stops:
            thread.start()
        for thread in stops:
            thread.join(grace_s + _READY_S)
        deadline = time.monotonic() + _READY_S  # what is being started must come up before it can be stopped
        while (alive := [t for t in self._threads if t.is_alive()]) and time.monotonic() < deadline:
            alive[0].join(deadline - time.monotonic())

    def _thread(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name="crew", daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _watch(self) -> None:
        """By what was heard between its own turns: where everything stood still, nobody was silent."""
        silent: dict[_W, int] = {}
        while not self._stopping.wait(_WATCH_S):
            silent = {worker: silent.get(worker, 0) + 1 if worker.silent() else 0 for worker in self.up}
            for worker, turns in silent.items():
                if turns * _WATCH_S >= _SILENT_S:
                    logging.error("%s has said nothing for %.0f s and is ended", worker.name, _SILENT_S)
                    worker.kill()

    def _spawn(self, index: int) -> None:
        worker = self._make(index, lambda: self._ended(index))
        with self._lock:
            self._workers[index] = worker
        if worker.ended.is_set():
            self._ended(index)
        if self._stopping.is_set():
            worker.stop(0.0)

    def _ended(self, index: int) -> None:
        with self._lock:
            worker, self._workers[index] = self._workers[index], None
        if worker is None:
            return
        if not self._stopping.is_set():
            logging.error("%s ended, and its transfers with it; another one is started", worker.name)
        self._thread(self._restart, index, worker)

    def _restart(self, index: int, worker: _W) -> None:
        worker.stop(0.0)
        while not self._stopping.is_set():
            try:
                self._spawn(index)
                return
            except (PrfaasError, OSError) as error:
                logging.error("%s", error)
            self._stopping.wait(_RESTART_S)


@dataclasses.dataclass(frozen=True)
class Parent:
    """The child's end: what it was started with, and `first`, what it was told first."""

    pipe: Pipe
    memory: SharedMemory
    first: Message

    @property
    def security(self) -> Security:
        """As the server's, read from the same files."""
        return Security(**self.first["security"])

    def told(self) -> Iterator[Message]:
        """What the server says, until it wants no more or is gone."""
        for message in self.pipe.heard():
            if message["do"] == "end":
                return
            yield message


def security_fields(security: Security) -> Message:
    """What `Parent.security` needs: names of files, never what is in them."""
    return {field.name: getattr(security, field.name) for field in dataclasses.fields(Security)}


class Follower(Protocol):
    """What a child does."""

    @property
    def ready(self) -> Message:
        """What the server is told first."""
        ...

    def report(self) -> None:
        """Begins to tell it more, in threads of its own."""
        ...

    def follow(self, message: Message) -> None:
        """Does what the server says."""
        ...

    def stop(self) -> None:
        """Ends the work."""
        ...


def run_child(make: Callable[[Parent], Follower]) -> None:
    """The main of a child's module; the server hears it when `make` raises one of the package's own errors."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe_fd, memory_fd, nbytes = (int(text) for text in sys.argv[1:])
    pipe = Pipe(pipe_fd)
    code = 1
    try:
        if (first := next(pipe.heard(), None)) is not None:
            _serve(Parent(pipe, SharedMemory(memory_fd, nbytes), first), make)
        code = 0
    except BaseException:
        logging.exception("a process that moves KV has failed")
    logging.flush()
    os._exit(code)  # whatever thread of gRPC may still hang is not worth waiting for


def _serve(parent: Parent, make: Callable[[Parent], Follower]) -> None:
    try:
        follower = make(parent)
    except PrfaasError as error:
        parent.pipe.say({"error": str(error)})
        return
    parent.pipe.say(follower.ready)
    follower.report()
    for message in parent.told():
        follower.follow(message)
    follower.stop()

"""The receiving end of lanes: a few warm connections to one sender, shared by every transfer from it.

All lanes of a group are one session there (`transfer/dispatch.py`): each takes the next piece of whatever is most urgent, and what a lost
one had in flight comes over the others. Whatever is said to the sender can be said again, so a new connection begins by saying all of it.
"""

import dataclasses
import itertools
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import grpc
from absl import logging

from prfaas_jax.errors import InvalidInput, PrfaasError, TransferError
from prfaas_jax.kvcache.spec import DTYPE_BYTES
from prfaas_jax.transfer import frames, wire
from prfaas_jax.transfer.channel import LANE_CHANNEL_OPTIONS
from prfaas_jax.transfer.compression import decompress
from prfaas_jax.transfer.lane import METHOD
from prfaas_jax.transfer.link import LinkEstimate, LinkMeter
from prfaas_jax.transfer.security import NONE, Security, open_channel

# A thread in a blocking call leaves at once when it is cancelled; only a callback that hangs could keep it longer.
_JOIN_S = 5.0
_TICK_S = 0.25
# How often a lane that carries nothing, and the group as a whole, is asked for a sign of life.
_PING_S = 1.0
# A probe of an idle link takes about this long there, so that it costs a fortieth of it and outlasts a burst.
_PROBE_S = 0.025
_FIRST_PROBE_BYTES = 1 << 20
_MIN_PROBE_BYTES, _MAX_PROBE_BYTES = 64 << 10, 4 << 20
# Connections in a row that brought nothing, after which a lane is given up. Where nobody listens they take a blink, on a link that breaks
# every connection half a second.
_ATTEMPTS, _ATTEMPTS_REFUSED = 8, 3
_PAUSE_S = 0.015
_REST_S = 2.0
# An acknowledgement costs four threads of gRPC's a turn each, on both sides together: while more follows, they are said together.
_ACK_S = 0.002
# Statuses that another try would not change.
_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)


class Receiver(Protocol):
    """A transfer, as lanes see it. Called from lane threads, several at a time; none may block or raise."""

    def take(self, header: wire.Header, payload: memoryview, wire_bytes: int) -> None:
        """A verified message of the transfer's ticket, not compressed any more; it travelled as `wire_bytes`."""
        ...

    def ended(self) -> None:
        """The sender has nothing more of the ticket."""
        ...

    def failed(self, error: TransferError) -> None:
        """The ticket, or every lane to its sender, is dead."""
        ...


@dataclasses.dataclass(eq=False)
class _Opened:
    receiver: Receiver
    request: frames.Open


class _Acknowledge:
    """Stands in a queue for an `Ack` of all that has been taken when it leaves."""


_ACKNOWLEDGE = _Acknowledge()
_Outgoing = queue.SimpleQueue[bytes | _Acknowledge | None]


@dataclasses.dataclass(eq=False)
class _Lane:
    """One connection after another; guarded by the group's lock, except what its own thread alone writes: `received` and `taken`.

    Attributes:
        taken: messages that may be acknowledged: verified and handed on.
        acking: word of that is queued, and what is taken until it leaves goes with it.
        more: the sender had more to send when the last message left.
    """

    index: int
    thread: threading.Thread | None = None
    outgoing: "_Outgoing" = dataclasses.field(default_factory=queue.SimpleQueue)
    call: grpc.Call | None = None
    stream: int = 0
    received: int = 0
    taken: int = 0
    acking: bool = False
    more: bool = False
    heard: float = 0.0
    pinged: float = 0.0
    brought: bool = False  # this connection has carried something
    up: bool = False  # and the sender has heard everything that was said at its beginning


class LaneGroup:
    """Lanes to one sender's address. They connect on first use, or by `warm`, and stay until `close`."""

    def __init__(self, address: str, lanes: int = 1, security: Security = NONE, dead_s: float = 5.0, probe: bool = True):
        """`dead_s` of silence on a lane, pings included, end its connection; with `probe` an idle link is measured every second.

        Raises InvalidInput for numbers out of range.
        """
        check_lanes(lanes, dead_s)
        self.address = address
        self._security, self._dead_s, self._probe = security, dead_s, probe
        self._session = secrets.token_bytes(frames.SESSION_BYTES)
        self._changed = threading.Condition()
        self._lanes = [_Lane(i) for i in range(lanes)]
        self._numbers = itertools.count(1)
        self._tokens = itertools.count(1)
        self._opened: dict[bytes, _Opened] = {}
        self._lost: list[frames.Lost] = []
        self._pings: dict[int, float] = {}
        self._meter = LinkMeter()
        self._error: TransferError | None = None
        self._closed = False
        self._monitor: threading.Thread | None = None

    # --- transfers ---------------------------------------------------------------------------------------------------------------

    def open(self, request: frames.Open, receiver: Receiver) -> None:
        """Asks for a ticket; `receiver` hears what comes of it until `release`. Raises TransferError once the group is dead or closed."""
        with self._changed:
            if self._error is not None or self._closed:
                raise self._error or TransferError(f"lanes to {self.address} are closed")
            self._opened[request.ticket] = _Opened(receiver, request)
            self._start()
            self._say(request)

    def grant(self, ticket: bytes, granted: int) -> None:
        """Lets the sender have sent `granted` bytes of a ticket in all."""
        with self._changed:
            opened = self._opened.get(ticket)
            if opened is not None and granted > opened.request.granted:
                opened.request = dataclasses.replace(opened.request, granted=granted)
                self._say(frames.Grant(ticket, opened.request.epoch, granted))

    def release(self, ticket: bytes) -> None:
        """Wants no more of a ticket; its receiver hears nothing from now on, except what a lane's thread is in the middle of saying."""
        with self._changed:
            opened = self._opened.pop(ticket, None)
            if opened is not None:
                self._meter.interrupted()  # what the sender had more of may have been this
                self._say(frames.Close(ticket, opened.request.epoch))

    # --- the group ---------------------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether transfers can be opened."""
        with self._changed:
            return self._error is None and not self._closed

    @property
    def busy(self) -> bool:
        """Whether any transfer is open."""
        with self._changed:
            return bool(self._opened)

    def warm(self, timeout_s: float = 5.0) -> bool:
        """Connects every lane and waits until each has carried its first probe; whether all did in time."""
        with self._changed:
            self._start()
            self._changed.wait_for(lambda: self._closed or self._error is not None or all(lane.up for lane in self._lanes), timeout_s)
            return all(lane.up for lane in self._lanes)

    def estimate(self) -> LinkEstimate:
        """The link from that sender to here, as of now."""
        with self._changed:
            return self._meter.estimate(time.monotonic())

    def close(self) -> None:
        """Ends every lane and waits, boundedly, for their threads; transfers that are open fail."""
        with self._changed:
            self._closed = True
            orphans = self._take_receivers()
            calls = [lane.call for lane in self._lanes if lane.call is not None]
            threads = [t for t in (*(lane.thread for lane in self._lanes), self._monitor) if t is not None]
            self._changed.notify_all()
        for receiver in orphans:
            receiver.failed(TransferError(f"lanes to {self.address} were closed"))
        for call in calls:
            call.cancel()
        deadline = time.monotonic() + _JOIN_S
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    # --- with the lock held ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for lane in self._lanes:
            if lane.thread is None and not self._closed:
                lane.thread = threading.Thread(target=self._run, args=(lane,), name=f"lane {self.address} {lane.index}", daemon=True)
                lane.thread.start()
        if self._monitor is None and not self._closed:
            self._monitor = threading.Thread(target=self._watch, name=f"lanes {self.address}", daemon=True)
            self._monitor.start()

    def _say(self, frame: frames.Frame) -> None:
        """Over the first lane that has a connection; without one the next connection says it."""
        for lane in self._lanes:
            if lane.call is not None:
                lane.outgoing.put(frames.encode(frame))
                return

    def _take_receivers(self) -> list[Receiver]:
        receivers = [opened.receiver for opened in self._opened.values()]
        self._opened.clear()
        return receivers

    def _ping(self, lane: _Lane, now: float, nbytes: int) -> None:
        token = next(self._tokens)
        self._pings[token] = now
        lane.pinged = now
        lane.outgoing.put(frames.encode(frames.Ping(token, nbytes)))

    # --- a lane's thread -----------------------------------------------------------------------------------------------------------

    def _run(self, lane: _Lane) -> None:
        failures = 0
        while True:
            error = self._connect(lane)
            with self._changed:
                failures = 0 if lane.brought else failures + 1
                lane.up = lane.brought = False
                if self._closed:
                    return
                tired = failures >= (_ATTEMPTS_REFUSED if "refused" in _reason(error) else _ATTEMPTS)
                final = isinstance(error, grpc.RpcError) and error.code() in _FINAL
                hopeless = final or (tired and not any(other.brought for other in self._lanes))
                if not hopeless:
                    self._changed.wait(_REST_S if tired else _PAUSE_S * failures)
            if hopeless:
                self._die(error)
                return

    def _die(self, error: Exception) -> None:
        """Nothing comes from that address any more."""
        failure = TransferError(f"lane {self.address}: {_reason(error)}")
        with self._changed:
            self._error, self._closed = failure, True
            receivers = self._take_receivers()
            calls = [lane.call for lane in self._lanes if lane.call is not None]
            self._changed.notify_all()
        for receiver in receivers:
            receiver.failed(failure)
        for call in calls:
            call.cancel()

    def _connect(self, lane: _Lane) -> Exception:
        """One connection from its hello to whatever ends it, which is returned."""
        outgoing: _Outgoing = queue.SimpleQueue()
        error: Exception = TransferError("the sender ended the stream")
        channel = None
        try:
            channel = open_channel(self.address, LANE_CHANNEL_OPTIONS, self._security)
            with self._changed:
                if self._closed:
                    return error
                now = time.monotonic()
                lane.outgoing, lane.stream, lane.heard = outgoing, next(self._numbers), now
                lane.received, lane.taken, lane.acking = 0, 0, False
                confirmed = list(self._lost)
                first: list[frames.Frame] = [frames.Hello(self._session, lane.stream), *confirmed]
                for frame in (*first, *(opened.request for opened in self._opened.values())):
                    outgoing.put(frames.encode(frame))
                self._ping(lane, now, 0 if self._opened else _FIRST_PROBE_BYTES)
                lane.call = channel.stream_stream(METHOD)(self._said(lane, outgoing))
            for message in lane.call:
                self._on_message(lane, message, confirmed)
        except (grpc.RpcError, PrfaasError) as raised:
            error = raised
        except Exception as raised:  # ours to mend, and no reason for a lane that is dead and does not say so
            logging.exception("lane %s", self.address)
            error = TransferError(f"{type(raised).__name__}: {raised}")
        finally:
            with self._changed:
                call, lane.call = lane.call, None
                if call is not None:
                    self._lost.append(frames.Lost(lane.stream, lane.received))
                    self._say(self._lost[-1])
                self._meter.interrupted()
            outgoing.put(None)
            if call is not None:
                call.cancel()
            if channel is not None:
                channel.close()
        return error

    def _said(self, lane: _Lane, outgoing: _Outgoing) -> Iterator[bytes]:
        """What a connection is told; run by a thread of gRPC's."""
        while (item := outgoing.get()) is not None:
            if isinstance(item, bytes):
                yield item
                continue
            if lane.more:
                time.sleep(_ACK_S)
            lane.acking = False  # first: what is taken from now on is said again
            yield frames.encode(frames.Ack(lane.taken))

    def _on_message(self, lane: _Lane, message: bytes, confirmed: list[frames.Lost]) -> None:
        """Raises PrfaasError for what cannot be read: the connection is of no use then, and what it had in flight is asked for again."""
        now = time.monotonic()
        if message[:4] == wire.MAGIC:
            self._on_data(lane, message, now)
            return
        frame = frames.decode(message)
        opened: _Opened | None = None
        with self._changed:
            lane.heard, lane.brought = now, True
            match frame:
                case frames.Pong(token, backlog, padding):
                    if padding:  # without any it says nothing of what data is under way
                        self._meter.arrived(now, len(padding), backlog)
                    if (asked := self._pings.pop(token, None)) is not None:
                        self._meter.round_trip(now, now - asked)
                    if not backlog and not lane.up:
                        # Everything said before the first ping has been heard.
                        lane.up = True
                        self._lost = [lost for lost in self._lost if lost not in confirmed]
                        self._changed.notify_all()
                case frames.End(ticket, epoch) | frames.Failed(ticket, epoch, _):
                    opened = self._opened.get(ticket)
                    if opened is not None and opened.request.epoch != epoch:
                        opened = None
                case _:
                    raise InvalidInput("frame", type(frame).__name__, "one that a sender says")
        if opened is not None and isinstance(frame, frames.Failed):
            opened.receiver.failed(TransferError(f"lane {self.address}: {frame.text}"))
        elif opened is not None:
            opened.receiver.ended()

    def _on_data(self, lane: _Lane, message: bytes, now: float) -> None:
        header, payload = wire.decode(message)
        if header.sequence != lane.received:
            raise TransferError(f"message {header.sequence} came where message {lane.received} was due")
        with self._changed:
            lane.heard, lane.brought = now, True
            lane.received += 1
            opened = self._opened.get(header.ticket)
            # Of a straggler nothing need follow.
            self._meter.arrived(now, payload.nbytes, header.backlog and opened is not None, header.order)
        if opened is None or opened.request.epoch != header.epoch:
            # A straggler of a ticket that was closed, or one whose close went down with a connection.
            lane.outgoing.put(frames.encode(frames.Close(header.ticket, header.epoch)))
        else:
            wire_bytes = payload.nbytes
            try:
                if header.compressed:
                    payload = memoryview(decompress(payload, header.raw_bytes, DTYPE_BYTES[header.dtype]))
            except TransferError as error:
                # Its checksum was right: sent again it would be the same.
                opened.receiver.failed(TransferError(f"lane {self.address}: message {header.sequence}: {error}"))
            else:
                opened.receiver.take(header, payload, wire_bytes)
        # Not earlier: once all are acknowledged the sender says that there is no more, over whichever lane. And each, sooner or later: one
        # that is left over, because what was ready behind it went over another lane, would take its place in the window for ever.
        lane.taken, lane.more = lane.received, header.backlog
        if not lane.acking:
            lane.acking = True
            lane.outgoing.put(_ACKNOWLEDGE)

    # --- the monitor's thread --------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Pings, probes, and ends connections that have fallen silent."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, _TICK_S):
                    return
                now = time.monotonic()
                silent = [lane for lane in self._lanes if lane.call is not None and now - lane.heard > self._dead_s]
                calls = [lane.call for lane in silent if lane.call is not None]
                for lane in self._lanes:
                    if lane.call is not None and lane not in silent and now - lane.pinged >= _PING_S:
                        self._ping(lane, now, self._probe_bytes(now) if lane is self._lanes[0] else 0)
                limit = now - 10 * self._dead_s
                self._pings = {token: at for token, at in self._pings.items() if at > limit}
            for call in calls:
                logging.warning("a lane to %s said nothing for %.1f s: its connection is replaced", self.address, self._dead_s)
                call.cancel()

    def _probe_bytes(self, now: float) -> int:
        if self._opened or not self._probe:
            return 0
        rate = self._meter.estimate(now).bytes_per_s
        return int(min(max(rate * _PROBE_S, _MIN_PROBE_BYTES), _MAX_PROBE_BYTES))


def check_lanes(lanes: int, dead_s: float) -> None:
    """Raises InvalidInput for numbers that no group can have."""
    if not 1 <= lanes <= 64:
        raise InvalidInput("lanes", lanes, "a number of connections in 1..64")
    if not dead_s > 0:
        raise InvalidInput("dead_s", dead_s, "a positive number of seconds")


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.RpcError):
        # A call is its own error, and has a status by now.
        return f"{error.code().name}: {error.details()}"
    return str(error)

"""Which piece of which ticket leaves next, on whichever stream of a session has room for it.

Tickets of a session share its streams, so a connection that is slow or gone holds up nobody, and the order is ours: the ticket with
least left to send goes first, so that a short transfer never waits behind long ones; every eighth piece goes to the ticket that has
waited longest, so that a long one is never starved.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.kvcache.segments import Segment, SegmentKey
from prfaas_jax.kvcache.spec import DTYPE_BYTES
from prfaas_jax.transfer import wire
from prfaas_jax.transfer.compression import compress
from prfaas_jax.transfer.flow import Flow, Sent
from prfaas_jax.transfer.frames import End, Failed, Frame, Open
from prfaas_jax.transfer.outbox import Held, Outbox, StaleEpoch, UnknownTicket

_FAIR_EVERY = 8
# How often a stream that has nothing to send asks whether it is still wanted.
_POLL_S = 0.25
# A session without any stream is kept for so long: its reader may be on its way back.
ORPHAN_S = 30.0


class Piece(NamedTuple):
    """Bytes [offset, offset + nbytes) of a segment."""

    sending: "Sending"
    segment: Segment
    offset: int
    nbytes: int
    again: bool


@dataclasses.dataclass(eq=False)
class Sending:
    """What one session still has to be sent of a ticket."""

    held: Held
    granted: int
    limit: int  # bytes of a piece: a small grant must not be one piece, or nothing would overlap
    checked: bool
    compressed: bool
    have: frozenset[SegmentKey]
    returned: collections.deque[Piece] = dataclasses.field(default_factory=collections.deque)
    segment: int = 0
    offset: int = 0
    sent: int = 0
    skipped: int = 0  # of these the reader has already, and no grant is needed
    in_flight: int = 0
    served: int = 0
    ended: bool = False

    def next(self, limit: int) -> Piece | None:
        """The next piece that is ready, granted or not."""
        if self.returned:
            return self.returned[0]
        segments = self.held.segments
        while self.segment < len(segments):
            segment = segments[self.segment]
            if self.offset == 0 and self._is_there(segment.key):
                self.segment += 1
                self.sent += segment.payload.nbytes
                self.skipped += segment.payload.nbytes
                continue
            return Piece(self, segment, self.offset, min(limit, self.limit, segment.payload.nbytes - self.offset), again=False)
        return None

    def may(self, piece: Piece) -> bool:
        """Whether the reader has room for a piece; it has for what was lost on the way to it."""
        return piece.again or self.sent + piece.nbytes <= self.granted + self.skipped

    def take(self, piece: Piece) -> None:
        """Counts a piece that `next` gave as on its way."""
        self.in_flight += piece.nbytes
        if piece.again:
            self.returned.popleft()
            return
        self.sent += piece.nbytes
        self.offset += piece.nbytes
        if self.offset == piece.segment.payload.nbytes:
            self.segment, self.offset = self.segment + 1, 0

    @property
    def left(self) -> int:
        """Bytes of the whole ticket that have not left yet."""
        return self.held.total - self.sent + sum(piece.nbytes for piece in self.returned)

    @property
    def over(self) -> bool:
        """Everything that will ever come has arrived."""
        return self.held.finished and not self.in_flight and self.next(1) is None

    def _is_there(self, key: SegmentKey) -> bool:
        return bool(self.have) and key.all_heads(self.held.spec) in self.have


@dataclasses.dataclass(eq=False)
class Stream:
    """One connection of a session: data messages sent and not acknowledged, in order."""

    session: "Session"
    number: int
    unacked: collections.deque[tuple[Piece, Sent]] = dataclasses.field(default_factory=collections.deque)
    acked: int = 0
    sent: int = 0
    in_flight: int = 0
    answers: collections.deque[Frame] = dataclasses.field(default_factory=collections.deque)
    gone: bool = False


class Session:
    """One reader: its tickets, its streams, and their window. Guarded by the dispatcher."""

    def __init__(self, message_bytes: int):
        self.sendings: dict[bytes, Sending] = {}
        self.streams: dict[int, Stream] = {}
        self.lost: set[int] = set()  # streams that the reader has given up, though their hello may still be on its way
        self.notices: collections.deque[Frame] = collections.deque()
        self.flow = Flow(message_bytes)
        self.order = 0  # messages sent, on whichever stream
        self.left_at = 0.0  # when its last stream ended

    @property
    def live(self) -> int:
        """Streams that are connected."""
        return sum(not stream.gone for stream in self.streams.values())


class Dispatcher:
    """Sessions of one lane server over its outbox. Thread safe: everything happens under `Outbox.changed`."""

    def __init__(self, outbox: Outbox, message_bytes: int = wire.MESSAGE_BYTES, bytes_per_s: float | None = None):
        """`bytes_per_s` paces all sessions together; None leaves the pace to TCP and the windows. Raises InvalidInput."""
        if not 0 < message_bytes <= wire.MAX_MESSAGE_BYTES:
            raise InvalidInput("message_bytes", message_bytes, f"1..{wire.MAX_MESSAGE_BYTES}")
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise InvalidInput("bytes_per_s", bytes_per_s, "a positive rate, or None for no pacing")
        self._outbox, self._message_bytes, self._bytes_per_s = outbox, message_bytes, bytes_per_s
        self._changed, self._clock = outbox.changed, outbox.clock
        self._sessions: dict[bytes, Session] = {}
        self._turn = 0
        self._free_at = 0.0  # when the paced link has room again

    # --- what the reader says --------------------------------------------------------------------------------------------------

    def join(self, session_id: bytes, number: int) -> Stream:
        """A stream of a session has connected; raises InvalidInput for a number that it has used before."""
        with self._changed:
            self.forget_orphans()
            session = self._sessions.setdefault(session_id, Session(self._message_bytes))
            if number in session.streams or number in session.lost:
                raise InvalidInput("stream", number, "a number that this session has not used")
            stream = session.streams[number] = Stream(session, number)
            return stream

    def leave(self, stream: Stream) -> None:
        """A stream's connection is gone. What it had in flight waits for the reader's word on how much of it arrived."""
        with self._changed:
            stream.gone = True
            stream.session.left_at = self._clock()
            if not stream.unacked:
                stream.session.streams.pop(stream.number, None)
            self.forget_orphans()
            self._changed.notify_all()

    def lost(self, stream: Stream, number: int, received: int) -> None:
        """The reader has given up stream `number` of the same session: what came after `received` messages is sent again."""
        with self._changed:
            session = stream.session
            session.lost.add(number)
            gone = session.streams.pop(number, None)
            if gone is None:
                return
            self._acknowledge(gone, received)
            gone.gone = True
            now = self._clock()
            for piece, sent in gone.unacked:
                session.flow.lose(sent, now)
                piece.sending.in_flight -= piece.nbytes
                piece.sending.returned.append(piece._replace(again=True))
            gone.unacked.clear()
            self._changed.notify_all()

    def open(self, stream: Stream, request: Open) -> None:
        """Starts to send a ticket to a session; if it does so already, only its grant is renewed."""
        with self._changed:
            session = stream.session
            if (known := _opened(stream, request.ticket, request.epoch)) is not None:
                known.granted = max(known.granted, request.granted)
                known.ended = False  # said again: the reader may have missed it
            else:
                try:
                    held = self._outbox.find(request.ticket, request.epoch)
                except PrfaasError as error:
                    session.notices.append(_failed(request.ticket, request.epoch, error))
                else:
                    limit = min(self._message_bytes, max(1, request.granted // 2))
                    have = frozenset(request.held)
                    session.sendings[request.ticket] = Sending(held, request.granted, limit, request.checked, request.compressed, have)
            self._changed.notify_all()

    def grant(self, stream: Stream, ticket: bytes, epoch: int, granted: int) -> None:
        """The reader has room for `granted` bytes of a ticket in all."""
        with self._changed:
            if (sending := _opened(stream, ticket, epoch)) is not None:
                sending.granted = max(sending.granted, granted)
                room = sending.granted + sending.skipped - sending.sent
                sending.limit = max(sending.limit, min(self._message_bytes, room // 2))
                self._changed.notify_all()

    def acknowledge(self, stream: Stream, received: int) -> None:
        """The first `received` messages of a stream are verified; raises InvalidInput when it has not sent so many."""
        with self._changed:
            if received > stream.sent:
                raise InvalidInput("acknowledged messages", received, f"at most the {stream.sent} that were sent")
            self._acknowledge(stream, received)
            self._changed.notify_all()

    def close(self, stream: Stream, ticket: bytes, epoch: int) -> None:
        """The session wants no more of a ticket."""
        with self._changed:
            if _opened(stream, ticket, epoch) is not None:
                del stream.session.sendings[ticket]

    def answer(self, stream: Stream, frame: Frame) -> None:
        """Queues a frame for one stream."""
        with self._changed:
            stream.answers.append(frame)
            self._changed.notify_all()

    # --- what a stream sends ---------------------------------------------------------------------------------------------------

    def next(self, stream: Stream) -> tuple[Frame | bytes | None, bool]:
        """What a stream sends next, and whether it goes on.

        (frame or encoded message, True), (None, True) when there is nothing yet, (None, False) when the stream is gone.
        """
        with self._changed:
            due = self._prepare(stream)
            if isinstance(due, float):
                self._changed.wait(due)
                return None, not stream.gone
            if not isinstance(due, Piece):
                return due, True
            piece, session = due, stream.session
            piece.sending.take(piece)
            now = self._clock()
            if self._bytes_per_s is not None:
                self._free_at = max(now, self._free_at) + piece.nbytes / self._bytes_per_s
            stream.unacked.append((piece, session.flow.send(piece.nbytes, now)))
            stream.in_flight += piece.nbytes
            sequence, stream.sent = stream.sent, stream.sent + 1
            order, session.order = session.order, (session.order + 1) % 2**32
            backlog = any(self._ready(session))
        return self._encode(piece, sequence, backlog, order), True

    def _prepare(self, stream: Stream) -> Frame | Piece | float:
        """A frame or a piece to send, or how long to wait for one."""
        session, now = stream.session, self._clock()
        if stream.gone:
            return 0.0
        self._notice_ends(session)
        for queue in (stream.answers, session.notices):
            if queue:
                return queue.popleft()
        # Streams share the window, and none takes all of it: what one has in flight is what a cut of it costs.
        window, piece_bytes = session.flow.window, session.flow.piece_bytes
        if session.flow.in_flight + piece_bytes > window or stream.in_flight + piece_bytes > window // min(session.live, 2):
            return _POLL_S
        if self._free_at > now:
            return min(_POLL_S, self._free_at - now)
        piece = self._choose(session)
        return _POLL_S if piece is None else piece

    def _ready(self, session: Session) -> Iterator[tuple[Sending, Piece]]:
        """Tickets that have a piece which may leave, and that piece."""
        limit = session.flow.piece_bytes
        for sending in session.sendings.values():
            piece = sending.next(limit)
            if piece is not None and sending.may(piece):
                yield sending, piece

    def _choose(self, session: Session) -> Piece | None:
        ready = list(self._ready(session))
        if not ready:
            return None
        self._turn += 1
        if len(ready) == 1:
            sending, piece = ready[0]
        elif self._turn % _FAIR_EVERY == 0:
            sending, piece = min(ready, key=lambda r: r[0].served)
        else:
            sending, piece = min(ready, key=lambda r: (r[0].left, r[0].served))
        sending.served = self._turn
        return piece

    def _notice_ends(self, session: Session) -> None:
        """Queues word of tickets that have ended, one way or the other."""
        for ticket_id, sending in list(session.sendings.items()):
            ticket = sending.held.ticket
            try:
                self._outbox.find(ticket_id, ticket.epoch)
            except PrfaasError as error:
                del session.sendings[ticket_id]
                session.notices.append(_failed(ticket_id, ticket.epoch, error))
                continue
            if not sending.ended and sending.over:
                sending.ended = True
                session.notices.append(End(ticket_id, ticket.epoch))

    def _encode(self, piece: Piece, sequence: int, backlog: bool, order: int) -> bytes:
        """Outside the lock: a copy and a checksum, the larger part of a sender's work."""
        sending, key = piece.sending, piece.segment.key
        ticket, dtype = sending.held.ticket, key.tensor_spec(sending.held.spec).dtype
        whole = piece.segment.payload
        payload = whole[piece.offset : piece.offset + piece.nbytes]
        compressed = False
        if sending.compressed:
            frame = compress(payload, DTYPE_BYTES[dtype])
            if compressed := len(frame) < piece.nbytes:
                payload = memoryview(frame)
        place = (piece.offset, whole.nbytes, piece.nbytes)
        flags = (sending.checked, piece.again, backlog, compressed)
        header = wire.Header(ticket.id, ticket.epoch, sequence, key, dtype, *place, *flags, order)
        return wire.encode(header, payload)

    def _acknowledge(self, stream: Stream, received: int) -> None:
        now = self._clock()
        while stream.acked < received and stream.unacked:
            piece, sent = stream.unacked.popleft()
            stream.acked += 1
            stream.in_flight -= piece.nbytes
            stream.session.flow.acknowledge(sent, now)
            piece.sending.in_flight -= piece.nbytes
            piece.sending.held.touched = now

    def forget_orphans(self) -> None:
        """Drops sessions that nobody came back to, or has anything to come back for: they keep payloads from being freed."""
        with self._changed:
            now = self._clock()
            for session_id, session in list(self._sessions.items()):
                if session.live:
                    continue
                self._notice_ends(session)
                if now - session.left_at > ORPHAN_S or not session.sendings:
                    for stream in session.streams.values():
                        stream.unacked.clear()  # gRPC may keep frames of a stream that is over, and with them the stream
                    del self._sessions[session_id]

    def stalled(self, stream: Stream, seconds: float) -> bool:
        """Whether a stream's oldest message has been unacknowledged for `seconds`."""
        with self._changed:
            return bool(stream.unacked) and stream.unacked[0][1].at < self._clock() - seconds

    def wanted(self, stream: Stream) -> bool:
        """Whether the stream's session has any ticket open."""
        with self._changed:
            return bool(stream.session.sendings)


def _opened(stream: Stream, ticket: bytes, epoch: int) -> Sending | None:
    """What the stream's session is being sent under that ticket and epoch."""
    sending = stream.session.sendings.get(ticket)
    return sending if sending is not None and sending.held.ticket.epoch == epoch else None


def _failed(ticket: bytes, epoch: int, error: PrfaasError) -> Failed:
    match error:
        case StaleEpoch():
            status = "FAILED_PRECONDITION"
        case UnknownTicket():
            status = "NOT_FOUND"
        case _:
            status = "ABORTED"
    return Failed(ticket, epoch, f"{status}: {error}")

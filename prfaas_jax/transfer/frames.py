"""What a lane carries besides data: small binary frames, each under a checksum of its own.

A lane is one long-lived gRPC stream in each direction. The receiver says `Hello`, then opens tickets and grants them bytes; the sender
answers with data messages (`transfer/wire.py`) of any of these tickets, in the order that its dispatcher chooses. Everything that the
receiver says may be said again after a broken connection: grants are totals, and what is known already changes nothing.

    receiver -> sender   Hello, Open, Grant, Ack, Lost, Close, Ping
    sender -> receiver   data, End, Failed, Pong
"""

import dataclasses
import struct
from typing import Any, ClassVar

from prfaas_jax.errors import InvalidInput, PeerMismatch, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.transfer.wire import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, TICKET_BYTES, checksum

SESSION_BYTES = 16
# Blocks that a receiver may say it holds: the frame stays well below gRPC's 4 MiB receive limit.
MAX_HELD = 65_536
MAX_TEXT_BYTES = 4096
MAX_PROBE_BYTES = 8 << 20

_CRC = struct.Struct("<I")
_KEY = struct.Struct("<HH6I")


@dataclasses.dataclass(frozen=True)
class Hello:
    """First frame of a stream: who reads, and which of its streams this is. All streams of a session share its tickets."""

    session: bytes
    stream: int
    version: int = PROTOCOL_VERSION
    magic: ClassVar[bytes] = b"PfHi"
    layout: ClassVar[struct.Struct] = struct.Struct("<16sIH")


@dataclasses.dataclass(frozen=True)
class Open:
    """Sends a ticket from now on, or again what is not known to have arrived: all but the blocks in `held`.

    Attributes:
        granted: bytes that may be sent in all until a `Grant` says more.
        checked: payloads are to be under the checksum.
        compressed: payloads may be compressed.
        held: whole blocks (all heads) that the reader has already, verified.
    """

    ticket: bytes
    epoch: int
    granted: int
    checked: bool = True
    compressed: bool = False
    held: tuple[SegmentKey, ...] = ()
    magic: ClassVar[bytes] = b"PfOp"
    layout: ClassVar[struct.Struct] = struct.Struct("<16sIQ??I")


@dataclasses.dataclass(frozen=True)
class Grant:
    """`granted` bytes of a ticket may have been sent in all."""

    ticket: bytes
    epoch: int
    granted: int
    magic: ClassVar[bytes] = b"PfGr"
    layout: ClassVar[struct.Struct] = struct.Struct("<16sIQ")


@dataclasses.dataclass(frozen=True)
class Ack:
    """The first `received` data messages of this stream have been verified."""

    received: int
    magic: ClassVar[bytes] = b"PfAk"
    layout: ClassVar[struct.Struct] = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Lost:
    """Another stream of this session is gone; `received` of its data messages were verified, what followed is to be sent again."""

    stream: int
    received: int
    magic: ClassVar[bytes] = b"PfLo"
    layout: ClassVar[struct.Struct] = struct.Struct("<IQ")


@dataclasses.dataclass(frozen=True)
class Close:
    """Nothing more of this ticket is wanted on this session."""

    ticket: bytes
    epoch: int
    magic: ClassVar[bytes] = b"PfCl"
    layout: ClassVar[struct.Struct] = struct.Struct("<16sI")


@dataclasses.dataclass(frozen=True)
class Ping:
    """Asks for `Pong`s of `nbytes` bytes in all: 0 measures the round trip, more the link."""

    token: int
    nbytes: int = 0
    magic: ClassVar[bytes] = b"PfPi"
    layout: ClassVar[struct.Struct] = struct.Struct("<QI")


@dataclasses.dataclass(frozen=True)
class End:
    """Every segment of the ticket was sent and acknowledged, and its prefill has finished."""

    ticket: bytes
    epoch: int
    magic: ClassVar[bytes] = b"PfEn"
    layout: ClassVar[struct.Struct] = struct.Struct("<16sI")


@dataclasses.dataclass(frozen=True)
class Failed:
    """The ticket will not be sent; `text` begins with the name of the gRPC status that fits."""

    ticket: bytes
    epoch: int
    text: str
    magic: ClassVar[bytes] = b"PfFa"
    layout: ClassVar[struct.Struct] = struct.Struct("<16sII")


@dataclasses.dataclass(frozen=True)
class Pong:
    """Answers a `Ping`; `backlog` says that more of the same probe follows at once. The padding's bytes mean nothing."""

    token: int
    backlog: bool = False
    padding: bytes = b""
    magic: ClassVar[bytes] = b"PfPo"
    layout: ClassVar[struct.Struct] = struct.Struct("<Q?I")


Frame = Hello | Open | Grant | Ack | Lost | Close | Ping | End | Failed | Pong
_KINDS: dict[bytes, Any] = {kind.magic: kind for kind in (Hello, Open, Grant, Ack, Lost, Close, Ping, End, Failed, Pong)}


def encode(frame: Frame) -> bytes:
    """The frame's bytes; raises InvalidInput for a field that its place cannot hold."""
    tail = b""
    match frame:
        case Hello(session, stream, version):
            fields: tuple = (session, stream, version)
        case Open(ticket, epoch, granted, checked, compressed, held):
            if len(held) > MAX_HELD:
                raise InvalidInput("held blocks", len(held), f"at most {MAX_HELD}")
            fields = (ticket, epoch, granted, checked, compressed, len(held))
            tail = b"".join(_KEY.pack(k.group, k.tensor, *k.layers, *k.tokens, *k.heads) for k in held)
        case Failed(ticket, epoch, text):
            tail = text.encode()[:MAX_TEXT_BYTES]
            fields = (ticket, epoch, len(tail))
        case Pong(token, backlog, tail):
            fields = (token, backlog, len(tail))
        case _:
            fields = dataclasses.astuple(frame)
    sizes = {"ticket": TICKET_BYTES, "session": SESSION_BYTES}
    for name, size in sizes.items():
        value = getattr(frame, name, b"?" * size)
        if len(value) != size:
            raise InvalidInput(name, value.hex(), f"{size} bytes")
    try:
        body = frame.magic + frame.layout.pack(*fields) + tail
    except struct.error as error:
        raise InvalidInput("frame", frame, f"fields that fit the wire format ({error})") from error
    return body + _CRC.pack(checksum(0, body))


def decode(message: bytes) -> Frame:
    """Reads one frame.

    Raises InvalidInput for what no version of this package writes, TransferError for a wrong checksum, PeerMismatch for a `Hello` of
    another protocol version. Sizes are judged before anything is read from them.
    """
    kind = _KINDS.get(message[:4])
    if kind is None or len(message) < 4 + kind.layout.size + _CRC.size:
        raise InvalidInput("frame", message[:8], "a known kind of frame, whole")
    body = message[: -_CRC.size]
    if _CRC.unpack_from(message, len(body))[0] != checksum(0, body):
        raise TransferError(f"checksum of a {kind.__name__} frame is wrong")
    fields: Any = kind.layout.unpack_from(message, 4)
    tail = body[4 + kind.layout.size :]
    match kind.magic:
        case Hello.magic if fields[2] != PROTOCOL_VERSION:
            raise PeerMismatch("protocol_version", PROTOCOL_VERSION, fields[2])
        case Open.magic:
            count = fields[-1]
            if count > MAX_HELD or len(tail) != count * _KEY.size:
                raise InvalidInput("held blocks", count, f"at most {MAX_HELD}, and as many as follow ({len(tail)} bytes)")
            held = tuple(SegmentKey(g, t, (a, b), (c, d), (e, f)) for g, t, a, b, c, d, e, f in _KEY.iter_unpack(tail))
            return Open(*(*fields[:-1], held))
        case Failed.magic | Pong.magic:
            limit = MAX_TEXT_BYTES if kind is Failed else MAX_MESSAGE_BYTES
            if fields[-1] != len(tail) or len(tail) > limit:
                raise InvalidInput(f"{kind.__name__} bytes", fields[-1], f"at most {limit}, and as many as follow ({len(tail)})")
            return kind(*(*fields[:-1], tail.decode(errors="replace") if kind is Failed else tail))
        case Ping.magic if fields[1] > MAX_PROBE_BYTES:
            raise InvalidInput("probe bytes", fields[1], f"at most {MAX_PROBE_BYTES}")
    if tail:
        raise InvalidInput(f"{kind.__name__} frame", len(message), f"{4 + kind.layout.size + _CRC.size} bytes")
    return kind(*fields)

"""The raw message of a lane: a fixed binary header and a piece of one segment's payload.

Little endian, no protobuf: a `bytes` field would cost two more copies on each side. The checksum covers header and payload, so a
flipped bit anywhere is an error and never a wrong token.
"""

import dataclasses
import struct

import google_crc32c
import numpy as np

from prfaas_jax.errors import InvalidInput, PeerMismatch, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec

PROTOCOL_VERSION = 1

# A message's payload: the default is the fastest size measured, the limit keeps every message below gRPC's 4 MiB receive limit.
MESSAGE_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 2 << 20

TICKET_BYTES = 16
CODEC_RAW = 0
DTYPE_CODES = {"float32": 0, "bfloat16": 1}

_MAGIC = b"PfKV"
# magic, version, codec, dtype, ticket, epoch, sequence, group, tensor, layers, tokens, heads, offset, segment bytes, payload bytes
_HEADER = struct.Struct("<4sHBB16sIIHHIIIIIIQQI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size

_REQUEST_MAGIC = b"PfRq"
_REQUEST = struct.Struct("<4sHxx16sII")


def check_spec(spec: CacheSpec) -> None:
    """Raises InvalidInput for a cache that this protocol version cannot carry: it knows any kind of group, and few dtypes."""
    for index, group in enumerate(spec.groups):
        for tensor in group.cache.tensors:
            if tensor.dtype not in DTYPE_CODES:
                raise InvalidInput(f"spec.groups[{index}].{tensor.name}.dtype", tensor.dtype, f"one of {sorted(DTYPE_CODES)}")


@dataclasses.dataclass(frozen=True)
class Header:
    """What one message carries.

    Attributes:
        ticket: 16 raw bytes, chosen by the server.
        epoch: generation of the ticket; messages of another epoch are refused.
        sequence: number of the message within its lane, from 0.
        key: the segment that the payload belongs to.
        dtype: a key of `DTYPE_CODES`.
        offset: first payload byte's position within the segment.
        segment_bytes: bytes of the whole segment.
        codec: `CODEC_RAW`, the only one there is.
    """

    ticket: bytes
    epoch: int
    sequence: int
    key: SegmentKey
    dtype: str
    offset: int
    segment_bytes: int
    codec: int = CODEC_RAW

    def check(self, spec: CacheSpec, length: int, payload_bytes: int) -> None:
        """Raises TransferError unless key, dtype and sizes agree with the cache of a `length`-token request."""
        try:
            self.key.check(spec, length)
        except InvalidInput as error:
            raise TransferError(f"message {self.sequence} lies outside the cache: {error}") from error
        dtype, nbytes = self.key.tensor_spec(spec).dtype, self.key.nbytes(spec)
        if self.dtype != dtype:
            raise TransferError(f"message {self.sequence} of {self.key}: dtype {self.dtype}, expected {dtype}")
        if self.segment_bytes != nbytes:
            raise TransferError(f"message {self.sequence} of {self.key}: claims {self.segment_bytes} segment bytes, expected {nbytes}")
        if self.offset + payload_bytes > nbytes:
            end = self.offset + payload_bytes
            raise TransferError(f"message {self.sequence} of {self.key}: ends at byte {end} of a {nbytes}-byte segment")


def encode(header: Header, payload: memoryview) -> bytes:
    """Builds one message; the only copy of the payload is the one into the returned bytes.

    Raises InvalidInput for a payload that is empty or above `MAX_MESSAGE_BYTES`, or a field that its place cannot hold.
    """
    if not 0 < payload.nbytes <= MAX_MESSAGE_BYTES:
        raise InvalidInput("payload bytes", payload.nbytes, f"1..{MAX_MESSAGE_BYTES}")
    if len(header.ticket) != TICKET_BYTES:
        raise InvalidInput("ticket", header.ticket.hex(), f"{TICKET_BYTES} bytes")
    if header.dtype not in DTYPE_CODES:
        raise InvalidInput("dtype", header.dtype, f"one of {sorted(DTYPE_CODES)}")
    key = header.key
    try:
        head = _HEADER.pack(
            *(_MAGIC, PROTOCOL_VERSION, header.codec, DTYPE_CODES[header.dtype], header.ticket, header.epoch, header.sequence),
            *(key.group, key.tensor, *key.layers, *key.tokens, *key.heads),
            *(header.offset, header.segment_bytes, payload.nbytes),
        )
    except struct.error as error:
        raise InvalidInput("header", header, f"fields that fit the wire format ({error})") from error
    return b"".join((head, _CRC.pack(_checksum(head, payload)), payload))


def decode(message: bytes) -> tuple[Header, memoryview]:
    """Reads one message; the payload is a view of `message`.

    Raises TransferError on a wrong length, magic, version, codec, dtype or checksum. What the header says about the cache is for
    `Header.check` to judge: nothing may be allocated before that.
    """
    if len(message) <= HEADER_BYTES:
        raise TransferError(f"message of {len(message)} bytes: truncated, a header alone has {HEADER_BYTES}")
    fields = _HEADER.unpack_from(message)
    magic, version, codec, dtype, ticket, epoch, sequence, group, tensor, *ranges, offset, segment_bytes, nbytes = fields
    if magic != _MAGIC:
        raise TransferError(f"message starts with {magic!r}, expected {_MAGIC!r}")
    if version != PROTOCOL_VERSION:
        raise TransferError(f"message of protocol version {version}, expected {PROTOCOL_VERSION}")
    payload = memoryview(message)[HEADER_BYTES:]
    if nbytes != payload.nbytes or nbytes > MAX_MESSAGE_BYTES:
        raise TransferError(f"message claims {nbytes} payload bytes and has {payload.nbytes}; the limit is {MAX_MESSAGE_BYTES}")
    (crc,) = _CRC.unpack_from(message, _HEADER.size)
    if crc != (seen := _checksum(message[: _HEADER.size], payload)):
        raise TransferError(f"checksum of message {sequence}: header says {crc:#010x}, the bytes have {seen:#010x}")
    if codec != CODEC_RAW:
        raise TransferError(f"message {sequence}: codec {codec}, expected {CODEC_RAW} (raw)")
    names = {code: name for name, code in DTYPE_CODES.items()}
    if dtype not in names:
        raise TransferError(f"message {sequence}: dtype code {dtype}, expected one of {sorted(names)}")
    a, b, c, d, e, f = ranges
    key = SegmentKey(group, tensor, (a, b), (c, d), (e, f))
    return Header(ticket, epoch, sequence, key, names[dtype], offset, segment_bytes, codec), payload


def _checksum(head: bytes, payload: memoryview) -> int:
    # crc32c takes no memoryview; an array over the same bytes is free.
    crc: int = google_crc32c.extend(google_crc32c.value(head), np.frombuffer(payload, np.uint8))
    return crc


@dataclasses.dataclass(frozen=True)
class FetchRequest:
    """What a puller asks of a lane: the messages of a ticket, from `from_sequence` on."""

    ticket: bytes
    epoch: int
    from_sequence: int = 0

    def encode(self) -> bytes:
        """Fixed-size binary form; raises InvalidInput when a field does not fit."""
        if len(self.ticket) != TICKET_BYTES:
            raise InvalidInput("ticket", self.ticket.hex(), f"{TICKET_BYTES} bytes")
        try:
            return _REQUEST.pack(_REQUEST_MAGIC, PROTOCOL_VERSION, self.ticket, self.epoch, self.from_sequence)
        except struct.error as error:
            raise InvalidInput("request", self, f"epoch and from_sequence of 32 bits ({error})") from error

    @classmethod
    def decode(cls, message: bytes) -> "FetchRequest":
        """Raises InvalidInput when malformed and PeerMismatch on another protocol version."""
        if len(message) != _REQUEST.size or message[:4] != _REQUEST_MAGIC:
            raise InvalidInput("request", bytes(message[:8]), f"{_REQUEST.size} bytes that start with {_REQUEST_MAGIC!r}")
        _, version, ticket, epoch, from_sequence = _REQUEST.unpack(message)
        if version != PROTOCOL_VERSION:
            raise PeerMismatch("protocol_version", PROTOCOL_VERSION, version)
        return cls(ticket, epoch, from_sequence)

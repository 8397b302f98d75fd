"""The raw data message of a lane: a fixed binary header and a piece of one segment's payload.

Little endian, no protobuf: a `bytes` field would cost two more copies on each side. A checksum always covers the header and, unless both
sides agreed to do without, the payload: a flipped bit anywhere is an error and never a wrong token. What goes the other way, and what
else a lane carries, is in `transfer/frames.py`.
"""

import dataclasses
import struct
from typing import Any

import google_crc32c
import numpy as np

from prfaas_jax.errors import InvalidInput, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec

PROTOCOL_VERSION = 3

# A message's payload at most, unless told otherwise: the fastest size measured on a link without a limit (a slow one gets smaller ones,
# see `Flow.piece_bytes`), and the limit, which keeps every message below gRPC's 4 MiB receive limit.
MESSAGE_BYTES = 2 << 20
MAX_MESSAGE_BYTES = 2 << 20

TICKET_BYTES = 16
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "uint8": 2}
_DTYPES = {code: name for name, code in DTYPE_CODES.items()}

MAGIC = b"PfKV"
# magic, version, flags, dtype, ticket, epoch, sequence, group, tensor, layers, tokens, heads, offset, segment, raw and payload bytes, order
# Padded so that the payload of a message, whose bytes Python puts 32 behind a multiple of 16, is aligned for any dtype.
_HEADER = struct.Struct("<4sHBB16sIIHHIIIIIIQQIII4x")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
_CHECKED, _AGAIN, _BACKLOG, _COMPRESSED = 1, 2, 4, 8


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
        sequence: number of the message within its stream, from 0.
        key: the segment that the payload belongs to.
        dtype: a key of `DTYPE_CODES`.
        offset: first raw byte's position within the segment.
        segment_bytes: bytes of the whole segment.
        raw_bytes: bytes of the segment that the payload stands for: as many as it has, unless it is compressed.
        checked: the payload is under the checksum too.
        again: these bytes were sent before, on a stream that was lost.
        backlog: when this message was handed to the network, more was ready: what follows comes as fast as the link allows.
        compressed: the payload is a zstd frame of `raw_bytes` bytes.
        order: number of the message within its session, whichever stream carries it, modulo 2^32.
    """

    ticket: bytes
    epoch: int
    sequence: int
    key: SegmentKey
    dtype: str
    offset: int
    segment_bytes: int
    raw_bytes: int
    checked: bool = True
    again: bool = False
    backlog: bool = False
    compressed: bool = False
    order: int = 0

    def check(self, spec: CacheSpec, length: int, held: int = 0) -> None:
        """Raises TransferError unless key, dtype and sizes agree with what a `length`-token request adds to its first `held` tokens."""
        try:
            self.key.check(spec, length, held)
        except InvalidInput as error:
            raise TransferError(f"message {self.sequence} lies outside the cache: {error}") from error
        dtype, nbytes = spec.groups[self.key.group].cache.tensors[self.key.tensor].dtype, self.key.nbytes(spec)
        if self.dtype != dtype:
            raise TransferError(f"message {self.sequence} of {self.key}: dtype {self.dtype}, expected {dtype}")
        if self.segment_bytes != nbytes:
            raise TransferError(f"message {self.sequence} of {self.key}: claims {self.segment_bytes} segment bytes, expected {nbytes}")
        if self.offset + self.raw_bytes > nbytes:
            end = self.offset + self.raw_bytes
            raise TransferError(f"message {self.sequence} of {self.key}: ends at byte {end} of a {nbytes}-byte segment")


def encode(header: Header, payload: memoryview) -> bytes:
    """Builds one message; the only copy of the payload is the one into the returned bytes.

    Raises InvalidInput for a payload that is empty or above `MAX_MESSAGE_BYTES`, or a field that its place cannot hold.
    """
    if not 0 < payload.nbytes <= MAX_MESSAGE_BYTES:
        raise InvalidInput("payload bytes", payload.nbytes, f"1..{MAX_MESSAGE_BYTES}")
    if not header.compressed and payload.nbytes != header.raw_bytes:
        raise InvalidInput("raw_bytes", header.raw_bytes, f"the {payload.nbytes} bytes of the payload")
    if len(header.ticket) != TICKET_BYTES:
        raise InvalidInput("ticket", header.ticket.hex(), f"{TICKET_BYTES} bytes")
    if header.dtype not in DTYPE_CODES:
        raise InvalidInput("dtype", header.dtype, f"one of {sorted(DTYPE_CODES)}")
    try:
        head = pack(header, payload.nbytes)
    except struct.error as error:
        raise InvalidInput("header", header, f"fields that fit the wire format ({error})") from error
    return b"".join((head, _CRC.pack(_checksum(head, payload, header.checked)), payload))


def pack(header: Header, payload_bytes: int) -> bytes:
    """The first bytes of a message, of which `header_of` makes the same header; raises struct.error for a field that does not fit."""
    key = header.key
    flags = header.checked * _CHECKED | header.again * _AGAIN | header.backlog * _BACKLOG | header.compressed * _COMPRESSED
    return _HEADER.pack(
        *(MAGIC, PROTOCOL_VERSION, flags, DTYPE_CODES[header.dtype], header.ticket, header.epoch, header.sequence),
        *(key.group, key.tensor, *key.layers, *key.tokens, *key.heads),
        *(header.offset, header.segment_bytes, header.raw_bytes, payload_bytes, header.order),
    )


def decode(message: bytes) -> tuple[Header, memoryview]:
    """Reads one message; the payload is a view of `message`.

    Raises TransferError on a wrong length, magic, version, dtype, size or checksum. What the header says about the cache is for
    `Header.check` to judge: nothing may be allocated before that.
    """
    if len(message) <= HEADER_BYTES:
        raise TransferError(f"message of {len(message)} bytes: truncated, a header alone has {HEADER_BYTES}")
    fields = _HEADER.unpack_from(message)
    magic, version, flags, dtype, _, _, sequence, *_, raw, nbytes, _ = fields
    if magic != MAGIC:
        raise TransferError(f"message starts with {magic!r}, expected {MAGIC!r}")
    if version != PROTOCOL_VERSION:
        raise TransferError(f"message of protocol version {version}, expected {PROTOCOL_VERSION}")
    payload = memoryview(message)[HEADER_BYTES:]
    if nbytes != payload.nbytes or nbytes > MAX_MESSAGE_BYTES:
        raise TransferError(f"message claims {nbytes} payload bytes and has {payload.nbytes}; the limit is {MAX_MESSAGE_BYTES}")
    (crc,) = _CRC.unpack_from(message, _HEADER.size)
    if crc != (seen := _checksum(message[: _HEADER.size], payload, bool(flags & _CHECKED))):
        raise TransferError(f"checksum of message {sequence}: header says {crc:#010x}, the bytes have {seen:#010x}")
    if dtype not in _DTYPES:
        raise TransferError(f"message {sequence}: dtype code {dtype}, expected one of {sorted(_DTYPES)}")
    if not 0 < raw <= MAX_MESSAGE_BYTES or (not flags & _COMPRESSED and raw != nbytes):
        raise TransferError(f"message {sequence} claims {raw} raw bytes in a payload of {nbytes}; the limit is {MAX_MESSAGE_BYTES}")
    return _header(*fields), payload


def header_of(message: bytes) -> Header:
    """The header of a message that `decode` has judged, or of what `pack` made; what follows it does not matter."""
    return _header(*_HEADER.unpack_from(message))


def _header(*fields: Any) -> Header:
    _, _, flags, dtype, ticket, epoch, sequence, group, tensor, a, b, c, d, e, f, offset, size, raw, _, order = fields
    key = SegmentKey(group, tensor, (a, b), (c, d), (e, f))
    checked, again, backlog, compressed = flags & _CHECKED != 0, flags & _AGAIN != 0, flags & _BACKLOG != 0, flags & _COMPRESSED != 0
    return Header(ticket, epoch, sequence, key, _DTYPES[dtype], offset, size, raw, checked, again, backlog, compressed, order)


def checksum(start: int, data: bytes | memoryview) -> int:
    """crc32c of `data`, going on from `start`."""
    # crc32c takes no memoryview; an array over the same bytes is free.
    crc: int = google_crc32c.extend(start, data if isinstance(data, bytes) else np.frombuffer(data, np.uint8))
    return crc


def _checksum(head: bytes, payload: memoryview, whole: bool) -> int:
    crc = checksum(0, head)
    return checksum(crc, payload) if whole else crc

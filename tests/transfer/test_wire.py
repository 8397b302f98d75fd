import dataclasses
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput, PeerMismatch, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.transfer import wire

SPEC = CacheSpec(
    (
        CacheGroup(LayerCache("paged", (TensorSpec("k", 4, 8, "bfloat16"), TensorSpec("v", 4, 8, "float32"))), (0, 1, 2)),
        CacheGroup(LayerCache("window", (TensorSpec("k", 4, 8, "float32"),), 4), (3, 4)),
        CacheGroup(LayerCache("state", (TensorSpec("recurrent", 4, 8, "float32"),)), (5, 6)),
    )
)
LENGTH = 10

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
ranges = st.tuples(u32, u32)
keys = st.builds(SegmentKey, st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), ranges, ranges, ranges)
headers = st.builds(wire.Header, st.binary(min_size=16, max_size=16), u32, u32, keys, st.sampled_from(sorted(wire.DTYPE_CODES)), u64, u64)


def good_header(**changes) -> wire.Header:
    key = SegmentKey(0, 1, (0, 3), (2, 10), (1, 3))
    header = wire.Header(b"t" * 16, 7, 3, key, "float32", 0, key.nbytes(SPEC))
    return dataclasses.replace(header, **changes)


@given(headers, st.binary(min_size=1, max_size=300))
def test_round_trip(header, payload):
    seen, view = wire.decode(wire.encode(header, memoryview(payload)))
    assert seen == header
    assert view == payload


@given(headers, st.binary(min_size=1, max_size=64), st.data())
def test_any_flipped_bit_is_refused(header, payload, data):
    message = bytearray(wire.encode(header, memoryview(payload)))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TransferError):
        wire.decode(bytes(message))


@given(headers, st.binary(min_size=1, max_size=64), st.data())
def test_truncated_or_padded_message_is_refused(header, payload, data):
    message = wire.encode(header, memoryview(payload))
    with pytest.raises(TransferError):
        wire.decode(message[: data.draw(st.integers(0, len(message) - 1))])
    with pytest.raises(TransferError):
        wire.decode(message + b"\0")


@given(st.binary(max_size=300))
def test_random_bytes_never_crash_the_parser(message):
    with pytest.raises(TransferError):
        wire.decode(message)


def test_decode_does_not_copy_the_payload():
    message = wire.encode(good_header(), memoryview(bytes(wire.MESSAGE_BYTES)))
    tracemalloc.start()
    wire.decode(message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("size", [0, wire.MAX_MESSAGE_BYTES + 1])
def test_payload_size_is_bounded_when_encoding(size):
    with pytest.raises(InvalidInput, match="payload bytes"):
        wire.encode(good_header(), memoryview(bytes(size)))


def test_oversized_message_is_refused_when_decoding(monkeypatch):
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 8 << 20)
    message = wire.encode(good_header(), memoryview(bytes(3 << 20)))
    monkeypatch.undo()
    with pytest.raises(TransferError, match="limit"):
        wire.decode(message)


@pytest.mark.parametrize("codec", [1, 255])
def test_unknown_codec_is_refused(codec):
    with pytest.raises(TransferError, match="codec"):
        wire.decode(wire.encode(good_header(codec=codec), memoryview(b"x")))


@pytest.mark.parametrize(
    "changes",
    [
        {"segment_bytes": 2**63},
        {"segment_bytes": 1},
        {"dtype": "bfloat16"},
        {"offset": 2**63},
        {"key": SegmentKey(3, 0, (0, 3), (0, 10), (0, 4))},
        {"key": SegmentKey(1, 0, (0, 2), (5, 10), (0, 4))},
        {"key": SegmentKey(1, 0, (0, 2), (0, 4), (0, 4))},
        {"key": SegmentKey(2, 0, (0, 2), (8, 10), (0, 4))},
        {"key": SegmentKey(2, 0, (0, 2), (0, 1), (0, 4))},
        {"key": SegmentKey(2, 0, (0, 3), (9, 10), (0, 4))},
        {"key": SegmentKey(0, 2, (0, 3), (0, 10), (0, 4))},
        {"key": SegmentKey(0, 1, (0, 4), (0, 10), (0, 4))},
        {"key": SegmentKey(0, 1, (0, 3), (0, 11), (0, 4))},
        {"key": SegmentKey(0, 1, (0, 3), (0, 10), (0, 5))},
        {"key": SegmentKey(0, 1, (0, 3), (5, 5), (0, 4))},
        {"key": SegmentKey(0, 1, (0, 3), (2**32 - 2, 2**32 - 1), (0, 4))},
    ],
)
def test_lying_header_is_refused_before_allocation(changes):
    header, payload = wire.decode(wire.encode(good_header(**changes), memoryview(b"x" * 8)))
    tracemalloc.start()
    with pytest.raises(TransferError, match="message 3"):
        header.check(SPEC, LENGTH, payload.nbytes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    "key",
    [
        SegmentKey(0, 1, (0, 3), (2, 10), (1, 3)),
        SegmentKey(1, 0, (0, 2), (6, 10), (0, 4)),
        SegmentKey(1, 0, (1, 2), (7, 9), (0, 4)),
        SegmentKey(2, 0, (1, 2), (9, 10), (2, 4)),
    ],
)
def test_honest_header_passes(key):
    header = good_header(key=key, segment_bytes=key.nbytes(SPEC))
    header.check(SPEC, LENGTH, header.segment_bytes)
    with pytest.raises(TransferError, match="ends at byte"):
        header.check(SPEC, LENGTH, header.segment_bytes + 1)


def test_header_field_that_does_not_fit_is_named():
    with pytest.raises(InvalidInput, match="header"):
        wire.encode(good_header(epoch=2**32), memoryview(b"x"))
    with pytest.raises(InvalidInput, match="ticket"):
        wire.encode(good_header(ticket=b"short"), memoryview(b"x"))


@given(st.binary(min_size=16, max_size=16), u32, u32)
def test_request_round_trip(ticket, epoch, sequence):
    request = wire.FetchRequest(ticket, epoch, sequence)
    assert wire.FetchRequest.decode(request.encode()) == request


def test_malformed_request_and_other_version_are_told_apart(monkeypatch):
    good = wire.FetchRequest(b"t" * 16, 1).encode()
    for bad in (b"", good[:-1], good + b"\0", b"xxxx" + good[4:]):
        with pytest.raises(InvalidInput, match="request"):
            wire.FetchRequest.decode(bad)
    monkeypatch.setattr(wire, "PROTOCOL_VERSION", 2)
    with pytest.raises(PeerMismatch, match="protocol_version"):
        wire.FetchRequest.decode(good)
    message = wire.encode(good_header(), memoryview(b"x"))
    monkeypatch.undo()
    with pytest.raises(TransferError, match="version"):
        wire.decode(message)

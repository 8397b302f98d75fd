import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput, TransferError
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
flags = st.booleans()


def headers_of(size: int, raw: int | None = None) -> st.SearchStrategy[wire.Header]:
    """Headers of a message whose payload has `size` bytes; with `raw` it is compressed."""
    fixed = {"raw_bytes": size if raw is None else raw, "compressed": raw is not None}
    names = (st.binary(min_size=16, max_size=16), u32, u32, keys, st.sampled_from(sorted(wire.DTYPE_CODES)), u64, u64)
    fields = ("ticket", "epoch", "sequence", "key", "dtype", "offset", "segment_bytes")
    drawn = dict(zip(fields, names, strict=True)) | {"checked": flags, "again": flags, "backlog": flags, "order": u32}
    return st.fixed_dictionaries(drawn).map(lambda values: wire.Header(**values, **fixed))


payloads = st.binary(min_size=1, max_size=300)
messages = payloads.flatmap(lambda payload: st.tuples(headers_of(len(payload)), st.just(payload)))


def good_header(**changes) -> wire.Header:
    key = SegmentKey(0, 1, (0, 3), (2, 10), (1, 3))
    header = wire.Header(b"t" * 16, 7, 3, key, "float32", 0, key.nbytes(SPEC), 1)
    return dataclasses.replace(header, **changes)


@given(messages)
def test_round_trip(message):
    header, payload = message
    seen, view = wire.decode(wire.encode(header, memoryview(payload)))
    assert seen == header
    assert view == payload


@given(payloads.flatmap(lambda payload: st.tuples(headers_of(len(payload), 7 * len(payload)), st.just(payload))))
def test_round_trip_of_a_compressed_message(message):
    header, payload = message
    assert wire.decode(wire.encode(header, memoryview(payload))) == (header, payload)


@given(messages, st.data())
def test_any_flipped_bit_is_refused(message, data):
    """Anywhere under a checksum: without one for the payload, in the header."""
    header, payload = message
    message = bytearray(wire.encode(header, memoryview(payload)))
    at = data.draw(st.integers(0, (len(message) if header.checked else wire.HEADER_BYTES) - 1))
    message[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TransferError):
        wire.decode(bytes(message))


@given(messages, st.data())
def test_truncated_or_padded_message_is_refused(message, data):
    header, payload = message
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
    message = wire.encode(good_header(raw_bytes=wire.MESSAGE_BYTES), memoryview(bytes(wire.MESSAGE_BYTES)))
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
    message = wire.encode(good_header(raw_bytes=3 << 20), memoryview(bytes(3 << 20)))
    monkeypatch.undo()
    with pytest.raises(TransferError, match="limit"):
        wire.decode(message)


@pytest.mark.parametrize("raw_bytes", [0, wire.MAX_MESSAGE_BYTES + 1, 2**32 - 1])
def test_compressed_message_that_claims_too_much_is_refused(raw_bytes):
    with pytest.raises(TransferError, match="raw bytes"):
        wire.decode(wire.encode(good_header(raw_bytes=raw_bytes, compressed=True), memoryview(b"x")))


def test_payload_of_another_size_than_its_header_says_is_refused():
    with pytest.raises(InvalidInput, match="raw_bytes"):
        wire.encode(good_header(raw_bytes=2), memoryview(b"x"))


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
    header, _ = wire.decode(wire.encode(good_header(raw_bytes=8, **changes), memoryview(b"x" * 8)))
    tracemalloc.start()
    with pytest.raises(TransferError, match="message 3"):
        header.check(SPEC, LENGTH)
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
    header = good_header(key=key, segment_bytes=key.nbytes(SPEC), raw_bytes=key.nbytes(SPEC))
    header.check(SPEC, LENGTH)
    with pytest.raises(TransferError, match="ends at byte"):
        dataclasses.replace(header, raw_bytes=header.raw_bytes + 1).check(SPEC, LENGTH)


def test_header_of_what_the_reader_has_already_is_refused():
    header = good_header(raw_bytes=8)
    header.check(SPEC, LENGTH, held=2)
    with pytest.raises(TransferError, match="tokens"):
        header.check(SPEC, LENGTH, held=3)


def test_header_field_that_does_not_fit_is_named():
    with pytest.raises(InvalidInput, match="header"):
        wire.encode(good_header(epoch=2**32), memoryview(b"x"))
    with pytest.raises(InvalidInput, match="ticket"):
        wire.encode(good_header(ticket=b"short"), memoryview(b"x"))


def test_message_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "PROTOCOL_VERSION", 1)
    message = wire.encode(good_header(), memoryview(b"x"))
    monkeypatch.undo()
    with pytest.raises(TransferError, match="version"):
        wire.decode(message)


def test_payload_is_aligned_for_every_dtype():
    _, payload = wire.decode(wire.encode(good_header(raw_bytes=64), memoryview(bytes(64))))
    assert np.frombuffer(payload, np.uint8).ctypes.data % 16 == 0

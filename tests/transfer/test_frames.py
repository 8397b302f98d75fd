"""Control frames of lanes: what is written is read, anything else is a clean error, and nothing is allocated on a frame's word."""

import contextlib
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput, PeerMismatch, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.transfer import frames
from prfaas_jax.transfer.wire import PROTOCOL_VERSION, checksum

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
ids = st.binary(min_size=16, max_size=16)
ranges = st.tuples(u32, u32)
held = st.lists(st.builds(SegmentKey, u16, u16, ranges, ranges, ranges), max_size=5).map(tuple)
anything = st.one_of(
    st.builds(frames.Hello, ids, u32, st.just(PROTOCOL_VERSION)),
    st.builds(frames.Open, ids, u32, u64, st.booleans(), st.booleans(), held),
    st.builds(frames.Grant, ids, u32, u64),
    st.builds(frames.Ack, u64),
    st.builds(frames.Lost, u32, u64),
    st.builds(frames.Close, ids, u32),
    st.builds(frames.Ping, u64, st.integers(0, frames.MAX_PROBE_BYTES)),
    st.builds(frames.End, ids, u32),
    st.builds(frames.Failed, ids, u32, st.text(max_size=50)),
    st.builds(frames.Pong, u64, st.booleans(), st.binary(max_size=50)),
)


@settings(max_examples=1000)
@given(anything)
def test_round_trip(frame):
    assert frames.decode(frames.encode(frame)) == frame


@settings(max_examples=2000)
@given(anything, st.data())
def test_any_flipped_bit_is_refused(frame, data):
    message = bytearray(frames.encode(frame))
    message[data.draw(st.integers(0, len(message) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((InvalidInput, TransferError)):
        frames.decode(bytes(message))


@settings(max_examples=4000)
@given(st.one_of(st.binary(max_size=200), st.sampled_from(sorted(frames._KINDS)).flatmap(lambda m: st.binary(max_size=90).map(m.__add__))))
def test_random_bytes_are_a_clean_error(message):
    with pytest.raises((InvalidInput, TransferError)):
        frames.decode(message)


@settings(max_examples=4000)
@given(anything, st.data())
def test_lying_sizes_under_a_right_checksum_are_refused_before_allocation(frame, data):
    """Whatever a hostile peer puts there: a frame, or an error; never memory beyond the message's own."""
    body = bytearray(frames.encode(frame)[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(4, len(body) - 1))] = data.draw(st.integers(0, 255))
    message = bytes(body) + struct.pack("<I", checksum(0, bytes(body)))
    tracemalloc.start()
    with contextlib.suppress(InvalidInput, TransferError, PeerMismatch):
        frames.decode(message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000 + 4 * len(message)


def test_another_protocol_version_is_named_with_both():
    with pytest.raises(PeerMismatch, match=rf"protocol_version.*{PROTOCOL_VERSION}.*9"):
        frames.decode(frames.encode(frames.Hello(b"s" * 16, 1, version=9)))


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        (frames.Hello(b"short", 1), "session"),
        (frames.Close(b"short", 1), "ticket"),
        (frames.Grant(b"t" * 16, 1, -1), "frame"),
        (frames.Open(b"t" * 16, 1, 0, held=(SegmentKey(0, 0, (0, 1), (0, 1), (0, 1)),) * (frames.MAX_HELD + 1)), "held"),
    ],
)
def test_fields_that_do_not_fit_are_named(frame, field):
    with pytest.raises(InvalidInput, match=field):
        frames.encode(frame)


def test_probes_are_bounded():
    with pytest.raises(InvalidInput, match="probe"):
        frames.decode(frames.encode(frames.Ping(1, frames.MAX_PROBE_BYTES + 1)))

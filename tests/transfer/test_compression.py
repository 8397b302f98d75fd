"""Every byte comes back, planes pay on floats, and no frame of a peer makes us allocate more than the header allowed."""

import contextlib
import resource

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput, TransferError
from prfaas_jax.transfer.compression import compress, decompress
from prfaas_jax.transfer.wire import MAX_MESSAGE_BYTES


@given(st.binary(max_size=4096), st.sampled_from([1, 2, 3, 4, 8]))
def test_any_bytes_come_back(payload, item_bytes):
    assert decompress(compress(payload, item_bytes), len(payload), item_bytes) == payload


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_every_bit_pattern_of_a_half_and_nan_payloads_come_back(item_bytes):
    payload = np.random.default_rng(0).permutation(2**16).astype(np.uint16).tobytes()
    assert decompress(compress(payload, item_bytes), len(payload), item_bytes) == payload


def test_takes_a_view_of_a_message_and_the_largest_payload():
    payload = np.random.default_rng(0).integers(0, 256, MAX_MESSAGE_BYTES + 7, dtype=np.uint8).tobytes()
    view = memoryview(payload)[7:]
    frame = compress(view, 2)
    assert len(frame) < 1.01 * len(view) and decompress(memoryview(frame), len(view), 2) == view


def test_planes_pay_on_floats():
    """Bell-shaped bfloat16: interleaved with mantissas, exponents compress less."""
    payload = (np.random.default_rng(0).normal(size=1 << 18).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    assert len(compress(payload, 2)) < 0.95 * len(compress(payload, 1))


def frame_of(payload, **options):
    return zstandard.ZstdCompressor(level=1, **options).compress(payload)


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = frame_of(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TransferError, match="claims 268435456 bytes"):
        decompress(bomb, 1024, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 14, "KiB"


def test_a_bomb_that_claims_the_expected_size_is_refused():
    bomb, claimed = bytearray(frame_of(bytes(1 << 24))), 1 << 20
    # Behind magic, descriptor and window: the content's size, 4 bytes.
    assert zstandard.get_frame_parameters(bytes(bomb)).content_size == int.from_bytes(bomb[6:10], "little")
    bomb[6:10] = claimed.to_bytes(4, "little")
    assert zstandard.get_frame_parameters(bytes(bomb)).content_size == claimed
    with pytest.raises(TransferError, match=f"for {claimed}"):
        decompress(bytes(bomb), claimed, 1)


def test_a_frame_that_hides_its_size_or_asks_for_a_large_window_is_refused():
    with pytest.raises(TransferError, match="expected 4096 bytes"):
        decompress(frame_of(bytes(4096), write_content_size=False), 4096, 1)
    compressor = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=27)).compressobj(size=4096)
    frame = bytearray(compressor.compress(bytes(4096)) + compressor.flush())
    # Not one segment, but a window of its own: descriptor without the flag, then 2^27 bytes as exponent 17.
    assert frame[4] & 0x20
    frame[4] &= ~0x20
    frame[5:5] = bytes([17 << 3])
    assert zstandard.get_frame_parameters(bytes(frame)).window_size == 1 << 27
    with pytest.raises(TransferError, match="window of 134217728"):
        decompress(bytes(frame), 4096, 1)


@given(st.binary(max_size=64), st.integers(0, 64))
def test_garbage_is_an_error_and_never_a_crash(frame, nbytes):
    with pytest.raises(TransferError):
        decompress(frame, nbytes + 1, 1)


@given(st.data())
def test_a_damaged_frame_never_gives_another_length(data):
    payload = bytes(range(256)) * 4
    frame = bytearray(compress(payload, 2))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(TransferError):
        assert len(decompress(bytes(frame), len(payload), 2)) == len(payload)


@pytest.mark.parametrize("cut", [0, 3, 5, 12, -1])
def test_truncated_or_followed_by_more(cut):
    frame = compress(bytes(range(256)) * 4, 2)
    with pytest.raises(TransferError):
        decompress(frame[:cut], 1024, 2)
    with pytest.raises(TransferError):
        decompress(frame + b"x", 1024, 2)
    with pytest.raises(TransferError):
        decompress(frame + frame, 1024, 2)


def test_sizes_that_no_message_has():
    with pytest.raises(InvalidInput, match="payload bytes"):
        compress(bytes(MAX_MESSAGE_BYTES + 1), 1)
    with pytest.raises(InvalidInput, match="nbytes"):
        decompress(b"", MAX_MESSAGE_BYTES + 1, 1)
    with pytest.raises(InvalidInput, match="item_bytes"):
        compress(b"x", 0)

"""Transfers over a link that breaks: a transfer is either complete and right, or an error in bounded time."""

import time

import grpc
import pytest
from transfer_fixtures import Cache, Sender, Sink, pull, wait_until, wide_spec

from prfaas_jax.errors import TransferError
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.channel import CHANNEL_OPTIONS
from prfaas_jax.transfer.lane import METHOD
from prfaas_jax.transfer.wire import FetchRequest

# What CHANNEL_OPTIONS are by default; the suite asks for patience.
QUICK_PINGS = tuple((dict(CHANNEL_OPTIONS) | {"grpc.keepalive_timeout_ms": 1500, "grpc.http2.ping_timeout_ms": 1500}).items())

SPEC = wide_spec(2)
LENGTH = 512  # 4 MiB
KEYS = {"chunk": 64, "shards": 2}


@pytest.fixture(scope="module")
def sender():
    with Sender(SPEC, message_bytes=1 << 18) as sender:
        yield sender


@pytest.fixture(scope="module")
def cache():
    return Cache(SPEC, LENGTH)


def test_wan_link_of_20_ms_carries_every_byte(sender, cache):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address, gbps=1, rtt_ms=20) as relay:
        counters = pull(ticket, SPEC, LENGTH, [relay.address], sink).finish(SPEC.bytes(LENGTH))
    assert counters.moved == SPEC.bytes(LENGTH)
    assert counters.resent == 0
    sink.check(cache)


def test_slow_link_is_not_mistaken_for_a_dead_peer(sender, cache):
    """Pings queue behind data in the socket buffers, 2.4 s of it here: a ping timeout below that kills a healthy transfer."""
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address, gbps=0.014, rtt_ms=20) as relay:
        started = time.monotonic()
        pull(ticket, SPEC, LENGTH, [relay.address], sink).finish(SPEC.bytes(LENGTH))
        assert time.monotonic() - started > 2
    sink.check(cache)


# Offsets in frame headers, in message headers, in payloads, and in the last bytes.
@pytest.mark.parametrize("offset", [5, 30, 100, 150, 10_000, 300_000, 2_000_001, 4_190_000])
def test_flipped_byte_is_an_error_and_never_a_wrong_byte(sender, cache, offset):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address) as relay:
        relay.flip_byte_after(offset)
        puller = pull(ticket, SPEC, LENGTH, [relay.address], sink, idle_s=2)
        try:
            puller.finish(SPEC.bytes(LENGTH))
        except TransferError:
            return
    # Some bytes of HTTP/2 carry nothing that matters (a reserved bit, a ping's payload): then every byte must be right.
    assert offset < 200
    sink.check(cache)


def test_flipped_payload_byte_is_found_by_the_checksum(sender, cache):
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address) as relay:
        relay.flip_byte_after(1_000_000)
        with pytest.raises(TransferError, match="checksum"):
            pull(ticket, SPEC, LENGTH, [relay.address], Sink(SPEC, LENGTH)).finish(SPEC.bytes(LENGTH))


@pytest.mark.parametrize("nbytes", [2_000, 262_144, 3_000_001, 4_194_304])
def test_reset_in_mid_stream_is_a_transfer_error(sender, cache, nbytes):
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address) as relay:
        relay.reset_after(nbytes)
        started = time.monotonic()
        with pytest.raises(TransferError, match="UNAVAILABLE"):
            pull(ticket, SPEC, LENGTH, [relay.address], Sink(SPEC, LENGTH)).finish(SPEC.bytes(LENGTH))
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("nbytes", [0, 1, 9, 40, 200])
def test_reset_before_the_first_message_is_an_error_or_a_clean_second_try(sender, cache, nbytes):
    """gRPC itself tries again when the server cannot have seen the request; nothing may be written twice then."""
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address) as relay:
        relay.reset_after(nbytes)
        puller = pull(ticket, SPEC, LENGTH, [relay.address], sink, idle_s=2)
        try:
            counters = puller.finish(SPEC.bytes(LENGTH))
        except TransferError:
            return
    assert counters.resent == 0
    sink.check(cache)


def test_half_closed_connection_is_a_transfer_error(sender, cache):
    ticket = sender.send(cache, cache.keys(**KEYS), finish=False)
    with Relay(sender.lane.address, gbps=0.05) as relay:
        puller = pull(ticket, SPEC, LENGTH, [relay.address], Sink(SPEC, LENGTH))
        wait_until(lambda: relay.passed() >= 100_000)
        relay.half_close()
        with pytest.raises(TransferError):
            puller.finish(SPEC.bytes(LENGTH))


@pytest.mark.parametrize("after", [0, 100_000])
def test_endless_wait_black_hole_ends_by_the_idle_timer(sender, cache, after):
    """Class C: before the first byte and in the middle; cancelling a lane that hangs takes no longer."""
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address, gbps=0.05) as relay:
        if not after:
            relay.black_hole()
        puller = pull(ticket, SPEC, LENGTH, [relay.address], Sink(SPEC, LENGTH), idle_s=0.6)
        wait_until(lambda: relay.passed() >= after)
        relay.black_hole()
        started = time.monotonic()
        with pytest.raises(TransferError, match="no progress"):
            puller.finish(SPEC.bytes(LENGTH))
        assert time.monotonic() - started < 2


def test_frozen_peer_is_seen_by_the_ping_timeout_of_the_control_plane(sender):
    """Keepalive alone would take a minute."""
    ticket = sender.outbox.open(8)
    with Relay(sender.lane.address) as relay, grpc.insecure_channel(relay.address, QUICK_PINGS) as channel:
        call = channel.unary_stream(METHOD)(FetchRequest(ticket.id, ticket.epoch).encode(), timeout=30)
        wait_until(lambda: sender.lane.streams == 1)
        relay.black_hole()
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as raised:
            next(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 4
    sender.outbox.release(ticket.id, ticket.epoch)


def test_black_hole_of_a_second_is_ridden_out(sender, cache):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address, gbps=0.1) as relay:
        puller = pull(ticket, SPEC, LENGTH, [relay.address], sink)
        wait_until(lambda: relay.passed() >= 200_000)
        relay.black_hole(1.0)
        puller.finish(SPEC.bytes(LENGTH))
    sink.check(cache)

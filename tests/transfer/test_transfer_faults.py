"""Transfers over a link that breaks: what can go on goes on and is complete and right, the rest is an error in bounded time."""

import queue
import time

import grpc
import pytest
from transfer_fixtures import Cache, Pull, Sender, Sink, pull, wait_until, wide_spec

from prfaas_jax.errors import TransferError
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer import frames
from prfaas_jax.transfer.channel import CHANNEL_OPTIONS
from prfaas_jax.transfer.lane import METHOD
from prfaas_jax.transfer.lanes import LaneGroup

# What CHANNEL_OPTIONS are by default; the suite asks for patience.
QUICK_PINGS = tuple((dict(CHANNEL_OPTIONS) | {"grpc.keepalive_timeout_ms": 1500, "grpc.http2.ping_timeout_ms": 1500}).items())

SPEC = wide_spec(2)
LENGTH = 512  # 4 MiB
KEYS = {"chunk": 64, "shards": 2}
# No link here has a larger one.
WINDOW_BYTES = 5 << 19


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
def test_flipped_byte_is_asked_for_again_and_never_a_wrong_byte(sender, cache, offset):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address) as relay:
        relay.flip_byte_after(offset)
        counters = pull(ticket, SPEC, LENGTH, [relay.address], sink, idle_s=5).finish(SPEC.bytes(LENGTH))
    assert counters.moved == SPEC.bytes(LENGTH)
    sink.check(cache)


def test_flipped_payload_byte_is_found_by_the_checksum_and_costs_at_most_a_window(sender, cache):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address, gbps=1) as relay:
        relay.flip_byte_after(1_000_000)
        counters = pull(ticket, SPEC, LENGTH, [relay.address], sink).finish(SPEC.bytes(LENGTH))
    sink.check(cache)
    assert 0 < counters.resent <= WINDOW_BYTES
    assert counters.wire == counters.moved, "what was corrupt does not count as having come"


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("nbytes", [0, 1, 9, 40, 200, 2_000, 262_144, 262_145, 3_000_001, 4_194_304])
def test_reset_at_any_byte_is_resumed_over_a_new_connection(sender, cache, nbytes, direction):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address) as relay:
        relay.reset_after(nbytes, direction)
        started = time.monotonic()
        counters = pull(ticket, SPEC, LENGTH, [relay.address], sink, idle_s=5).finish(SPEC.bytes(LENGTH))
        assert time.monotonic() - started < 3
    assert counters.moved == SPEC.bytes(LENGTH)
    assert counters.resent <= WINDOW_BYTES
    sink.check(cache)


@pytest.mark.parametrize("lanes", [1, 3])
def test_many_resets_lose_nothing(sender, cache, lanes):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address, gbps=0.05, rtt_ms=5) as relay:
        puller = pull(ticket, SPEC, LENGTH, [relay.address], sink, lanes=lanes)
        for at in range(10, 100, 15):
            wait_until(lambda at=at: relay.passed() >= at * SPEC.bytes(LENGTH) // 100)
            relay.reset()
        counters = puller.finish(SPEC.bytes(LENGTH))
    assert counters.moved == SPEC.bytes(LENGTH)
    assert 0 < counters.resent <= 7 * WINDOW_BYTES
    sink.check(cache)


def test_half_closed_connection_is_resumed(sender, cache):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address, gbps=0.1) as relay:
        puller = pull(ticket, SPEC, LENGTH, [relay.address], sink)
        wait_until(lambda: relay.passed() >= 100_000)
        relay.half_close()
        puller.finish(SPEC.bytes(LENGTH))
    sink.check(cache)


def test_a_sender_that_is_gone_is_seen_at_once(sender, cache):
    with Sender(SPEC) as mortal:
        ticket = mortal.send(cache, cache.keys(**KEYS)[:4], finish=False)
        sink = Sink(SPEC, LENGTH)
        puller = pull(ticket, SPEC, LENGTH, [mortal.lane.address], sink)
        wait_until(lambda: sink.blocks)
        mortal.lane.stop(0)
        started = time.monotonic()
        with pytest.raises(TransferError, match="UNAVAILABLE"):
            puller.finish(SPEC.bytes(LENGTH))
        assert time.monotonic() - started < 0.5


def test_another_sender_of_the_same_cache_goes_on_with_what_is_missing(sender, cache):
    sink = Sink(SPEC, LENGTH)
    keys = cache.keys(**KEYS)
    with Sender(SPEC, message_bytes=1 << 18) as first, Sender(SPEC) as second:
        ticket = first.send(cache, keys[: len(keys) // 2], finish=False)
        running = pull(ticket, SPEC, LENGTH, [first.lane.address], sink)
        wait_until(lambda: sink.blocks == len(keys) // 4)  # two head slices a block
        first.lane.stop(0)
        with pytest.raises(TransferError):
            running.finish(SPEC.bytes(LENGTH))
        ticket = second.send(cache, keys)
        resumed = Pull(ticket, running.puller, [LaneGroup(second.lane.address)])
        counters = resumed.finish(SPEC.bytes(LENGTH))
    sink.check(cache)
    assert (counters.moved, counters.resent) == (SPEC.bytes(LENGTH), 0)
    assert counters.wire == SPEC.bytes(LENGTH)


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
    with Relay(sender.lane.address) as relay, grpc.insecure_channel(relay.address, QUICK_PINGS) as channel:
        said: queue.SimpleQueue = queue.SimpleQueue()
        said.put(frames.encode(frames.Hello(b"f" * 16, 1)))
        call = channel.stream_stream(METHOD)(iter(said.get, None), timeout=30)
        wait_until(lambda: relay.passed("up") > 100)
        relay.black_hole()
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as raised:
            next(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 4
        said.put(None)


def test_black_hole_of_a_second_is_ridden_out(sender, cache):
    sink = Sink(SPEC, LENGTH)
    ticket = sender.send(cache, cache.keys(**KEYS))
    with Relay(sender.lane.address, gbps=0.1) as relay:
        puller = pull(ticket, SPEC, LENGTH, [relay.address], sink)
        wait_until(lambda: relay.passed() >= 200_000)
        relay.black_hole(1.0)
        puller.finish(SPEC.bytes(LENGTH))
    sink.check(cache)

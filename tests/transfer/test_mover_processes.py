"""Lanes that begin and end in processes of their own: what they carry, and what it costs."""

import random
import socket
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fixtures import SPEC, Cache, Movers, Pull, Sink, wait_until, wide_spec

from prfaas_jax.errors import Exhausted, InvalidInput, TransferError
from prfaas_jax.kvcache.segments import Segment
from prfaas_jax.testing.certificates import CertificateOptions, make_certificates
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.puller import Puller
from prfaas_jax.transfer.receivers import Receivers
from prfaas_jax.transfer.senders import SharedOutbox
from prfaas_jax.transfer.shared_memory import Regions, SharedMemory

WIDE, LENGTH = wide_spec(2), 512  # 4 MiB


@pytest.fixture(scope="module")
def movers():
    with Movers(SPEC, message_bytes=97) as movers:
        yield movers
        wait_until(lambda: movers.regions_taken() == 0)


@pytest.fixture(scope="module")
def wide_movers():
    with Movers(WIDE) as movers:
        yield movers


@settings(max_examples=25, deadline=None)
@given(length=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_any_cut_arrives_over_two_processes_on_each_side(movers, length, seed):
    cache = Cache(SPEC, length, seed)
    keys = cache.random_keys(random.Random(seed)) if length else []
    counters = movers.fetch(movers.send(cache, keys), cache)
    assert (counters.moved, counters.resent) == (SPEC.bytes(length), 0)


def test_sender_processes_and_lanes_that_end_here():
    with Movers(WIDE, senders=3, receivers=0) as movers:
        cache = Cache(WIDE, LENGTH)
        ticket = movers.send(cache, cache.keys(64, shards=2))
        assert sorted(movers.outbox.shares(ticket).result(5)) == [0, 1, 2]
        loads = movers.outbox._shares[ticket.id].loads.values()
        assert min(loads) > 0.9 * max(loads) - 64 * 2048, "shares are even"
        movers.fetch(ticket, cache)


def test_blocks_arrive_while_prefill_goes_on(movers):
    cache, sink = Cache(SPEC, 24), Sink(SPEC, 24)
    ticket = movers.send(cache, [], finish=False)
    pull = movers.pull(ticket, SPEC, 24, sink)
    for i, key in enumerate(cache.keys(8), 1):
        movers.outbox.put(ticket, cache.segment(key))
        wait_until(lambda i=i: sink.blocks == i)
    assert pull.finish(SPEC.bytes(24)).moved == SPEC.bytes(24)
    sink.check(cache)
    movers.outbox.release(ticket.id, ticket.epoch)


def test_payloads_may_change_once_put_has_returned(movers):
    cache = Cache(SPEC, 24)
    ticket = movers.outbox.open(24)
    for key in cache.keys(8):
        payload = bytearray(cache.segment(key).payload.cast("B"))
        movers.outbox.put(ticket, Segment(key, memoryview(payload)))
        payload[:] = bytes(len(payload))
    movers.outbox.finish(ticket)
    movers.fetch(ticket, cache)


def test_compressed_and_unchecked_payloads(wide_movers):
    cache = Cache(WIDE, LENGTH)
    for array in cache.tensors.values():
        array[:] = 7
    counters = wide_movers.fetch(wide_movers.send(cache, cache.keys(64)), cache, checked=False, compressed=True)
    assert counters.wire < counters.moved / 50


def test_delta_skips_the_prefix(movers):
    cache, sink = Cache(SPEC, 40), Sink(SPEC, 40)
    ticket = movers.outbox.open(40, prefix=16)
    held = [key for key in cache.keys(8) if key.tokens[1] > 16]
    for key in held:
        movers.outbox.put(ticket, cache.segment(key))
    movers.outbox.finish(ticket)
    counters = movers.pull(ticket, SPEC, 40, sink, prefix=16).finish(SPEC.bytes(40, 16))
    assert (counters.moved, counters.skipped) == (SPEC.bytes(40, 16), SPEC.bytes(40) - SPEC.bytes(40, 16))
    movers.outbox.release(ticket.id, ticket.epoch)


def test_stale_bytes_never_reach_a_block_that_is_still_read(wide_movers):
    """Class A: a slot is used again only once nobody refers to the block in it, whatever `done` says."""
    first, kept = Cache(WIDE, LENGTH, 1), []

    def keep(key, block, done):
        if not block.flags.writeable:  # else it was put together in a buffer, which is used again
            kept.append((key, block))
        done()

    ticket = wide_movers.send(first, first.keys(16, layer_step=1))
    wide_movers.pull(ticket, WIDE, LENGTH, keep).finish(WIDE.bytes(LENGTH))
    wide_movers.outbox.release(ticket.id, ticket.epoch)
    for seed in (2, 3):
        cache = Cache(WIDE, LENGTH, seed)
        wide_movers.fetch(wide_movers.send(cache, cache.keys(16, layer_step=1)), cache)
    assert kept
    for key, block in kept:
        np.testing.assert_array_equal(block, first.tensors[key.group, key.tensor][first.place(key)])


def test_lease_expired_while_sending_gives_an_error_and_never_anothers_bytes():
    """Class B: a region is not written again while a sender process may read it."""
    now, length = [0.0], 4 * LENGTH  # more than what may be in flight
    with Movers(WIDE, capacity=WIDE.bytes(length), clock=lambda: now[0], lease_s=10.0) as movers:
        cache, sink = Cache(WIDE, length, 1), Sink(WIDE, length)
        ticket = movers.send(cache, cache.keys(64))
        (a, b) = movers.outbox.shares(ticket).result(5).values()
        with Relay(a, gbps=0.01) as slow_a, Relay(b, gbps=0.01) as slow_b:
            pull = movers.pull(ticket, WIDE, length, sink, [slow_a.address, slow_b.address])
            wait_until(lambda: sink.blocks > 0, 20)
            now[0] = 100.0
            assert movers.outbox.sweep() == (ticket,)
            assert movers.outbox.bytes_held == 0
            other = Cache(WIDE, length, 2)
            following = movers.send(other, other.keys(64))
            with pytest.raises(TransferError, match="unknown"):
                pull.finish(WIDE.bytes(length))
        for at, array in cache.tensors.items():
            written = sink.written[at] == 1
            np.testing.assert_array_equal(sink.cache.tensors[at].view(np.uint16)[written], array.view(np.uint16)[written])
        movers.fetch(following, other)


def test_progress_in_the_processes_extends_the_lease():
    with Movers(WIDE, lease_s=1.5, senders=1) as movers:
        cache, sink = Cache(WIDE, LENGTH), Sink(WIDE, LENGTH)
        ticket = movers.send(cache, cache.keys(64))
        (address,) = movers.outbox.shares(ticket).result(5).values()
        with Relay(address, gbps=0.01) as relay:  # 3.4 s
            pull = movers.pull(ticket, WIDE, LENGTH, sink, [relay.address])
            done = threading.Event()
            threading.Thread(target=lambda: (pull.finish(WIDE.bytes(LENGTH)), done.set()), daemon=True).start()
            while not done.wait(0.1):
                assert movers.outbox.sweep() == ()
        sink.check(cache)
        wait_until(lambda: movers.outbox.sweep() == (ticket,), 5)


def test_ports_follow_each_other_and_one_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransferError, match=f"sender process 0 did not start.*lane_address.*{port}"):
            Movers(SPEC, senders=1, receivers=0, address=f"127.0.0.1:{port}").__enter__()
    with Movers(SPEC, senders=2, receivers=0, address=f"127.0.0.1:{port}") as movers:
        assert movers.outbox.addresses == (f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}")


@pytest.mark.parametrize("processes", [0, -1, 65])
def test_bad_numbers_of_processes_are_refused(processes):
    with pytest.raises(InvalidInput, match="processes"):
        SharedOutbox(SPEC, 1 << 20, processes=processes, message_bytes=97)
    with pytest.raises(InvalidInput, match="processes"):
        Receivers(processes)


def test_tls_and_token_hold_in_the_processes(tmp_path):
    certificates = CertificateOptions(str(tmp_path / "certificates"))
    make_certificates(certificates)
    security = certificates.security("prefill")
    cache = Cache(SPEC, 24)
    with Movers(SPEC, senders=1, receivers=1, security=security) as movers:
        movers.fetch(movers.send(cache, cache.keys(8)), cache)
        plain = Receivers(1)
        plain.start()
        try:
            ticket = movers.send(cache, cache.keys(8))
            group = plain.connect(movers.outbox.addresses[0], probe=False)
            pull = Pull(ticket, Puller(SPEC, 24, Sink(SPEC, 24)), [group])
            with pytest.raises(TransferError):
                pull.finish(SPEC.bytes(24))
        finally:
            plain.close()


def test_regions_are_used_again_and_spare_memory_is_bounded():
    memory = SharedMemory.create(1 << 30)
    regions = Regions(memory, 1 << 20)
    a, b = regions.take(1 << 20), regions.take(700_000)
    memory.view(a, 4)[:] = b"aaaa"
    memory.view(b, 4)[:] = b"bbbb"
    regions.give(a, 1 << 20)
    regions.give(b, 700_000)  # beyond what may be spare: its pages go back
    assert (bytes(memory.view(a, 4)), bytes(memory.view(b, 4))) == (b"aaaa", bytes(4))
    assert {regions.take(1 << 20), regions.take(1 << 20)} == {a, b} and regions.taken == 2
    for offset in (a, b):
        memory.view(offset, 4)[:] = b"cccc"
        regions.give(offset, 1 << 20)
    assert b"cccc" in (bytes(memory.view(a, 4)), bytes(memory.view(b, 4)))
    regions.trim(0.0)
    regions.trim(5.0)
    assert b"cccc" in (bytes(memory.view(a, 4)), bytes(memory.view(b, 4)))
    regions.trim(11.0)
    assert bytes(memory.view(a, 4)) == bytes(memory.view(b, 4)) == bytes(4) and regions.taken == 0
    assert {regions.take(1 << 20), regions.take(1 << 20)} == {a, b}
    with pytest.raises(Exhausted, match="shared memory"):
        regions.take(1 << 31)
    memory.close()


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 70])
def test_memory_that_cannot_be_is_refused(nbytes):
    with pytest.raises((InvalidInput, ValueError)):
        SharedMemory.create(nbytes)

"""LaneServer, LaneGroup and Puller end to end over loopback; tests of known bug classes carry the class in their name."""

import socket
import subprocess
import sys
import threading
import time

import grpc
import psutil
import pytest
from transfer_fixtures import SPEC, Cache, Sender, Sink, pull, wait_until, wide_spec

from prfaas_jax.errors import InvalidInput, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.counters import Counters
from prfaas_jax.transfer.lane import LaneServer
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.outbox import Outbox
from prfaas_jax.transfer.puller import Puller


@pytest.fixture(scope="module")
def sender():
    with Sender(SPEC, message_bytes=97) as sender:
        yield sender
    assert sender.lane.streams == 0


def test_blocks_arrive_while_prefill_goes_on(sender):
    cache, sink = Cache(SPEC, 24), Sink(SPEC, 24)
    ticket = sender.send(cache, [], finish=False)
    puller = pull(ticket, SPEC, 24, [sender.lane.address], sink)
    for i, key in enumerate(cache.keys(8), 1):
        sender.outbox.put(ticket, cache.segment(key))
        wait_until(lambda i=i: sink.blocks == i)
    # The last byte is here: finish does not wait for a stream whose end was never announced.
    assert puller.finish(SPEC.bytes(24)).moved == SPEC.bytes(24)
    sink.check(cache)


def test_tickets_two_transfers_at_once_do_not_mix(sender):
    """Class A."""
    caches = [Cache(SPEC, 60, seed) for seed in range(2)]
    sinks = [Sink(SPEC, 60) for _ in caches]
    tickets = [sender.send(cache, cache.keys(5, shards=2), finish=False) for cache in caches]
    pullers = [pull(t, SPEC, 60, [sender.lane.address], sink) for t, sink in zip(tickets, sinks, strict=True)]
    for ticket in tickets:
        sender.outbox.finish(ticket)
    for puller, sink, cache in zip(pullers, sinks, caches, strict=True):
        puller.finish(SPEC.bytes(60))
        sink.check(cache)


def test_repeated_messages_are_idempotent_and_counted(sender):
    """Two senders hold the same shard of one ticket: every byte is written once, the rest counts as resent."""
    cache, sink = Cache(SPEC, 40), Sink(SPEC, 40)
    ticket = sender.send(cache, cache.keys(8, shards=2))
    with Sender(SPEC, message_bytes=97) as twin:
        twin.outbox.open(40, ticket)
        for key in cache.keys(8, shards=2):
            twin.outbox.put(ticket, cache.segment(key))
        twin.outbox.finish(ticket)
        counters = pull(ticket, SPEC, 40, [sender.lane.address, twin.lane.address], sink).finish(SPEC.bytes(40))
    sink.check(cache)
    assert counters.moved == SPEC.bytes(40)
    assert counters.wire == counters.moved + counters.resent
    assert 0 <= counters.resent <= SPEC.bytes(40)


def test_endless_wait_zero_length_transfer_is_over_at_once():
    """Class C: a full prefix hit has nothing to move, and needs no lane to say so."""
    puller = Puller(SPEC, 0, Sink(SPEC, 0))
    puller.start(b"t" * 16, 1, [LaneGroup("127.0.0.1:1")])
    assert puller.finish(0) == Counters()


def test_endless_wait_silent_prefill_ends_by_the_idle_timer_and_touch_restarts_it(sender):
    """Class C: the first segment never comes."""
    ticket = sender.outbox.open(8)
    puller = pull(ticket, SPEC, 8, [sender.lane.address], Sink(SPEC, 8), idle_s=1.0)
    started = time.monotonic()
    for _ in range(6):
        time.sleep(0.25)
        puller.touch()
    with pytest.raises(TransferError, match=r"no progress.*group 0, tensor 0, layer 0: tokens \[0, 8\)"):
        puller.finish(SPEC.bytes(8))
    assert 2.4 < time.monotonic() - started < 4.5


def test_endless_wait_peer_restarted_with_a_stale_address():
    """Class C: nobody listens there any more."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(TransferError, match="UNAVAILABLE"):
        pull(Outbox(SPEC, 1 << 20).open(8), SPEC, 8, [f"127.0.0.1:{port}"], Sink(SPEC, 8)).finish(SPEC.bytes(8))


def test_endless_wait_reader_never_calls_done(sender):
    """Class C: all bytes are here and the engine does not take them."""
    cache = Cache(SPEC, 8)
    ticket = sender.send(cache, cache.keys(8))
    puller = pull(ticket, SPEC, 8, [sender.lane.address], lambda key, block, done: None, idle_s=0.3)
    with pytest.raises(TransferError, match="no progress"):
        puller.finish(SPEC.bytes(8))


def test_missing_segment_is_named(sender):
    cache = Cache(SPEC, 24)
    keys = cache.keys(8)
    ticket = sender.send(cache, keys[:3] + keys[4:])
    with pytest.raises(TransferError, match=r"group 0, tensor 0, layer 0: tokens \[8, 16\)"):
        pull(ticket, SPEC, 24, [sender.lane.address], Sink(SPEC, 24)).finish(SPEC.bytes(24))


def test_missing_head_slice_is_seen(sender):
    cache = Cache(SPEC, 8)
    ticket = sender.send(cache, cache.keys(8, shards=2)[1:])
    with pytest.raises(TransferError, match="never ended"):
        pull(ticket, SPEC, 8, [sender.lane.address], Sink(SPEC, 8)).finish(SPEC.bytes(8))


@pytest.mark.parametrize(
    "extra", [SegmentKey(0, 0, (0, 3), (4, 9), (0, 4)), SegmentKey(0, 0, (1, 2), (0, 8), (0, 4)), SegmentKey(0, 0, (0, 3), (0, 8), (1, 3))]
)
def test_overlapping_segments_are_refused(sender, extra):
    cache = Cache(SPEC, 16)
    ticket = sender.send(cache, [SegmentKey(0, 0, (0, 3), (0, 8), (0, 2)), extra])
    with pytest.raises(TransferError, match="overlaps"):
        pull(ticket, SPEC, 16, [sender.lane.address], Sink(SPEC, 16)).finish(SPEC.bytes(16))


def test_totals_that_differ_are_refused_at_once(sender):
    cache = Cache(SPEC, 8)
    ticket = sender.send(cache, cache.keys(8), finish=False)
    with pytest.raises(TransferError, match="sender exported"):
        pull(ticket, SPEC, 8, [sender.lane.address], lambda key, block, done: None).finish(SPEC.bytes(8) - 1)


def test_leases_stale_epoch_and_released_ticket_are_refused(sender):
    """Class B: no byte leaves for a reader that holds an old ticket."""
    cache, sink = Cache(SPEC, 8), Sink(SPEC, 8)
    ticket = sender.send(cache, cache.keys(8))
    with pytest.raises(TransferError, match=r"FAILED_PRECONDITION.*epoch"):
        pull(type(ticket)(ticket.id, ticket.epoch + 1), SPEC, 8, [sender.lane.address], sink).finish(SPEC.bytes(8))
    sender.outbox.release(ticket.id, ticket.epoch)
    with pytest.raises(TransferError, match="NOT_FOUND"):
        pull(ticket, SPEC, 8, [sender.lane.address], sink).finish(SPEC.bytes(8))
    assert sink.blocks == 0


def test_leases_ticket_that_dies_in_mid_stream_stops_the_reader(sender):
    """Class B: released under the reader's feet, the transfer fails; it never completes from what is left."""
    cache = Cache(SPEC, 16)
    ticket = sender.send(cache, cache.keys(8)[:2], finish=False)
    sink = Sink(SPEC, 16)
    puller = pull(ticket, SPEC, 16, [sender.lane.address], sink)
    wait_until(lambda: sink.blocks == 2)
    sender.outbox.release(ticket.id, ticket.epoch)
    with pytest.raises(TransferError, match="unknown"):
        puller.finish(SPEC.bytes(16))


def test_failed_prefill_reaches_the_reader_with_its_reason(sender):
    ticket = sender.outbox.open(8)
    puller = pull(ticket, SPEC, 8, [sender.lane.address], Sink(SPEC, 8))
    sender.outbox.fail(ticket, TransferError("engine broke"))
    with pytest.raises(TransferError, match=r"ABORTED.*engine broke"):
        puller.finish(SPEC.bytes(8))


def test_exception_in_on_block_fails_the_transfer(sender):
    cache = Cache(SPEC, 8)
    ticket = sender.send(cache, cache.keys(8))

    def broken(key, block, done):
        raise ZeroDivisionError("scatter")

    with pytest.raises(TransferError, match=r"ZeroDivisionError.*scatter"):
        pull(ticket, SPEC, 8, [sender.lane.address], broken).finish(SPEC.bytes(8))


def test_receive_limit_message_above_4_mib_is_not_read():
    """minimal_stack would switch the limit off, and an unlimited receiver is a memory hole."""
    from concurrent import futures

    server = grpc.server(futures.ThreadPoolExecutor(2))
    handler = grpc.stream_stream_rpc_method_handler(lambda requests, context: iter([bytes(8 << 20)]))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("prfaas.Lane", {"Stream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(TransferError, match="RESOURCE_EXHAUSTED"):
            pull(Outbox(SPEC, 1 << 20).open(8), SPEC, 8, [f"127.0.0.1:{port}"], Sink(SPEC, 8)).finish(SPEC.bytes(8))
    finally:
        server.stop(0).wait(5)


def corrupt(key, block, done):
    raise ValueError("no")


@pytest.mark.parametrize("end", ["complete", "complete early", "cancel", "refused", "broken callback", "idle", "overlap"])
def test_leaks_no_thread_connection_or_stream_is_left_however_a_transfer_ends(sender, end):
    """Class F. A stream that is cancelled and not read to its status keeps its sockets for ever."""
    me, cache = psutil.Process(), Cache(SPEC, 8)

    def once():
        keys = [] if end in ("cancel", "idle") else cache.keys(8)[:1] * 2 if end == "overlap" else cache.keys(8)
        ticket = sender.send(cache, keys, finish=end == "complete")
        if end == "refused":
            sender.outbox.release(ticket.id, ticket.epoch)
        idle_s, on_block = (0.05 if end == "idle" else 10), (corrupt if end == "broken callback" else Sink(SPEC, 8))
        length = 7 if end == "overlap" else 8
        puller = pull(ticket, SPEC, length, [sender.lane.address], on_block, lanes=2, idle_s=idle_s)
        if end == "cancel":
            wait_until(lambda: sender.lane.streams == 2)
            started = time.monotonic()
            puller.cancel()
            assert time.monotonic() - started < 2
        if end.startswith("complete"):
            puller.finish(SPEC.bytes(8))
        else:
            with pytest.raises(TransferError, match="cancelled" if end == "cancel" else None):
                puller.finish(SPEC.bytes(length))
        assert not [t for t in threading.enumerate() if t.name.startswith("lane 127") or t.name.startswith("lanes")]
        wait_until(lambda: sender.lane.streams == 0)
        sender.outbox.release(ticket.id, ticket.epoch)

    once()  # gRPC keeps a few descriptors of its own from its first call on
    before = me.num_fds()
    for _ in range(5):
        once()
    # Five times two lanes would leave twenty sockets; the server's end of the last ones may close a little later.
    wait_until(lambda: me.num_fds() <= before)


def test_leaks_refusals_on_a_busy_machine_leave_no_connection(sender):
    """Class F. The status of a refused stream may overtake the event that says its request was sent; both must be read."""
    me, cache = psutil.Process(), Cache(SPEC, 8)

    def refused():
        ticket = sender.send(cache, [], finish=False)
        sender.outbox.release(ticket.id, ticket.epoch)
        with pytest.raises(TransferError, match="unknown"):
            pull(ticket, SPEC, 8, [sender.lane.address], Sink(SPEC, 8), lanes=2).finish(SPEC.bytes(8))

    refused()
    before = me.num_fds()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for _ in range(80):
            refused()
    finally:
        for process in busy:
            process.kill()
            process.wait(5)
    wait_until(lambda: me.num_fds() <= before)


def test_leaks_cancel_from_inside_on_block_does_not_deadlock(sender):
    cache = Cache(SPEC, 8)
    ticket = sender.send(cache, cache.keys(8))
    puller = None
    begun = threading.Event()

    def on_block(key, block, done):
        begun.wait(5)
        puller.cancel()

    puller = pull(ticket, SPEC, 8, [sender.lane.address], on_block)
    begun.set()
    with pytest.raises(TransferError, match="cancelled"):
        puller.finish(SPEC.bytes(8))


def test_backpressure_slow_reader_bounds_staging_and_loses_nothing():
    """Class G: one slow request holds back its own sender and takes no memory from others."""
    spec, length = wide_spec(), 1024  # 16 MiB
    cache, sink = Cache(spec, length), Sink(spec, length)
    peak = 0
    taken: list = []
    with Sender(spec) as sender:
        ticket = sender.send(cache, cache.keys(64, shards=2))  # blocks of 512 KiB
        puller = pull(ticket, spec, length, [sender.lane.address], lambda *block: taken.append(block), max_staging_bytes=1 << 20)
        finisher = threading.Thread(target=lambda: puller.finish(spec.bytes(length)))
        finisher.start()
        while finisher.is_alive():
            peak = max(peak, puller.staging_bytes)
            assert len(taken) <= 2
            if taken:
                sink(*taken.pop(0))
            time.sleep(0.002)
    sink.check(cache)
    assert 0 < peak <= 1 << 20


def test_backpressure_reader_that_takes_nothing_ends_the_transfer_even_if_touched():
    spec, length = wide_spec(), 1024
    cache = Cache(spec, length)
    with Sender(spec) as sender:
        ticket = sender.send(cache, cache.keys(64))
        puller = pull(ticket, spec, length, [sender.lane.address], lambda *block: None, idle_s=0.5, max_staging_bytes=1 << 20)
        stop = threading.Event()

        def beat():
            while not stop.wait(0.1):
                puller.touch()

        thread = threading.Thread(target=beat)
        thread.start()
        with pytest.raises(TransferError, match="staging full"):
            puller.finish(spec.bytes(length))
        stop.set()
        thread.join(5)


def test_block_above_the_whole_staging_is_refused(sender):
    cache = Cache(SPEC, 24)
    ticket = sender.send(cache, cache.keys(24))
    with pytest.raises(TransferError, match="staging"):
        pull(ticket, SPEC, 24, [sender.lane.address], Sink(SPEC, 24), max_staging_bytes=100).finish(SPEC.bytes(24))


def test_too_many_streams_are_refused_and_running_ones_go_on():
    with Sender(SPEC, max_streams=1) as sender:
        cache, sink = Cache(SPEC, 8), Sink(SPEC, 8)
        ticket = sender.send(cache, [], finish=False)
        running = pull(ticket, SPEC, 8, [sender.lane.address], sink)
        wait_until(lambda: sender.lane.streams == 1)
        with pytest.raises(TransferError, match="RESOURCE_EXHAUSTED"):
            pull(ticket, SPEC, 8, [sender.lane.address], Sink(SPEC, 8)).finish(SPEC.bytes(8))
        for key in cache.keys(8):
            sender.outbox.put(ticket, cache.segment(key))
        running.finish(SPEC.bytes(8))
        sink.check(cache)


def test_stop_lets_running_streams_finish_in_the_grace_time():
    cache, sink = Cache(SPEC, 8), Sink(SPEC, 8)
    with Sender(SPEC) as sender:
        ticket = sender.send(cache, [], finish=False)
        puller = pull(ticket, SPEC, 8, [sender.lane.address], sink)
        wait_until(lambda: sender.lane.streams == 1)
        stopper = threading.Thread(target=sender.lane.stop, args=(5.0,))
        stopper.start()
        for key in cache.keys(8):
            sender.outbox.put(ticket, cache.segment(key))
        sender.outbox.finish(ticket)
        puller.finish(SPEC.bytes(8))
        stopper.join(5)
        assert not stopper.is_alive()
    sink.check(cache)


def test_port_in_use_is_a_clear_error(sender):
    with pytest.raises(InvalidInput, match="lane_address"):
        LaneServer(sender.outbox, sender.lane.address)
    with pytest.raises(InvalidInput, match="lane_address"):
        LaneServer(sender.outbox, "nonsense")


def test_bad_settings_are_named(sender):
    group = LaneGroup("127.0.0.1:1")

    def make(spec=SPEC, length=1, ticket=b"t" * 16, epoch=1, groups=(group,), **kwargs):
        Puller(spec, length, lambda *_: None, **kwargs).start(ticket, epoch, groups)

    integers = CacheSpec((CacheGroup(LayerCache("window", (TensorSpec("k", 1, 1, "int8"),), 8), (0,)),))
    for field, kwargs in {
        "dtype": {"spec": integers},
        "length": {"length": -1},
        "prefix": {"prefix": 2},
        "lanes": {"groups": []},
        "ticket": {"ticket": b"short"},
        "epoch": {"epoch": -1},
        "idle_s": {"idle_s": 0},
        "max_staging_bytes": {"max_staging_bytes": 0},
    }.items():
        with pytest.raises(InvalidInput, match=field):
            make(**kwargs)
    for field, kwargs in {
        "message_bytes": {"message_bytes": 0},
        "bytes_per_s": {"bytes_per_s": 0},
        "max_streams": {"max_streams": 0},
    }.items():
        with pytest.raises(InvalidInput, match=field):
            LaneServer(sender.outbox, **kwargs)
    for field, kwargs in {"lanes": {"lanes": 0}, "dead_s": {"dead_s": 0}}.items():
        with pytest.raises(InvalidInput, match=field):
            LaneGroup("127.0.0.1:1", **kwargs)


def test_counters_refuse_what_does_not_add_up():
    total = SPEC.bytes(8)
    Counters(moved=total).check(SPEC, 8)
    Counters(moved=total - 8, skipped=8, resent=99).check(SPEC, 8)
    for wrong in (Counters(moved=total - 1), Counters(moved=total, skipped=1), Counters(moved=total, recomputed_tokens=1)):
        with pytest.raises(TransferError):
            wrong.check(SPEC, 8)


def test_a_cancelled_transfer_does_not_spoil_the_links_estimate():
    """Its stragglers promise more, which never comes: the silence after them is not the link's pace."""
    spec = wide_spec(2)
    cache = Cache(spec, 4096)
    with Sender(spec) as sender, Relay(sender.lane.address, gbps=0.4) as relay:
        group = LaneGroup(relay.address, 1, probe=False)
        try:
            ticket = sender.send(cache, cache.keys(64))
            sink = Sink(spec, 4096)
            puller = Puller(spec, 4096, sink)
            puller.start(ticket.id, ticket.epoch, [group])
            wait_until(lambda: sink.blocks > 30, 20)
            puller.cancel()
            time.sleep(1.5)
            rate = group.estimate().bytes_per_s
            assert rate > 0.5 * 0.05e9, f"{rate:.3g} bytes/s on a link of 5e7"
        finally:
            group.close()


def test_an_idle_link_is_probed_even_where_it_is_slow():
    """A probe of one piece has no time between its arrivals: a rate that is wrong once would stay so."""
    with Sender(SPEC) as sender, Relay(sender.lane.address, gbps=0.004) as relay:
        group = LaneGroup(relay.address, 1)
        try:
            assert group.warm(20.0)
            relay.set_link(0.04)
            wait_until(lambda: group.estimate().bytes_per_s > 0.5 * 0.04e9 / 8, 10.0)
        finally:
            group.close()

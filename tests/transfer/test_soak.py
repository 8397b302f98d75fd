"""Many transfers that are cut, cancelled and finished at random over lanes that they share: nothing is left, nothing is wrong."""

import gc
import random
import threading

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer_fixtures import SPEC, Cache, LaneWire, Sender, Sink, wait_until

from prfaas_jax.errors import TransferError
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer import frames
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.puller import Puller


def soak(transfers: int, seed: int) -> dict[str, int]:
    """Transfers of every size, eight at a time, over two lanes of a link that is reset now and then; how each ended."""
    rng = random.Random(seed)
    ends = {"complete": 0, "cancelled": 0, "failed": 0}
    lock = threading.Lock()
    caches = [Cache(SPEC, length, length) for length in (0, 1, 7, 40, 200)]
    with Sender(SPEC, message_bytes=2000) as sender, Relay(sender.lane.address, seed=seed) as relay:
        group = LaneGroup(relay.address, 2, probe=False)

        def one(number: int) -> None:
            own = random.Random((seed, number).__hash__())
            cache = own.choice(caches)
            keys, sink = cache.keys(16, shards=own.choice([1, 2])), Sink(SPEC, cache.length)
            finished = own.random() < 0.9
            ticket = sender.send(cache, keys, finish=finished)
            puller = Puller(SPEC, cache.length, sink, idle_s=10.0)
            puller.start(ticket.id, ticket.epoch, [group])
            if own.random() < 0.3:
                own.choice([puller.cancel, lambda: sender.outbox.release(ticket.id, ticket.epoch)])()
            try:
                puller.finish(SPEC.bytes(cache.length))
                sink.check(cache)
                end = "complete"
            except TransferError as error:
                end = "cancelled" if "cancelled" in str(error) else "failed"
            sender.outbox.release(ticket.id, ticket.epoch)
            with lock:
                ends[end] += 1

        numbers = iter(range(transfers))

        def worker() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                one(number)
                if number % 50 == 25:
                    relay.reset()
                if number % 70 == 35:
                    relay.flip_byte_after(rng.randrange(3000))

        workers = [threading.Thread(target=worker) for _ in range(8)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join(300)
        assert not any(thread.is_alive() for thread in workers), "a transfer hangs"
        assert group.alive and not group.busy
        assert sender.outbox.bytes_held == 0 and not sender.outbox.tickets
        group.close()
        wait_until(lambda: sender.lane.streams == 0)
    assert sum(ends.values()) == transfers
    return ends


def check_nothing_is_left(transfers: int) -> None:
    me = psutil.Process()
    soak(100, seed=1)  # gRPC and the allocator keep what they once needed
    gc.collect()
    before = me.num_fds(), threading.active_count(), me.memory_info().rss
    ends = soak(transfers, seed=2)
    assert ends["complete"] > 0.6 * transfers and ends["cancelled"] > 0.05 * transfers
    gc.collect()
    wait_until(lambda: me.num_fds() <= before[0] + 2)
    wait_until(lambda: threading.active_count() <= before[1])
    assert me.memory_info().rss < before[2] + (64 << 20)


def test_leaks_three_hundred_transfers_with_cancels_and_cuts():
    """Classes A, F: every block that completes is right, and nothing stays behind."""
    check_nothing_is_left(300)


@pytest.mark.slow
def test_leaks_two_thousand_transfers_with_cancels_and_cuts():
    check_nothing_is_left(2000)


def test_a_server_that_has_stopped_has_no_threads():
    """Its pool had those of earlier streams for as long as anything referred to the server."""
    before = set(threading.enumerate())
    cache, sink = Cache(SPEC, 40), Sink(SPEC, 40)
    with Sender(SPEC) as sender:
        ticket, group, puller = sender.send(cache, cache.keys(8)), LaneGroup(sender.lane.address), Puller(SPEC, 40, sink)
        puller.start(ticket.id, ticket.epoch, [group])
        puller.finish(SPEC.bytes(40))
        group.close()
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert sender.lane.streams == 0


@pytest.fixture(scope="module")
def sender():
    with Sender(SPEC) as sender:
        yield sender
        # Whatever was said to it, it still serves.
        cache, sink = Cache(SPEC, 8), Sink(SPEC, 8)
        ticket = sender.send(cache, cache.keys(8))
        group, puller = LaneGroup(sender.lane.address), Puller(SPEC, 8, sink)
        puller.start(ticket.id, ticket.epoch, [group])
        puller.finish(SPEC.bytes(8))
        group.close()
        sink.check(cache)


u32 = st.integers(0, 2**32 - 1)
tickets = st.sampled_from([b"t" * 16, b"u" * 16])
said = st.one_of(
    st.builds(frames.Open, tickets, u32, st.integers(0, 2**64 - 1)),
    st.builds(frames.Grant, tickets, u32, st.integers(0, 2**64 - 1)),
    st.builds(frames.Ack, st.integers(0, 3)),
    st.builds(frames.Lost, u32, st.integers(0, 5)),
    st.builds(frames.Close, tickets, u32),
    st.builds(frames.Ping, u32, st.integers(0, 70_000)),
    st.builds(frames.End, tickets, u32),
    st.builds(frames.Pong, u32),
).map(frames.encode)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(said, st.binary(max_size=60)), max_size=8), st.binary(min_size=16, max_size=16))
def test_a_live_server_answers_any_frames_with_frames_or_a_status(sender, messages, session):
    with LaneWire(sender.lane.address) as lane:
        lane.say(frames.Hello(session, 1))
        for message in messages:
            lane.say_bytes(message)
        lane.hang_up()
        try:
            while True:
                lane.hear()
        except StopIteration:
            pass
        except grpc.RpcError as error:
            assert error.code().name in ("INVALID_ARGUMENT", "DATA_LOSS", "FAILED_PRECONDITION", "CANCELLED")
    wait_until(lambda: sender.lane.streams <= 2)

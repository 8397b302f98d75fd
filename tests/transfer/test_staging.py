"""Grants: whatever the staging holds and whoever sends, what has begun can end, and nobody sends beyond it."""

import contextlib
import itertools
import threading
import time

import pytest
from transfer_fixtures import Cache, Sender, Sink, pull, wait_until, wide_spec

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.puller import Puller

SPEC, TOKEN_BYTES = wide_spec(1), 2048  # of k, and of v


def keys_of(cuts: list[int], tensor_first: bool = False) -> list[SegmentKey]:
    """A segment of k and one of v for each range of tokens; by tensor, or range by range."""
    at = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    ranges = list(itertools.pairwise(at))
    if tensor_first:
        return [SegmentKey(0, tensor, (0, 1), tokens, (0, 8)) for tensor in (0, 1) for tokens in ranges]
    return [SegmentKey(0, tensor, (0, 1), tokens, (0, 8)) for tokens in ranges for tensor in (0, 1)]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("cuts", [[1024], [64, 1024], [100, 620, 620], [100, 920, 920], [100, 100, 100, 920, 100, 100, 100, 1000]])
def test_a_block_as_large_as_the_staging_comes_after_small_ones(cuts, lanes):
    """What was granted and not said would be what the large block waits for."""
    length = sum(cuts)
    cache, sink = Cache(SPEC, length), Sink(SPEC, length)
    with Sender(SPEC) as sender:
        ticket = sender.send(cache, keys_of(cuts, tensor_first=True))
        transfer = pull(ticket, SPEC, length, [sender.lane.address], sink, lanes, max_staging_bytes=1024 * TOKEN_BYTES, idle_s=5.0)
        transfer.finish(SPEC.bytes(length))
    sink.check(cache)


@pytest.mark.parametrize(
    ("first", "total", "staging", "senders", "waiting"),
    [
        pytest.param(8, 16, 512, 1, 0, id="more is here than may be staged"),
        pytest.param(4, 16, 512, 1, 8, id="the staging is full"),
        pytest.param(2, 16, 512, 2, 4, id="the staging is half full and two send"),
        pytest.param(4, 16, 512, 2, 8, id="the staging is full and two send"),
    ],
)
def test_resume_whatever_is_here_and_whatever_waits(first, total, staging, senders, waiting):
    """The first ticket brings some blocks and dies, of which some still wait for their reader when the second begins."""
    length = 64 * total
    cache, sink, keys = Cache(SPEC, length), Sink(SPEC, length), keys_of([64] * total)
    held: list = []
    sizes: list[int] = []

    def on_block(key, block, done):
        if len(held) < waiting:
            sink(key, block, lambda: None)
            held.append(done)
        else:
            sink(key, block, done)

    with contextlib.ExitStack() as stack:
        dying, *others = [stack.enter_context(Sender(SPEC)) for _ in range(1 + senders)]
        ticket = dying.send(cache, keys[: 2 * first], finish=False)
        puller = Puller(SPEC, length, on_block, max_staging_bytes=staging * TOKEN_BYTES, idle_s=5.0)
        group = LaneGroup(dying.lane.address, probe=False)
        stack.callback(group.close)
        puller.start(ticket.id, ticket.epoch, [group])
        wait_until(lambda: sink.blocks == 2 * first)
        dying.outbox.fail(ticket, TransferError("gone"))
        with pytest.raises(TransferError, match="gone"):
            puller.finish(SPEC.bytes(length))
        # Every other sender has a share of the whole.
        ticket = others[0].outbox.open(length)
        for other in others[1:]:
            other.outbox.open(length, ticket)
        for i, key in enumerate(keys):
            others[i % senders].outbox.put(ticket, cache.segment(key))
        for other in others:
            other.outbox.finish(ticket)
        claim = puller._assembly.claim

        def counted(header, payload):
            sizes.append(payload.nbytes)
            return claim(header, payload)

        puller._assembly.claim = counted  # type: ignore[method-assign]
        groups = [LaneGroup(other.lane.address, probe=False) for other in others]
        for group in groups:
            stack.callback(group.close)
        puller.start(ticket.id, ticket.epoch, groups)

        def release():
            time.sleep(0.3)
            for done in held:
                done()

        threading.Thread(target=release).start()
        counters = puller.finish(SPEC.bytes(length))
    sink.check(cache)
    assert counters.resent == 0
    assert len(sizes) < 4 * 2 * total, "in pieces of a sensible size"


def test_a_block_larger_than_a_senders_part_of_the_staging_is_an_error_at_once():
    length = 1200
    cache, keys = Cache(SPEC, length), keys_of([400] * 3)
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(Sender(SPEC)) for _ in range(3)]
        ticket = senders[0].outbox.open(length)
        for other in senders[1:]:
            other.outbox.open(length, ticket)
        for i, key in enumerate(keys):
            senders[i % 3].outbox.put(ticket, cache.segment(key))
        addresses = [sender.lane.address for sender in senders]
        transfer = pull(ticket, SPEC, length, addresses, Sink(SPEC, length), max_staging_bytes=1000 * TOKEN_BYTES)
        started = time.monotonic()
        with pytest.raises(TransferError, match="819200 bytes; each of 3 senders may have 682666 bytes, its part of max_staging_bytes"):
            transfer.finish(SPEC.bytes(length))
        assert time.monotonic() - started < 3


def test_a_block_that_could_not_be_handed_on_comes_again():
    """Otherwise a resumed transfer would be complete without it: KV that nobody ever wrote."""
    length = 256
    cache, sink, keys = Cache(SPEC, length), Sink(SPEC, length), keys_of([64] * 4)
    failures = iter([RuntimeError("engine trouble")])

    def on_block(key, block, done):
        if (failure := next(failures, None)) is not None:
            raise failure
        sink(key, block, done)

    with Sender(SPEC) as sender:
        ticket = sender.send(cache, keys)
        puller = Puller(SPEC, length, on_block, idle_s=5.0)
        groups = [LaneGroup(sender.lane.address, probe=False)]
        try:
            puller.start(ticket.id, ticket.epoch, groups)
            with pytest.raises(TransferError, match="engine trouble"):
                puller.finish(SPEC.bytes(length))
            ticket = sender.send(cache, keys)
            puller.start(ticket.id, ticket.epoch, groups)
            puller.finish(SPEC.bytes(length))
        finally:
            groups[0].close()
    sink.check(cache)
    assert puller.staging_bytes == 0

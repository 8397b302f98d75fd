"""Caches of every kind over real lanes, however the sender cuts them (bug class E): what stays arrives byte for byte, nothing else."""

import random

import pytest
from transfer_fixtures import SPEC, WINDOW, Cache, Sender, Sink, pull

from prfaas_jax.errors import InvalidInput, TransferError
from prfaas_jax.kvcache.segments import STATE_SEGMENT_BYTES, SegmentKey, layer_blocks
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.transfer.counters import Counters


@pytest.fixture(scope="module")
def sender():
    with Sender(SPEC, message_bytes=97) as sender:
        yield sender
    assert sender.lane.streams == 0


@pytest.mark.parametrize("seed", range(12))
def test_layout_every_cut_arrives_byte_for_byte(sender, seed):
    """Class E: whatever chunks, layer ranges and shard slices the sender has, in any order."""
    rng = random.Random(seed)
    cache = Cache(SPEC, rng.randint(1, 40), seed)
    keys = cache.random_keys(rng)
    rng.shuffle(keys)
    ticket, sink = sender.send(cache, keys), Sink(SPEC, cache.length)
    counters = pull(ticket, SPEC, cache.length, [sender.lane.address], sink).finish(SPEC.bytes(cache.length))
    sink.check(cache)
    assert counters == Counters(moved=SPEC.bytes(cache.length), wire=SPEC.bytes(cache.length))
    sender.outbox.release(ticket.id, ticket.epoch)
    assert sender.outbox.bytes_held == 0


def test_layout_three_windows_and_seven_tokens_ship_the_window_only(sender):
    """Tokens that no later one may see are never put, never sent, never counted; the paged groups beside it travel whole."""
    window = WINDOW.window
    length = 3 * window + 7
    cache, sink = Cache(SPEC, length), Sink(SPEC, length)
    keys = cache.keys(5)
    assert {t for key in keys if key.group == 2 for t in range(*key.tokens)} == set(range(length - window, length))
    assert {key.tokens for key in keys if key.group == 3} == {(length - 1, length)}
    ticket = sender.send(cache, keys)
    counters = pull(ticket, SPEC, length, [sender.lane.address], sink).finish(SPEC.bytes(length))
    sink.check(cache)
    paged, latent, windows, states = (group.bytes(length) for group in SPEC.groups)
    assert counters.moved == paged + latent + windows + states
    assert windows == SPEC.groups[2].bytes(window) == 2 * window * (2 * 8 * 2 + 2 * 4 * 2)
    assert states == SPEC.groups[3].bytes(1) == 3 * (4 * 30 * 4 + 2 * 9 * 2 * 2 + 4 * 6 * 2)


@pytest.mark.parametrize("kind", ["window", "state"])
def test_layout_a_cache_of_fixed_size_only(kind):
    """Nothing leaves before the last chunks; a request shorter than the window keeps all that it has."""
    spec = CacheSpec(tuple(group for group in SPEC.groups if group.cache.kind == kind))
    with Sender(spec) as sender:
        for length in (1, 3, 6, 7, 40):
            cache, sink = Cache(spec, length), Sink(spec, length)
            ticket = sender.send(cache, cache.keys(4, shards=2))
            assert pull(ticket, spec, length, [sender.lane.address], sink).finish(spec.bytes(length)).moved == spec.bytes(length)
            sink.check(cache)
        assert spec.bytes(40) == spec.fixed_bytes


def test_layout_more_shards_than_heads_and_a_lane_per_shard():
    """Class E: shards of one prefill on lanes of their own, out of step with each other."""
    length = 30
    cache, sink = Cache(SPEC, length), Sink(SPEC, length)
    keys = cache.keys(7, shards=4)
    with Sender(SPEC) as a, Sender(SPEC) as b:
        ticket = a.outbox.open(length)
        assert b.outbox.open(length, ticket) == ticket
        with pytest.raises(InvalidInput, match="ticket"):
            b.outbox.open(length, ticket)
        puller = pull(ticket, SPEC, length, [a.lane.address, b.lane.address], sink)
        for i, key in enumerate(keys):
            (a if i % 2 else b).outbox.put(ticket, cache.segment(key))
        a.outbox.finish(ticket)
        b.outbox.finish(ticket)
        assert puller.finish(SPEC.bytes(length)).moved == SPEC.bytes(length)
    sink.check(cache)


def test_states_larger_than_the_staging_arrive_in_layer_ranges():
    """As a 1T model's: the whole group is far above what a receiver stages; whole it is refused, cut as engines cut it it passes."""
    cache = LayerCache("state", (TensorSpec("recurrent", 8, 128 * 128, "float32"), TensorSpec("q_tail", 8, 384, "bfloat16")))
    spec = CacheSpec((CacheGroup(cache, tuple(range(40))),))  # 512 KiB a layer: 20 MiB
    sent = Cache(spec, 9)
    cut = [
        SegmentKey(0, tensor, layers, (8, 9), heads)
        for tensor in (0, 1)
        for layers in layer_blocks(spec.groups[0], tensor)
        for heads in ((0, 4), (4, 8))
    ]
    assert max(key.nbytes(spec) for key in cut) * 2 <= STATE_SEGMENT_BYTES
    assert {key.layers for key in cut if key.tensor} == {(0, 40)}
    with Sender(spec) as sender:
        ticket, sink = sender.send(sent, cut), Sink(spec, 9)
        puller = pull(ticket, spec, 9, [sender.lane.address], sink, max_staging_bytes=10 << 20)
        assert puller.finish(spec.bytes(9)).moved == spec.bytes(9)
        sink.check(sent)
        whole = sender.send(sent, [SegmentKey(0, 0, (0, 40), (8, 9), (0, 8))])
        with pytest.raises(TransferError, match="staging"):
            pull(whole, spec, 9, [sender.lane.address], Sink(spec, 9), max_staging_bytes=10 << 20).finish(spec.bytes(9))

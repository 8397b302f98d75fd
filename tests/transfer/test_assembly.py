"""Messages of a random hybrid cache in any order, some twice: every block comes out once and whole, and the bytes add up."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fixtures import Cache

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.segments import CARRIER, SegmentKey
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.transfer.assembly import Assembly
from prfaas_jax.transfer.counters import Counters
from prfaas_jax.transfer.wire import Header

tensors = st.builds(TensorSpec, st.just("x"), st.integers(1, 4), st.integers(1, 6), st.sampled_from(sorted(CARRIER)), st.booleans())
caches = st.one_of(
    st.builds(LayerCache, st.just("paged"), st.tuples(tensors, tensors)),
    st.builds(LayerCache, st.just("paged"), st.tuples(tensors)),
    st.builds(LayerCache, st.just("window"), st.tuples(tensors, tensors), st.integers(1, 9)),
    st.builds(LayerCache, st.just("state"), st.tuples(tensors, tensors, tensors)),
)
groups = st.builds(lambda cache, layers: CacheGroup(cache, tuple(range(layers))), caches, st.integers(1, 4))
specs = st.builds(lambda groups: CacheSpec(tuple(groups)), st.lists(groups, min_size=1, max_size=4))


@settings(max_examples=100)
@given(specs, st.integers(1, 20), st.integers(1, 200), st.randoms(use_true_random=False))
def test_any_cache_is_put_together_byte_for_byte(spec: CacheSpec, length: int, message_bytes: int, rng: random.Random) -> None:
    cache = Cache(spec, length, rng.randrange(100))
    messages = []
    for key in cache.random_keys(rng):
        payload = cache.segment(key).payload.cast("B")
        dtype = key.tensor_spec(spec).dtype
        for offset in range(0, payload.nbytes, message_bytes):
            part = payload[offset : offset + message_bytes]
            messages.append((Header(b"t" * 16, 1, len(messages), key, dtype, offset, payload.nbytes, part.nbytes), part))
    again = rng.sample(messages, len(messages) // 3)
    messages += again
    rng.shuffle(messages)

    assembly = Assembly(spec, length, 0, 1 << 30)
    blocks = 0
    for left, (header, payload) in enumerate(messages, 1 - len(messages)):
        header.check(spec, length)
        block = assembly.claim(header, payload)
        if block is None or not block.complete:
            continue
        elements = block.build(assembly.buffer_for(block))
        np.testing.assert_array_equal(elements, cache.tensors[block.key.group, block.key.tensor][cache.place(block.key)])
        assert assembly.free(block) and not assembly.free(block)
        blocks += 1
        assert not assembly.complete or left >= -len(again)
    assert assembly.complete and assembly.gap().startswith("0 bytes")
    assert assembly.moved == assembly.total == spec.bytes(length)
    assert assembly.resent == sum(payload.nbytes for _, payload in again)
    assert assembly.staged == 0 and blocks >= sum(len(group.cache.tensors) for group in spec.groups)
    Counters(assembly.moved, resent=assembly.resent).check(spec, length)


@settings(max_examples=50)
@given(specs, st.integers(1, 20), st.integers(0, 20), st.randoms(use_true_random=False))
def test_what_is_here_in_part_may_come_again_in_another_cut(spec: CacheSpec, length: int, prefix: int, rng: random.Random) -> None:
    """After a failure whole blocks stay, the rest is forgotten, and another sender brings it; a prefix that was here never comes."""
    prefix = min(prefix, length)
    cache = Cache(spec, length)
    assembly = Assembly(spec, length, prefix, 1 << 30)
    assert assembly.total == spec.bytes(length, prefix)
    left = []
    for key in cache.keys(chunk=5, layer_step=2, shards=2):
        kept = spec.groups[key.group].cache.kept(length, prefix)
        tokens = max(key.tokens[0], kept[0]), min(key.tokens[1], kept[1])
        if tokens[0] < tokens[1]:
            left.append(dataclasses.replace(key, tokens=tokens))

    def bring(key, share=1.0):
        payload = cache.segment(key).payload.cast("B")
        size = max(1, int(share * payload.nbytes))
        header = Header(b"t" * 16, 1, 0, key, key.tensor_spec(spec).dtype, 0, payload.nbytes, size)
        return assembly.claim(header, payload[:size])

    for key in rng.sample(left, len(left) // 2):
        if (block := bring(key, rng.choice([0.5, 1.0]))) is not None and block.complete:
            block.build(assembly.buffer_for(block))
            assembly.free(block)
    moved = assembly.moved
    dropped = assembly.forget_partial()
    whole = set(assembly.whole_blocks())
    assert assembly.moved == moved - dropped == sum(key.nbytes(spec) for key in whole)
    assert assembly.staged == 0 and assembly.resent == dropped
    for key in left:
        if key.all_heads(spec) not in whole:
            bring(key)
    assert assembly.complete or not left


def test_a_sender_that_goes_beyond_its_grant_is_refused_before_it_costs_memory() -> None:
    spec = CacheSpec((CacheGroup(LayerCache("paged", (TensorSpec("k", 1, 10, "uint8"),)), (0,)),))
    assembly = Assembly(spec, 20, 0, max_staging_bytes=100)
    for at in range(2):
        key = SegmentKey(0, 0, (0, 1), (at * 10, at * 10 + 10), (0, 1))
        header = Header(b"t" * 16, 1, at, key, "uint8", 0, 100, 60)
        if at:
            with pytest.raises(TransferError, match="beyond its grant"):
                assembly.claim(header, memoryview(bytes(60)))
        else:
            assembly.claim(header, memoryview(bytes(60)))
    assert assembly.staged == 60


@settings(max_examples=50)
@given(specs, st.integers(1, 20), st.data())
def test_one_lost_segment_is_never_a_whole_cache(spec: CacheSpec, length: int, data: st.DataObject) -> None:
    cache = Cache(spec, length)
    keys = cache.keys(chunk=7, layer_step=2, shards=2)
    lost = data.draw(st.sampled_from(keys))
    assembly = Assembly(spec, length, 0, 1 << 30)
    for key in keys:
        if key != lost:
            payload = cache.segment(key).payload.cast("B")
            assembly.claim(Header(b"t" * 16, 1, 0, key, key.tensor_spec(spec).dtype, 0, payload.nbytes, payload.nbytes), payload)
    assert not assembly.complete
    assert "tokens" in assembly.gap() or f"{lost.nbytes(spec)} bytes" in assembly.gap()
    with pytest.raises(TransferError):
        Counters(assembly.moved).check(spec, length)

"""Messages of a random hybrid cache in any order, some twice: every block comes out once and whole, and the bytes add up."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fixtures import Cache

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.transfer.assembly import VIEW_DTYPES, Assembly, Staging
from prfaas_jax.transfer.counters import Counters
from prfaas_jax.transfer.wire import Header

tensors = st.builds(TensorSpec, st.just("x"), st.integers(1, 4), st.integers(1, 6), st.sampled_from(sorted(VIEW_DTYPES)), st.booleans())
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
            messages.append((Header(b"t" * 16, 1, len(messages), key, dtype, offset, payload.nbytes), part))
    again = rng.sample(messages, len(messages) // 3)
    messages += again
    rng.shuffle(messages)

    assembly = Assembly(spec, length, Staging(1 << 30))
    blocks = 0
    for left, (header, payload) in enumerate(messages, 1 - len(messages)):
        header.check(spec, length, payload.nbytes)
        block = assembly.claim(header, payload.nbytes)
        if block is None:
            continue
        assert not assembly.complete
        block.write(header.key.heads, header.offset, payload)
        elements = assembly.wrote(block, payload.nbytes)
        if elements is not None:
            np.testing.assert_array_equal(elements, cache.tensors[block.key.group, block.key.tensor][cache.place(block.key)])
            assembly.free(block)
            blocks += 1
        assert not assembly.complete or left >= -len(again)
    assert assembly.complete and assembly.gap().startswith("0 bytes")
    assert assembly.moved == assembly.total == spec.bytes(length)
    assert assembly.resent == sum(payload.nbytes for _, payload in again)
    assert assembly.staging.in_use == 0 and blocks >= sum(len(group.cache.tensors) for group in spec.groups)
    Counters(assembly.moved, resent=assembly.resent).check(spec, length)


@settings(max_examples=50)
@given(specs, st.integers(1, 20), st.data())
def test_one_lost_segment_is_never_a_whole_cache(spec: CacheSpec, length: int, data: st.DataObject) -> None:
    cache = Cache(spec, length)
    keys = cache.keys(chunk=7, layer_step=2, shards=2)
    lost = data.draw(st.sampled_from(keys))
    assembly = Assembly(spec, length, Staging(1 << 30))
    for key in keys:
        if key != lost:
            payload = cache.segment(key).payload.cast("B")
            header = Header(b"t" * 16, 1, 0, key, key.tensor_spec(spec).dtype, 0, payload.nbytes)
            block = assembly.claim(header, payload.nbytes)
            assert block is not None
            assembly.wrote(block, payload.nbytes)
    assert not assembly.complete
    assert "tokens" in assembly.gap() or f"{lost.nbytes(spec)} bytes" in assembly.gap()
    with pytest.raises(TransferError):
        Counters(assembly.moved).check(spec, length)

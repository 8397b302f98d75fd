import dataclasses
import itertools
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_fixtures import PAPER

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.simulation import prefix_cache
from prfaas_jax.simulation.clusters import prefix_caches
from prfaas_jax.simulation.prefix_cache import PrefixCache
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.workloads import Poisson, Sessions

BLOCK = 10
PLAIN = KvFootprint(0, 3)
HYBRID = KvFootprint(200, 3, ((4, 5),))
BLOCK_BYTES, CHECKPOINT_BYTES = 30, 220


class Naive:
    """Lists in order of last use and the rules as the class states them."""

    def __init__(self, kv, capacity, every):
        self.hybrid, self.capacity, self.every = kv is HYBRID, capacity, every
        self.blocks, self.checkpoints = [], []

    @property
    def used(self):
        return len(self.blocks) * BLOCK_BYTES + len(self.checkpoints) * CHECKPOINT_BYTES

    def match(self, blocks, tokens):
        lengths = [n for n in range(1, len(blocks) + 1) if n * BLOCK < tokens and all(b in self.blocks for b in blocks[:n])]
        return max([n * BLOCK for n in lengths if not self.hybrid or blocks[n - 1] in self.checkpoints], default=0)

    def insert(self, blocks, tokens, known):
        whole = [b for n, b in enumerate(blocks, 1) if n * BLOCK <= tokens]
        if not whole or not self.capacity:
            return
        for block in reversed(whole):
            self.use(self.blocks, block)
        if self.hybrid:
            for n in range(len(whole), 0, -1):
                last, made = n == len(whole), n % self.every == 0 and n * BLOCK > known
                if last or made or (n % self.every == 0 and whole[n - 1] in self.checkpoints):
                    self.use(self.checkpoints, whole[n - 1])
        while self.used > self.capacity:
            if 2 * len(self.checkpoints) * CHECKPOINT_BYTES > self.used:
                self.checkpoints.pop(0)
            else:
                block = self.blocks.pop(0)
                if block in self.checkpoints:
                    self.checkpoints.remove(block)

    @staticmethod
    def use(order, key):
        if key in order:
            order.remove(key)
        order.append(key)


@st.composite
def prompts(draw):
    """Prompts that share prefixes: a block's id is made of its path through a tree."""
    path, node = [], 0
    for _ in range(draw(st.integers(0, 7))):
        node = node * 2 + draw(st.integers(1, 2))
        path.append(node)
    tokens = max(1, len(path) * BLOCK - draw(st.integers(0, BLOCK - 1)))
    return tuple(path), tokens, draw(st.integers(0, tokens))


@given(
    st.lists(prompts(), max_size=25),
    st.sampled_from([PLAIN, HYBRID]),
    st.sampled_from([0, 25, 100, 500, 1500, 10**6]),
    st.integers(1, 4),
    st.sampled_from([0, 5, prefix_cache.FEW]),
)
def test_behaves_as_the_naive_model(sequence, kv, capacity, every, few):
    cache, naive = PrefixCache(kv, BLOCK, capacity, every), Naive(kv, capacity, every)
    with mock.patch.object(prefix_cache, "FEW", few):
        for blocks, tokens, known in sequence:
            hit = cache.match(blocks, tokens)
            assert hit == naive.match(blocks, tokens) and hit % BLOCK == 0 and hit < tokens
            cache.insert(blocks, tokens, known)
            naive.insert(blocks, tokens, known)
            assert set(cache._blocks) == set(naive.blocks) and list(cache._checkpoints) == naive.checkpoints
            assert cache.used_bytes == naive.used <= capacity
            assert set(naive.checkpoints) <= set(naive.blocks), "a checkpoint without its block is worth nothing"
            assert cache._noted <= 2 * len(naive.blocks) + few + len(blocks), "memory follows what is held"
    order = [next(cache._going) for _ in naive.blocks]
    assert order == naive.blocks, "what would go next"
    cache.clear()
    assert cache.used_bytes == 0 and all(cache.match(blocks, tokens) == 0 for blocks, tokens, _ in sequence)


def test_a_hybrid_reuses_a_prefix_only_up_to_a_checkpoint():
    cache = PrefixCache(HYBRID, BLOCK, 1e6, checkpoint_blocks=4)
    cache.insert(range(1, 12), 105)
    assert cache.match(range(1, 12), 105) == 100, "at the last whole block"
    assert cache.match([*range(1, 10), 99], 99) == 80, "at every fourth block"
    assert cache.match([1, 2, 3, 99], 40) == 0
    plain = PrefixCache(PLAIN, BLOCK, 1e6)
    plain.insert(range(1, 12), 105)
    assert plain.match([*range(1, 10), 99], 99) == 90 and plain.match([1, 2, 3, 99], 40) == 30


def test_what_was_received_has_its_last_checkpoint_only():
    cache = PrefixCache(HYBRID, BLOCK, 1e6, checkpoint_blocks=2)
    cache.insert(range(1, 8), 70, known=70)
    assert cache.match(range(1, 9), 80) == 70 and cache.match([*range(1, 6), 99], 60) == 0
    cache.insert(range(1, 8), 70, known=20)
    assert cache.match([1, 2, 99], 30) == 0 and cache.match([1, 2, 3, 4, 99], 50) == 40


def test_the_last_token_of_a_prompt_is_always_computed():
    cache = PrefixCache(PLAIN, BLOCK, 1e6)
    cache.insert((1, 2), 20)
    assert cache.match((1, 2), 20) == 10 and cache.match((1, 2), 21) == 20


def test_what_was_used_least_recently_goes_first_and_of_a_prefix_its_end():
    cache = PrefixCache(PLAIN, BLOCK, 5 * BLOCK_BYTES)
    cache.insert((1, 2, 3), 30)
    cache.insert((7, 8), 20)
    cache.insert((1, 2, 3), 30)
    cache.insert((9,), 10)
    assert [cache.match(blocks, 99) for blocks in ((1, 2, 3), (7, 8), (9,))] == [30, 10, 10]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: PrefixCache(PLAIN, 0, 1.0), "block_tokens"),
        (lambda: PrefixCache(PLAIN, 1, -1.0), "prefix_cache.capacity_bytes"),
        (lambda: PrefixCache(PLAIN, 1, float("nan")), "prefix_cache.capacity_bytes"),
        (lambda: PrefixCache(PLAIN, 1, 1.0, 0), "prefix_cache.checkpoint_blocks"),
    ],
)
def test_bad_input_names_the_field(call, field):
    with pytest.raises(InvalidInput) as caught:
        call()
    assert caught.value.field == field


def test_caches_begin_with_what_the_sessions_of_the_lead_had():
    growth = LogNormalLengths(6.0, 0.5, 16, 4096)
    sessions = Sessions(Poisson(10.0), LogNormalLengths(8.0, 0.5, 512, 16_384), growth, 100, mean_turns=6.0, think_s=5.0, lead_s=60.0)
    options = SimOptions(prefill_cache_bytes=1e13, decode_cache_bytes=1e13)
    far, near = prefix_caches(PAPER, options, sessions, 3)
    before = {row.session: row for row in sessions.held(3)}
    goes_on = [row for row in itertools.islice(sessions.arrivals(3), 60) if row.session in before]
    assert len(far) == len(near) == 1 and len({row.session for row in goes_on}) > 20
    for row in {row.session: row for row in reversed(goes_on)}.values():
        had = before[row.session].tokens // 512 * 512
        assert [cache.match(row.blocks, row.tokens) for cache in (*far, *near)] == [had, had]
    cold, _ = prefix_caches(PAPER, options, dataclasses.replace(sessions, lead_s=0.0), 3)
    assert cold[0].used_bytes == 0 < far[0].used_bytes
    assert prefix_caches(PAPER, SimOptions(), sessions, 3) == ([], [])

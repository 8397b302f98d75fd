"""Received blocks against pools of plain numpy: every element ends at its request's place, every block comes back once, budgets hold."""

import dataclasses
import random

import numpy as np
import pytest
from engine_harness import Done
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.engine.plan import IngestPlan
from prfaas_jax.engine.received import Received
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import AS_CACHED
from prfaas_jax.kvcache.pages import PageAllocator
from prfaas_jax.kvcache.segments import SegmentKey, aligned_blocks
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec

WINDOW, PAGE, PAGES, SLOTS, SHARDS = 7, 4, 30, 4, 2
SPEC = CacheSpec(
    (
        CacheGroup(LayerCache("paged", (TensorSpec("k", 2, 3, "float32"), TensorSpec("v", 2, 2, "float32"))), (0, 3)),
        CacheGroup(LayerCache("window", (TensorSpec("k", 2, 3, "float32"), TensorSpec("v", 2, 2, "float32")), WINDOW), (1, 4, 5)),
        CacheGroup(LayerCache("state", (TensorSpec("recurrent", 3, 4, "float32"), TensorSpec("q_tail", 1, 3, "float32"))), (2, 6, 7)),
        CacheGroup(LayerCache("paged", (TensorSpec("latent", 1, 5, "float32", shared=True),)), (8,)),
    )
)


class Fence:
    ready = True

    def is_ready(self) -> bool:
        return self.ready

    def block_until_ready(self) -> None:
        """Nothing to wait for."""


class NumpyRunner:
    """What `Received` asks of a Runner, over numpy pools in the layout of kvcache/pools.py."""

    @dataclasses.dataclass
    class Geometry:
        page_size: int = PAGE

        def per_layer(self, group: CacheGroup) -> int:
            return PAGES if group.cache.kind == "paged" else SLOTS

    def __init__(self, ingest_tokens: int):
        self.spec, self.shards, self.geometry = SPEC, SHARDS, self.Geometry()
        self._tokens = ingest_tokens
        self.nbytes: list[int] = []
        self.rows: list[int] = []
        self.fence = Fence()
        self.pools = {
            (g, t): np.zeros((tensor.heads, SHARDS * len(group.layers) * self.per_layer(g), self.page_tokens(g), tensor.width), np.float32)
            for g, group in enumerate(SPEC.groups)
            for t, tensor in enumerate(group.cache.tensors)
        }

    def per_layer(self, group: int) -> int:
        return self.geometry.per_layer(SPEC.groups[group])

    def page_tokens(self, group: int) -> int:
        return {"paged": PAGE, "window": WINDOW, "state": 1}[SPEC.groups[group].cache.kind]

    def ingest_sizes(self, group: int) -> tuple[int, ...]:
        cached = SPEC.groups[group]
        if cached.cache.kind == "state":
            return (1,)
        rows = min(self._tokens, cached.cache.window or self._tokens) * len(cached.layers)
        return tuple(sorted({-(-rows // 4), rows}))

    def ingest(self, group: int, tensor: int, codec: str, block: np.ndarray, plan: IngestPlan) -> Fence:
        assert codec == "none"
        t = SPEC.groups[group].cache.tensors[tensor]
        assert len(block) in self.ingest_sizes(group) and block.shape[1:] == (t.heads, t.width), "no program of this shape"
        assert plan.page.shape == plan.offset.shape == (SHARDS, len(block))
        pool, per_shard = self.pools[group, tensor], len(SPEC.groups[group].layers) * self.per_layer(group)
        for shard in range(SHARDS):
            real = plan.page[shard] > 0
            places = list(zip(plan.page[shard][real].tolist(), plan.offset[shard][real].tolist(), strict=True))
            assert len(set(places)) == len(places), "two rows of one scatter meet in one place"
            for page, offset, values in zip(plan.page[shard], plan.offset[shard], block, strict=True):
                pool[:, shard * per_shard + page, offset] = values
        self.rows.append(len(block))
        self.nbytes.append(block.nbytes)
        return self.fence

    def read(self, key: SegmentKey, held) -> np.ndarray:
        """What lies in the pools at a key of a request."""
        pool, layers = self.pools[key.group, key.tensor], len(SPEC.groups[key.group].layers)
        paged = SPEC.groups[key.group].cache.kind == "paged"
        out = np.zeros(key.shape(SPEC), np.float32)
        for i, layer in enumerate(range(*key.layers)):
            for j, token in enumerate(range(*key.tokens)):
                page = held.pages[token // PAGE] if paged else held.slot
                out[i, j] = pool[:, (held.shard * layers + layer) * self.per_layer(key.group) + page, token % self.page_tokens(key.group)]
        return out


def random_blocks(rng: random.Random, length: int) -> list[tuple[SegmentKey, np.ndarray]]:
    """A whole cache in blocks: any token cuts, any layer cuts, everything in any order."""
    blocks = []
    for g, group in enumerate(SPEC.groups):
        for t in range(len(group.cache.tensors)):
            layers = len(group.layers)
            layer_step = rng.randint(1, layers)
            for tokens in aligned_blocks(group.cache.kept(length), rng.randint(1, 20)):
                for layer_range in aligned_blocks((0, layers), layer_step):
                    key = SegmentKey(g, t, layer_range, tokens, (0, group.cache.tensors[t].heads))
                    blocks.append((key, np.random.default_rng(rng.randrange(2**32)).normal(size=key.shape(SPEC)).astype(np.float32)))
    rng.shuffle(blocks)
    return blocks


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 16), st.integers(1, 400), st.randoms(use_true_random=False))
def test_every_element_ends_at_its_place(lengths: list[int], ingest_tokens: int, budget: int, rng: random.Random) -> None:
    runner, allocator = NumpyRunner(ingest_tokens), PageAllocator(PAGES, PAGE, SHARDS, SLOTS)
    received = Received(runner)  # type: ignore[arg-type]
    held = {f"t{i}": allocator.reserve(f"t{i}", length) for i, length in enumerate(lengths)}
    blocks = [(ticket, *block) for ticket, length in zip(held, lengths, strict=True) for block in random_blocks(rng, length)]
    rng.shuffle(blocks)
    dones = [Done() for _ in blocks]
    through: list[str] = []
    for (ticket, key, block), done in zip(blocks, dones, strict=True):
        received.check(key, block, AS_CACHED, 64)
        received.push(held[ticket], key, block, AS_CACHED, done)
        if rng.random() < 0.3:
            before = len(runner.nbytes)
            through += received.scatter(budget)
            used = runner.nbytes[before:]
            assert sum(used[:-1]) < budget, "went on although the budget was used up"
            assert sum(used) >= budget or not received.waiting
            received.release(wait=False)
    through += received.scatter(None)
    assert not received.waiting and not any(map(received.pending, held)) and set(through) == set(held)
    received.release(wait=True)
    assert [d.calls for d in dones] == [1] * len(dones)
    for ticket, key, block in blocks:
        np.testing.assert_array_equal(runner.read(key, held[ticket]), block)
    for (group, _), pool in runner.pools.items():
        pool[:, :: runner.per_layer(group)] = 0  # the dummies, which take what is another shard's, and padding
    elsewhere = sum(map(np.count_nonzero, runner.pools.values())) - sum(block.size for _, _, block in blocks)
    assert elsewhere == 0, "something was written elsewhere too"


def test_blocks_of_few_layers_take_about_as_many_scatters_as_whole_ones() -> None:
    """What a prefill step hands out part by part waits here together."""
    group = SPEC.groups[1]
    scatters = []
    for layers in (1, len(group.layers)):
        runner, allocator = NumpyRunner(4), PageAllocator(PAGES, PAGE, SHARDS, SLOTS)
        received = Received(runner)  # type: ignore[arg-type]
        held = allocator.reserve("a", 40)
        for part in aligned_blocks((0, len(group.layers)), layers):
            key = SegmentKey(1, 0, part, group.cache.kept(40), (0, 2))
            received.push(held, key, np.ones(key.shape(SPEC), np.float32), AS_CACHED, Done())
        received.scatter(None)
        received.release(wait=True)
        scatters.append(runner.rows)
    assert len(scatters[0]) <= len(scatters[1]) + 1


def test_a_small_block_is_not_padded_to_the_largest_scatter() -> None:
    runner = NumpyRunner(16)
    received = Received(runner)  # type: ignore[arg-type]
    key = SegmentKey(0, 0, (1, 2), (3, 6), (0, 2))
    received.push(PageAllocator(PAGES, PAGE, SHARDS, SLOTS).reserve("a", 8), key, np.ones(key.shape(SPEC), np.float32), AS_CACHED, Done())
    received.scatter(None)
    received.release(wait=True)
    assert runner.rows == [8] == [runner.ingest_sizes(0)[0]]


def test_drop_gives_back_what_is_not_scattered_and_leaves_the_others() -> None:
    runner, allocator = NumpyRunner(4), PageAllocator(PAGES, PAGE, SHARDS, SLOTS)
    received = Received(runner)  # type: ignore[arg-type]
    dones: dict[str, list[Done]] = {"a": [], "b": []}
    for ticket in dones:
        held = allocator.reserve(ticket, 20)
        for key, block in random_blocks(random.Random(1), 20):
            dones[ticket].append(Done())
            received.push(held, key, block, AS_CACHED, dones[ticket][-1])
    received.scatter(1)
    received.release(wait=True)
    assert received.pending("a") and received.pending("b")
    received.drop("a")
    assert received.pending("a") == 0 and all(d.calls == 1 for d in dones["a"])
    assert received.scatter(None) == ["b"]
    received.release(wait=True)
    assert [d.calls for ds in dones.values() for d in ds] == [1] * sum(map(len, dones.values()))


def test_blocks_come_back_once_their_last_scatter_is_done_and_after_a_failure() -> None:
    runner = NumpyRunner(4)
    runner.fence.ready = False
    received = Received(runner)  # type: ignore[arg-type]
    held = PageAllocator(PAGES, PAGE, SHARDS, SLOTS).reserve("a", 20)
    key = SegmentKey(2, 0, (0, 3), (19, 20), (0, 3))
    first, second = Done(), Done()
    received.push(held, key, np.zeros(key.shape(SPEC), np.float32), AS_CACHED, first)
    received.scatter(None)
    received.release(wait=False)
    assert first.calls == 0
    received.push(held, key, np.zeros(key.shape(SPEC), np.float32), AS_CACHED, second)
    received.clear()
    assert (first.calls, second.calls, received.waiting, received.pending("a")) == (1, 1, False, 0)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        (SegmentKey(4, 0, (0, 1), (0, 4), (0, 1)), r"segment\.group"),
        (SegmentKey(0, 0, (1, 3), (0, 4), (0, 2)), r"segment\.layers"),
        (SegmentKey(0, 0, (0, 2), (0, 4), (0, 1)), "block shape"),
        (SegmentKey(2, 0, (0, 1), (9, 10), (1, 3)), "block shape"),
        (SegmentKey(2, 0, (0, 1), (8, 10), (0, 3)), r"segment\.tokens"),
        (SegmentKey(1, 0, (0, 3), (0, WINDOW + 1), (0, 2)), r"segment\.tokens"),
        (SegmentKey(0, 0, (0, 2), (30, 65), (0, 2)), r"segment\.tokens"),
        (SegmentKey(2, 0, (0, 3), (64, 65), (0, 3)), r"segment\.tokens"),
        (SegmentKey(2, 0, (0, 4), (63, 64), (0, 3)), r"segment\.layers"),
    ],
)
def test_a_block_that_belongs_in_no_cache_is_named(key: SegmentKey, field: str) -> None:
    received = Received(NumpyRunner(4))  # type: ignore[arg-type]
    shape = [b - a for a, b in (key.layers, key.tokens, key.heads)]
    with pytest.raises(InvalidInput, match=field):
        received.check(key, np.zeros((*shape, 1), np.float32), AS_CACHED, 64)


def test_a_block_of_another_shape_than_its_key_is_named() -> None:
    received = Received(NumpyRunner(4))  # type: ignore[arg-type]
    key = SegmentKey(2, 0, (1, 2), (9, 10), (0, 3))
    received.check(key, np.zeros((1, 1, 3, 4), np.float32), AS_CACHED, 64)
    with pytest.raises(InvalidInput, match="block shape"):
        received.check(key, np.zeros((1, 1, 3, 5), np.float32), AS_CACHED, 64)

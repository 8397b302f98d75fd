import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prfaas_jax.errors import Exhausted, InvalidInput
from prfaas_jax.kvcache.pages import PageAllocator, Reservation, SlotAllocator
from prfaas_jax.scheduling.batching import decode_bucket, decode_buckets


class PagesMachine(RuleBasedStateMachine):
    """Random life of an allocator against a model that remembers who holds what."""

    @initialize(pages=st.integers(2, 12), page_size=st.integers(1, 5), shards=st.integers(1, 3))
    def start(self, pages, page_size, shards):
        self.allocator = PageAllocator(pages, page_size, shards)
        self.held: dict[str, Reservation] = {}
        self.tickets = 0

    def free_on(self, shard: int) -> set[int]:
        taken = {p for r in self.held.values() if r.shard == shard for p in r.pages.tolist()}
        return set(range(1, self.allocator.pages)) - taken

    @rule(tokens=st.integers(1, 60))
    def reserve(self, tokens):
        ticket = f"t{self.tickets}"
        self.tickets += 1
        need = -(-tokens // self.allocator.page_size)
        free = [self.free_on(s) for s in range(self.allocator.shards)]
        before = self.allocator.pages_free
        try:
            got = self.allocator.reserve(ticket, tokens)
        except InvalidInput:
            assert need > self.allocator.pages - 1
        except Exhausted:
            assert max(map(len, free)) < need <= self.allocator.pages - 1
            assert self.allocator.pages_free == before
        else:
            assert len(free[got.shard]) == max(map(len, free))
            assert got.pages.tolist() == sorted(free[got.shard])[:need], "not the lowest free pages: double hand-out, or the dummy"
            assert got.pages.dtype == np.int32 and got.tokens == tokens
            self.held[ticket] = got

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.held)))
        self.allocator.free(ticket)
        del self.held[ticket]
        with pytest.raises(InvalidInput):
            self.allocator.free(ticket)

    @invariant()
    def conserved(self):
        a = self.allocator
        reserved = sum(len(r.pages) for r in self.held.values())
        assert a.pages_free + reserved == a.pages_total == a.shards * (a.pages - 1)
        assert a.pages_free == sum(len(self.free_on(s)) for s in range(a.shards))
        assert all(ticket in a for ticket in self.held)

    def teardown(self):
        if not hasattr(self, "allocator"):
            return
        for ticket in self.held:
            self.allocator.free(ticket)
        assert self.allocator.pages_free == self.allocator.pages_total


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class SlotsMachine(RuleBasedStateMachine):
    @initialize(per_shard=st.integers(1, 12), shards=st.sampled_from([1, 2, 4]))
    def start(self, per_shard, shards):
        self.slots = SlotAllocator(per_shard * shards, shards)
        self.held: dict[str, int] = {}
        self.tickets = 0

    @rule(data=st.data())
    def reserve(self, data):
        shard = data.draw(st.integers(0, self.slots.shards - 1))
        ticket = f"t{self.tickets}"
        self.tickets += 1
        n = self.slots.per_shard
        free = sorted(set(range(shard * n, (shard + 1) * n)) - set(self.held.values()))
        if free:
            self.held[ticket] = self.slots.reserve(ticket, shard)
            assert self.held[ticket] == free[0]
        else:
            with pytest.raises(Exhausted):
                self.slots.reserve(ticket, shard)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.held)))
        self.slots.free(ticket)
        del self.held[ticket]
        with pytest.raises(InvalidInput):
            self.slots.free(ticket)

    @invariant()
    def taken_slots_fit_the_bucket(self):
        slots = self.slots
        assert slots.slots_free + len(self.held) == slots.slots
        if not self.held or slots.slots < 8:
            return
        rows = decode_bucket(slots.rows_needed(), decode_buckets(slots.slots, slots.shards))
        placed = {slots.bucket_row(slot, rows) for slot in self.held.values()}
        assert len(placed) == len(self.held) and max(placed) < rows
        for slot in self.held.values():
            assert slots.bucket_row(slot, rows) // (rows // slots.shards) == slot // slots.per_shard


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_reserved_pages_cannot_be_edited():
    pages = PageAllocator(4, 16).reserve("a", 20).pages
    with pytest.raises(ValueError, match="read-only"):
        pages[0] = 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PageAllocator(1, 16), "pages=1"),
        (lambda: PageAllocator(2, 0), "page_size=0"),
        (lambda: PageAllocator(2, 16, 0), "shards=0"),
        (lambda: PageAllocator(3, 16).reserve("a", 33), "tokens=33"),
        (lambda: PageAllocator(3, 16).reserve("a", 0), "tokens=0"),
        (lambda: PageAllocator(3, 16).free("ghost"), "ticket='ghost'"),
        (lambda: SlotAllocator(5, 2), "slots=5"),
        (lambda: SlotAllocator(4, 0), "shards=0"),
        (lambda: SlotAllocator(4, 2).reserve("a", 2), "shard=2"),
        (lambda: SlotAllocator(4).free("ghost"), "ticket='ghost'"),
    ],
)
def test_bad_input_names_field_and_value(call, message):
    with pytest.raises(InvalidInput) as error:
        call()
    assert message in str(error.value)


def test_a_ticket_holds_pages_and_slot_once():
    a, s = PageAllocator(9, 16), SlotAllocator(4)
    a.reserve("t", 16)
    s.reserve("t", 0)
    with pytest.raises(InvalidInput):
        a.reserve("t", 16)
    with pytest.raises(InvalidInput):
        s.reserve("t", 0)
    assert a.pages_free == 7 and s.slots_free == 3

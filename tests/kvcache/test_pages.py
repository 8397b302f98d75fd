import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prfaas_jax.errors import Exhausted, InvalidInput
from prfaas_jax.kvcache.pages import PageAllocator, Reservation, SlotAllocator, StateSlots
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


class StatesMachine(RuleBasedStateMachine):
    """Requests that come, go on and end while checkpoints of their states are taken and dropped.

    Every slot has a content, as in a pool: the mark of who wrote it last. A reader remembers what it saw when it began to hold.
    """

    @initialize(pages=st.integers(4, 12), slots=st.integers(2, 5), shards=st.integers(1, 3))
    def start(self, pages, slots, shards):
        self.allocator = PageAllocator(pages, 4, shards, slots)
        self.slots = slots
        self.running: dict[str, Reservation] = {}
        self.read: dict[str, int] = {}  # the slot that a ticket's next step reads, where that is not the one it writes
        self.holds: list[tuple[int, int, str]] = []
        self.content: dict[tuple[int, int], str] = {}
        self.tickets = self.marks = 0

    def taken(self) -> set[tuple[int, int]]:
        return {(r.shard, r.slot) for r in self.running.values()} | {(shard, slot) for shard, slot, _ in self.holds}

    def held(self, shard: int, slot: int) -> int:
        return sum((s, i) == (shard, slot) for s, i, _ in self.holds)

    def draw_running(self, data) -> tuple[str, Reservation]:
        ticket = data.draw(st.sampled_from(sorted(self.running)))
        return ticket, self.running[ticket]

    @rule(tokens=st.integers(1, 20))
    def admit(self, tokens):
        ticket, a = f"t{self.tickets}", self.allocator
        self.tickets += 1
        need, taken = a.pages_for(tokens), self.taken()
        pages = [a.pages - 1 - sum(len(r.pages) for r in self.running.values() if r.shard == s) for s in range(a.shards)]
        slots = [sorted(i for i in range(1, self.slots) if (s, i) not in taken) for s in range(a.shards)]
        can = [s for s in range(a.shards) if pages[s] >= need and slots[s]]
        before = a.pages_free, a.states.free
        try:
            got = a.reserve(ticket, tokens)
        except InvalidInput:
            assert need > a.pages - 1
        except Exhausted:
            assert not can, "a shard had both pages and a slot"
            assert (a.pages_free, a.states.free) == before, "all or nothing"
        else:
            assert got.shard in can and got.slot == slots[got.shard][0], "written or read by somebody else, or the dummy"
            assert len(got.pages) == need
            self.running[ticket] = got
            self.content[got.shard, got.slot] = f"{ticket} start"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def step(self, data):
        """Reads one slot and writes one; what is read must be what this request wrote last."""
        ticket, held = self.draw_running(data)
        read = self.read.pop(ticket, held.slot)
        if read == held.slot and self.held(held.shard, held.slot):
            return  # the holder has not let it move on yet
        assert self.content[held.shard, read].startswith(f"{ticket} ")
        self.marks += 1
        self.content[held.shard, held.slot] = f"{ticket} {self.marks}"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def checkpoint(self, data):
        """Holds a running request's state and moves its writes elsewhere."""
        ticket, held = self.draw_running(data)
        if ticket in self.read:
            return  # forked already; its own slot has nothing in it yet
        self.hold(held.shard, held.slot)
        free = [i for i in range(1, self.slots) if (held.shard, i) not in self.taken()]
        try:
            moved = self.allocator.fork(ticket)
        except Exhausted:
            assert not free
            self.drop(len(self.holds) - 1)
            return
        assert moved.slot == free[0] and (moved.shard, moved.pages.tolist()) == (held.shard, held.pages.tolist())
        self.running[ticket], self.read[ticket] = moved, held.slot

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def hold_again(self, data):
        shard, slot, _ = data.draw(st.sampled_from(self.holds))
        self.hold(shard, slot)

    def hold(self, shard: int, slot: int) -> None:
        self.allocator.states.hold(shard, slot)
        self.holds.append((shard, slot, self.content[shard, slot]))

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.holds) - 1))
        shard, slot, _ = self.holds[index]
        needed = any((self.running[t].shard, read) == (shard, slot) for t, read in self.read.items())
        if not needed or self.held(shard, slot) > 1:
            self.drop(index)

    def drop(self, index: int) -> None:
        shard, slot, seen = self.holds.pop(index)
        assert self.content[shard, slot] == seen, "overwritten while it was read"
        self.allocator.states.release(shard, slot)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data, keep):
        """Finish or cancel, with or without a checkpoint of the last state."""
        ticket, held = self.draw_running(data)
        if keep and ticket not in self.read:
            self.hold(held.shard, held.slot)
        self.allocator.free(ticket)
        del self.running[ticket]
        self.read.pop(ticket, None)
        with pytest.raises(InvalidInput):
            self.allocator.free(ticket)

    @invariant()
    def accounts_agree(self):
        states = self.allocator.states
        writers = [(r.shard, r.slot) for r in self.running.values()]
        assert len(set(writers)) == len(writers), "two writers of one slot"
        assert all(slot for _, slot in writers), "the dummy"
        assert states.free == states.total - len(self.taken())
        assert [states.free_on(s) for s in range(states.shards)] == [
            self.slots - 1 - sum(shard == s for shard, _ in self.taken()) for s in range(states.shards)
        ]
        for shard, slot, seen in self.holds:
            assert self.content[shard, slot] == seen, "overwritten while it was read"
            assert states.readers(shard, slot) == self.held(shard, slot)

    def teardown(self):
        if not hasattr(self, "allocator"):
            return
        for ticket in self.running:
            self.allocator.free(ticket)
        for shard, slot, _ in self.holds:
            self.allocator.states.release(shard, slot)
        assert self.allocator.states.free == self.allocator.states.total == self.allocator.shards * (self.slots - 1)
        assert self.allocator.pages_free == self.allocator.pages_total


TestStates = StatesMachine.TestCase
TestStates.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


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
        (lambda: PageAllocator(3, 16, 1, 1), "slots=1"),
        (lambda: PageAllocator(3, 16, 1, 2).fork("ghost"), "ticket='ghost'"),
        (lambda: StateSlots(-1), "slots=-1"),
        (lambda: StateSlots(2, 0), "shards=0"),
        (lambda: StateSlots(3).hold(0, 1), "slot=(0, 1)"),
        (lambda: StateSlots(3).hold(0, 0), "slot=(0, 0)"),
        (lambda: StateSlots(3).release(0, 1), "slot=(0, 1)"),
        (lambda: StateSlots(3).give(0, 2), "slot=(0, 2)"),
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


def test_a_model_without_states_has_slot_0():
    a = PageAllocator(9, 16)
    assert a.reserve("t", 16).slot == 0
    with pytest.raises(InvalidInput, match="is not"):
        a.fork("t")
    a.free("t")
    assert (a.states.free, a.states.total) == (0, 0)


def test_the_shard_with_most_pages_is_passed_over_when_its_slots_are_taken():
    a = PageAllocator(9, 16, shards=2, slots=2)
    assert a.reserve("small", 16).shard == 0
    assert a.reserve("large", 100).shard == 1
    a.free("small")
    a.states.take(0)
    with pytest.raises(Exhausted, match="state slot"):
        a.reserve("next", 16)
    a.free("large")
    assert a.reserve("next", 16).shard == 1


def test_a_freed_slot_is_handed_out_after_its_last_reader_only():
    a = PageAllocator(9, 16, slots=3)
    first = a.reserve("a", 16)
    for _ in range(2):
        a.states.hold(0, first.slot)
    a.free("a")
    assert a.reserve("b", 16).slot == 2
    with pytest.raises(Exhausted, match="state slot"):
        a.reserve("c", 16)
    a.states.release(0, first.slot)
    assert a.states.free == 0
    a.states.release(0, first.slot)
    assert a.reserve("c", 16).slot == first.slot


def test_a_fork_needs_a_reader_and_leaves_the_former_slot_to_it():
    a = PageAllocator(9, 16, slots=3)
    before = a.reserve("a", 16)
    with pytest.raises(InvalidInput, match="held"):
        a.fork("a")
    a.states.hold(0, before.slot)
    after = a.fork("a")
    assert (before.slot, after.slot) == (1, 2)
    with pytest.raises(Exhausted):  # slot 1 is read, slot 2 is written
        a.reserve("b", 16)
    a.states.hold(0, after.slot)
    with pytest.raises(Exhausted):
        a.fork("a")
    a.states.release(0, after.slot)
    a.states.release(0, before.slot)
    assert a.reserve("b", 16).slot == 1

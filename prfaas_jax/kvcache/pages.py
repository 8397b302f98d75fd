"""Who owns which page, which state slot and which decode row: pure accounting for one engine, called from its engine thread only.

Page and state-slot ids are local to a data shard; page 0 and slot 0 of every shard are dummies that padded rows may read and write.
"""

import collections
import dataclasses
import heapq

import numpy as np
from jaxtyping import Int32

from prfaas_jax.errors import Exhausted, InvalidInput


@dataclasses.dataclass(frozen=True, eq=False)
class Reservation:
    """Pages of one request, in order of token position, and the slot of its windows and states.

    Attributes:
        ticket: the request.
        shard: data shard that owns the pages and the slot.
        pages: page ids within the shard, ascending, never 0; enough for `tokens`.
        tokens: tokens that were asked for.
        slot: state slot within the shard that this request writes, nobody else; 0 when the model keeps none.
    """

    ticket: str
    shard: int
    pages: Int32[np.ndarray, " P"]
    tokens: int
    slot: int = 0


class StateSlots:
    """State slots: at most one writer each and any number of readers; lowest id of a shard first.

    A reader is a transfer or a cached prefix that needs the state as it is. A slot is handed out again when its writer and its last
    reader are gone. Whoever holds a slot that still has a writer sees to it that the writer moves on before its next step
    (`PageAllocator.fork`) or ends.
    """

    def __init__(self, slots: int, shards: int = 1):
        """`slots` per shard, the dummy included, or 0 for a model that keeps no state."""
        if shards < 1:
            raise InvalidInput("shards", shards, "an integer >= 1")
        if slots < 0 or slots == 1:
            raise InvalidInput("slots", slots, "0, or an integer >= 2 (slot 0 is a dummy)")
        self.slots, self.shards = slots, shards
        self._free = [list(range(1, slots)) for _ in range(shards)]
        self._written: set[tuple[int, int]] = set()
        self._readers: collections.Counter[tuple[int, int]] = collections.Counter()

    @property
    def total(self) -> int:
        """Slots that can be handed out, over all shards."""
        return self.shards * max(0, self.slots - 1)

    @property
    def free(self) -> int:
        """Slots that can be handed out now, over all shards."""
        return sum(map(len, self._free))

    def free_on(self, shard: int) -> int:
        """Slots of one shard that can be handed out now."""
        return len(self._free[shard])

    def readers(self, shard: int, slot: int) -> int:
        """How often a slot is held."""
        return self._readers[shard, slot]

    def take(self, shard: int) -> int:
        """A slot for a new writer; raises Exhausted when the shard has none."""
        if not self._free[shard]:
            raise Exhausted(f"no state slot of shard {shard} is free: {max(0, self.slots - 1)} are written or read")
        slot = heapq.heappop(self._free[shard])
        self._written.add((shard, slot))
        return slot

    def give(self, shard: int, slot: int) -> None:
        """The slot's writer is done with it; InvalidInput when it has none."""
        if (shard, slot) not in self._written:
            raise InvalidInput("slot", (shard, slot), "a (shard, slot) that has a writer")
        self._written.remove((shard, slot))
        self._reuse(shard, slot)

    def hold(self, shard: int, slot: int) -> None:
        """One reader more; InvalidInput for a slot that is free, whose content is nobody's."""
        if (shard, slot) not in self._written and not self._readers[shard, slot]:
            raise InvalidInput("slot", (shard, slot), "a (shard, slot) that is written or held")
        self._readers[shard, slot] += 1

    def release(self, shard: int, slot: int) -> None:
        """One reader less; InvalidInput when there is none."""
        if not self._readers[shard, slot]:
            raise InvalidInput("slot", (shard, slot), "a (shard, slot) that is held")
        self._readers[shard, slot] -= 1
        if not self._readers[shard, slot]:
            del self._readers[shard, slot]
            self._reuse(shard, slot)

    def _reuse(self, shard: int, slot: int) -> None:
        if (shard, slot) not in self._written and not self._readers[shard, slot]:
            heapq.heappush(self._free[shard], slot)


class PageAllocator:
    """Hands out whole requests' worth of pages, and a state slot where the model keeps any, or nothing.

    Lowest ids first, so that runs are reproducible. Freed pages may be handed out at once: steps form a chain through the donated
    pools, so what is dispatched later runs later. `states` tells who reads a slot.
    """

    def __init__(self, pages: int, page_size: int, shards: int = 1, slots: int = 0):
        """`pages` and state `slots` per shard, the dummies included; `page_size` in tokens.

        Raises InvalidInput when nothing could ever be reserved.
        """
        for field, value, least in (("pages", pages, 2), ("page_size", page_size, 1), ("shards", shards, 1)):
            if value < least:
                raise InvalidInput(field, value, f"an integer >= {least}" + (" (page 0 is a dummy)" if field == "pages" else ""))
        self.pages, self.page_size, self.shards = pages, page_size, shards
        self.states = StateSlots(slots, shards)
        self._free = [list(range(1, pages)) for _ in range(shards)]
        self._reserved: dict[str, Reservation] = {}

    @property
    def pages_total(self) -> int:
        """Pages that can be handed out, over all shards."""
        return self.shards * (self.pages - 1)

    @property
    def pages_free(self) -> int:
        """Pages that can be handed out now, over all shards."""
        return sum(map(len, self._free))

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest request that an empty allocator can hold: one shard's pages."""
        return (self.pages - 1) * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill or begin."""
        return -(-tokens // self.page_size)

    def __contains__(self, ticket: str) -> bool:
        return ticket in self._reserved

    def reserve(self, ticket: str, tokens: int) -> Reservation:
        """Reserves pages for `tokens` tokens, and a slot of states, on one shard; all or nothing.

        Of the shards that have a free slot, it is the one with most free pages, lowest index at a tie.

        Raises:
            InvalidInput: `tokens` can never fit, or the ticket already holds pages.
            Exhausted: not enough free pages beside a free slot on any one shard right now.
        """
        if ticket in self._reserved:
            raise InvalidInput("ticket", ticket, "a ticket that holds no pages yet")
        if not 1 <= tokens <= self.max_tokens:
            raise InvalidInput("tokens", tokens, f"1..{self.max_tokens}, what {self.pages - 1} pages of {self.page_size} tokens hold")
        stateful = self.states.slots > 0
        shards = [s for s in range(self.shards) if self.states.free_on(s) or not stateful]
        if not shards:
            raise Exhausted(f"{ticket} needs a state slot; all {self.states.total} are written or read")
        shard = max(shards, key=lambda s: len(self._free[s]))
        need, free = self.pages_for(tokens), self._free[shard]
        if need > len(free):
            raise Exhausted(f"{ticket} needs {need} pages for {tokens} tokens; the emptiest shard has {len(free)} free")
        pages = np.array([heapq.heappop(free) for _ in range(need)], np.int32)
        pages.setflags(write=False)
        self._reserved[ticket] = Reservation(ticket, shard, pages, tokens, self.states.take(shard) if stateful else 0)
        return self._reserved[ticket]

    def fork(self, ticket: str) -> Reservation:
        """Moves the ticket's writes to a fresh slot of its shard and leaves the former one to those who hold it.

        The ticket's next step reads the former slot and writes the new one, so one hold must last until that step is dispatched.

        Raises:
            InvalidInput: the ticket holds no slot, or nobody holds it: the former slot would be free to be overwritten.
            Exhausted: the shard has no free slot right now; nothing has changed.
        """
        before = self._find(ticket)
        if not self.states.readers(before.shard, before.slot):
            raise InvalidInput("ticket", ticket, f"a ticket whose state slot is held (slot {before.slot} of shard {before.shard} is not)")
        slot = self.states.take(before.shard)
        self.states.give(before.shard, before.slot)
        self._reserved[ticket] = dataclasses.replace(before, slot=slot)
        return self._reserved[ticket]

    def free(self, ticket: str) -> None:
        """Returns the ticket's pages and its slot; InvalidInput when it holds none."""
        reservation = self._find(ticket)
        del self._reserved[ticket]
        for page in reservation.pages.tolist():
            heapq.heappush(self._free[reservation.shard], page)
        if reservation.slot:
            self.states.give(reservation.shard, reservation.slot)

    def _find(self, ticket: str) -> Reservation:
        if ticket not in self._reserved:
            raise InvalidInput("ticket", ticket, "a ticket that holds pages (never reserved, or freed before)")
        return self._reserved[ticket]


class SlotAllocator:
    """Decode rows: slot r belongs to shard r // (slots / shards). Lowest free slot of a shard first, so small buckets stay usable."""

    def __init__(self, slots: int, shards: int = 1):
        """Raises InvalidInput unless `slots` is a positive multiple of `shards`."""
        if shards < 1:
            raise InvalidInput("shards", shards, "an integer >= 1")
        if slots < 1 or slots % shards:
            raise InvalidInput("slots", slots, f"a positive multiple of the {shards} data shards")
        self.slots, self.shards = slots, shards
        self.per_shard = slots // shards
        self._free = [list(range(s * self.per_shard, (s + 1) * self.per_shard)) for s in range(shards)]
        self._held: dict[str, int] = {}

    @property
    def slots_free(self) -> int:
        """Free slots over all shards."""
        return sum(map(len, self._free))

    def reserve(self, ticket: str, shard: int) -> int:
        """Takes the shard's lowest free slot.

        Raises:
            InvalidInput: the ticket already holds a slot, or there is no such shard.
            Exhausted: the shard has no free slot right now.
        """
        if ticket in self._held:
            raise InvalidInput("ticket", ticket, "a ticket that holds no slot yet")
        if not 0 <= shard < self.shards:
            raise InvalidInput("shard", shard, f"0..{self.shards - 1}")
        if not self._free[shard]:
            raise Exhausted(f"all {self.per_shard} slots of shard {shard} are taken")
        self._held[ticket] = heapq.heappop(self._free[shard])
        return self._held[ticket]

    def free(self, ticket: str) -> None:
        """Returns the ticket's slot; InvalidInput when it holds none."""
        if ticket not in self._held:
            raise InvalidInput("ticket", ticket, "a ticket that holds a slot (never reserved, or freed before)")
        slot = self._held.pop(ticket)
        heapq.heappush(self._free[slot // self.per_shard], slot)

    def rows_needed(self) -> int:
        """Rows that a bucket must have to hold every taken slot by `bucket_row`; 0 when none is taken."""
        return self.shards * max((slot % self.per_shard + 1 for slot in self._held.values()), default=0)

    def bucket_row(self, slot: int, rows: int) -> int:
        """Row of `slot` in a bucket of `rows` rows (a multiple of shards, >= `rows_needed()`): same place in its shard's block."""
        return slot // self.per_shard * (rows // self.shards) + slot % self.per_shard

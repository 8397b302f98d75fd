"""Who owns which page and which decode row: pure accounting for one engine, called from its engine thread only.

Page ids are local to a data shard; page 0 of every shard is a dummy that padded rows may read and write.
"""

import dataclasses
import heapq

import numpy as np
from jaxtyping import Int32

from prfaas_jax.errors import Exhausted, InvalidInput


@dataclasses.dataclass(frozen=True, eq=False)
class Reservation:
    """Pages of one request, in order of token position.

    Attributes:
        ticket: the request.
        shard: data shard that owns the pages.
        pages: page ids within the shard, ascending, never 0; enough for `tokens`.
        tokens: tokens that were asked for.
    """

    ticket: str
    shard: int
    pages: Int32[np.ndarray, " P"]
    tokens: int


class PageAllocator:
    """Hands out whole requests' worth of pages or nothing; lowest ids first, so that runs are reproducible.

    Freed pages may be handed out at once: steps form a chain through the donated pools, so what is dispatched later runs later.
    """

    def __init__(self, pages: int, page_size: int, shards: int = 1):
        """`pages` per shard, the dummy included; `page_size` in tokens. Raises InvalidInput when nothing could ever be reserved."""
        for field, value, least in (("pages", pages, 2), ("page_size", page_size, 1), ("shards", shards, 1)):
            if value < least:
                raise InvalidInput(field, value, f"an integer >= {least}" + (" (page 0 is a dummy)" if field == "pages" else ""))
        self.pages, self.page_size, self.shards = pages, page_size, shards
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
        """Reserves pages for `tokens` tokens on the shard with most free pages, lowest index at a tie; all or nothing.

        Raises:
            InvalidInput: `tokens` can never fit, or the ticket already holds pages.
            Exhausted: not enough free pages on any one shard right now.
        """
        if ticket in self._reserved:
            raise InvalidInput("ticket", ticket, "a ticket that holds no pages yet")
        if not 1 <= tokens <= self.max_tokens:
            raise InvalidInput("tokens", tokens, f"1..{self.max_tokens}, what {self.pages - 1} pages of {self.page_size} tokens hold")
        shard = max(range(self.shards), key=lambda s: len(self._free[s]))
        need, free = self.pages_for(tokens), self._free[shard]
        if need > len(free):
            raise Exhausted(f"{ticket} needs {need} pages for {tokens} tokens; the emptiest shard has {len(free)} free")
        pages = np.array([heapq.heappop(free) for _ in range(need)], np.int32)
        pages.setflags(write=False)
        self._reserved[ticket] = Reservation(ticket, shard, pages, tokens)
        return self._reserved[ticket]

    def free(self, ticket: str) -> None:
        """Returns the ticket's pages; InvalidInput when it holds none."""
        if ticket not in self._reserved:
            raise InvalidInput("ticket", ticket, "a ticket that holds pages (never reserved, or freed before)")
        reservation = self._reserved.pop(ticket)
        for page in reservation.pages.tolist():
            heapq.heappush(self._free[reservation.shard], page)


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

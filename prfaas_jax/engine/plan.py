"""The planning half of a step: plain numpy arrays that say which rows, which pages and how to sample.

On many hosts, host 0 plans and every host executes the same arrays in the same order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from prfaas_jax.engine.api import SamplingParams

# A plan's leaves are numpy arrays when planned, traced arrays inside a step, shardings when its placement is described.
Leaf = Any


class SamplingRows(NamedTuple):
    """Sampling parameters per row; temperature 0 is greedy."""

    temperature: Float32[Leaf, " B"]
    top_k: Int32[Leaf, " B"]
    top_p: Float32[Leaf, " B"]
    seed: UInt32[Leaf, " B"]

    @classmethod
    def greedy(cls, rows: int) -> "SamplingRows":
        """What padded rows use."""
        return cls(np.zeros(rows, np.float32), np.zeros(rows, np.int32), np.ones(rows, np.float32), np.zeros(rows, np.uint32))

    def put(self, row: int, params: SamplingParams) -> None:
        """Fills one row."""
        self.temperature[row], self.top_k[row] = params.temperature, params.top_k
        self.top_p[row], self.seed[row] = params.top_p, params.seed


class PrefillPlan(NamedTuple):
    """One prefill step: row b computes prompt tokens [start, start + valid) of its request; padded rows have 0 valid.

    Windows and states are read from `read_slot` (not at all at start 0) and written to `write_slot`; both are 0 in padded rows.
    """

    tokens: Int32[Leaf, "B T"]
    start: Int32[Leaf, " B"]
    valid: Int32[Leaf, " B"]
    table: Int32[Leaf, "B MP"]
    read_slot: Int32[Leaf, " B"]
    write_slot: Int32[Leaf, " B"]
    sampling: SamplingRows


class DecodePlan(NamedTuple):
    """One decode step: row b has `length` tokens cached and now computes `token` at position `length`; padded rows have length 0.

    Windows and states are read and written at `slot`.
    """

    token: Int32[Leaf, " B"]
    length: Int32[Leaf, " B"]
    table: Int32[Leaf, "B MP"]
    slot: Int32[Leaf, " B"]
    sampling: SamplingRows


class IngestPlan(NamedTuple):
    """Where received rows go, one row being one layer's token, or state: its page (or slot) of the pool and its offset there.

    Per data shard; shards that do not own a row's request point at the dummy page 0.
    """

    page: Int32[Leaf, "shards R"]
    offset: Int32[Leaf, "shards R"]


class PrefillInput(NamedTuple):
    """One occupied row of a prefill step."""

    row: int
    prompt: Sequence[int]
    start: int
    valid: int
    pages: np.ndarray
    sampling: SamplingParams
    read_slot: int = 0
    write_slot: int = 0


class DecodeInput(NamedTuple):
    """One occupied row of a decode step."""

    row: int
    token: int
    length: int
    pages: np.ndarray
    sampling: SamplingParams
    slot: int = 0


def plan_prefill(rows: Sequence[PrefillInput], batch: int, tokens: int, width: int) -> PrefillPlan:
    """Lays rows into a [batch, tokens] bucket; `width` is the block table's."""
    plan = PrefillPlan(
        np.zeros((batch, tokens), np.int32),
        np.zeros(batch, np.int32),
        np.zeros(batch, np.int32),
        np.zeros((batch, width), np.int32),
        np.zeros(batch, np.int32),
        np.zeros(batch, np.int32),
        SamplingRows.greedy(batch),
    )
    for r in rows:
        plan.tokens[r.row, : r.valid] = r.prompt[r.start : r.start + r.valid]
        plan.start[r.row], plan.valid[r.row] = r.start, r.valid
        plan.read_slot[r.row], plan.write_slot[r.row] = r.read_slot, r.write_slot
        plan.table[r.row, : len(r.pages)] = r.pages
        plan.sampling.put(r.row, r.sampling)
    return plan


def plan_decode(rows: Sequence[DecodeInput], batch: int, width: int) -> DecodePlan:
    """Lays rows into a bucket of `batch` rows; `width` is the block table's."""
    plan = DecodePlan(
        np.zeros(batch, np.int32),
        np.zeros(batch, np.int32),
        np.zeros((batch, width), np.int32),
        np.zeros(batch, np.int32),
        SamplingRows.greedy(batch),
    )
    for r in rows:
        plan.token[r.row], plan.length[r.row], plan.slot[r.row] = r.token, r.length, r.slot
        plan.table[r.row, : len(r.pages)] = r.pages
        plan.sampling.put(r.row, r.sampling)
    return plan


class Rows(NamedTuple):
    """Addresses, in a data shard's pool, of received rows; the layer is part of the page, see kvcache/pools.py."""

    shard: int
    page: Int32[np.ndarray, " R"]
    offset: Int32[np.ndarray, " R"]


def paged_rows(pages: np.ndarray, per_layer: int, page_size: int, layers: tuple[int, int], tokens: tuple[int, int], shard: int) -> Rows:
    """Of absolute positions `tokens` in a request's pages, layer by layer; pools have `per_layer` pages per layer."""
    positions = np.arange(*tokens)
    page = np.arange(*layers)[:, None] * per_layer + pages[positions // page_size]
    return Rows(shard, page.ravel(), np.tile(positions % page_size, layers[1] - layers[0]))


def slot_rows(slot: int, per_layer: int, ring: int, layers: tuple[int, int], tokens: tuple[int, int], shard: int) -> Rows:
    """Of absolute positions `tokens` in a slot's rings of `ring` tokens (1 for a state), layer by layer.

    No more than `ring` positions: two of them would meet in one place.
    """
    page = np.repeat(np.arange(*layers) * per_layer + slot, tokens[1] - tokens[0])
    return Rows(shard, page, np.tile(np.arange(*tokens) % ring, layers[1] - layers[0]))


def plan_ingest(rows: Sequence[Rows], size: int, shards: int) -> IngestPlan:
    """Lays rows one after the other, padded to `size` with the dummy page."""
    plan = IngestPlan(np.zeros((shards, size), np.int32), np.zeros((shards, size), np.int32))
    start = 0
    for shard, page, offset in rows:
        stop = start + len(page)
        plan.page[shard, start:stop], plan.offset[shard, start:stop] = page, offset
        start = stop
    return plan

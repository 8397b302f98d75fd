"""Received cache on its way into the pools: cut into the sizes that scatters are compiled for, some bytes per step at a time."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from prfaas_jax.engine.plan import Rows, paged_rows, plan_ingest, slot_rows
from prfaas_jax.engine.runner import Runner
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.kvcache.pages import Reservation
from prfaas_jax.kvcache.segments import CARRIER, SegmentKey

Done = Callable[[], None]


# Group, tensor and codec: what one scatter can take together.
_Stream = tuple[int, int, str]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows `[R, heads, width]` of one stream, no more than one scatter takes, waiting for it; `done` is set on a block's last piece."""

    ticket: str
    number: int
    rows: Rows
    data: np.ndarray
    done: Done | None


class Received:
    """Blocks, and the scatters that still read them. Called from the engine thread only.

    Blocks of one tensor and codec are scattered in order of arrival, small ones together; the tensor whose first block came first is next.
    A block's `done` is called exactly once: when its last scatter has read it, or when it is dropped before.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._wire_spec = functools.cache(lambda codec: codec.wire_spec(runner.spec))
        self._numbers = itertools.count()
        self._pieces: dict[_Stream, collections.deque[_Piece]] = {}
        self._fences: collections.deque[tuple[Any, Done]] = collections.deque()
        self._pending: collections.Counter[str] = collections.Counter()

    @property
    def waiting(self) -> bool:
        """Whether there is something to scatter."""
        return bool(self._pieces)

    def pending(self, ticket: str) -> int:
        """Pieces of a ticket that no dispatched scatter has taken."""
        return self._pending[ticket]

    def check(self, key: SegmentKey, block: np.ndarray, codec: CacheCodec, max_length: int) -> None:
        """Raises InvalidInput unless the block, of all heads and as `codec` writes it, can belong to some request.

        Requests have up to `max_length` tokens.
        """
        spec = self._wire_spec(codec)
        # What stays of the shortest request that has these tokens: the block stays of no other state, and of no shorter window.
        key.check(spec, min(key.tokens[1], max_length))
        tensor = key.tensor_spec(spec)
        whole = key.all_heads(spec)
        if key != whole or block.shape != key.shape(spec) or block.dtype != CARRIER[tensor.dtype]:
            expected = f"{whole} of shape {whole.shape(spec)} and dtype {CARRIER[tensor.dtype]}"
            raise InvalidInput("block shape", (key, block.shape, block.dtype.name), expected)

    def push(self, held: Reservation, key: SegmentKey, block: np.ndarray, codec: CacheCodec, done: Done) -> None:
        """Queues a checked block for its owner's pages or slot."""
        stream = key.group, key.tensor, codec.of(self._runner.spec.groups[key.group].cache.kind)
        most = self._runner.ingest_sizes(key.group)[-1]
        shard, page, offset = self._addresses(held, key)
        data = block.reshape(-1, *block.shape[2:])
        for start in range(0, len(data), most):
            part = slice(start, start + most)
            last = done if start + most >= len(data) else None
            piece = _Piece(held.ticket, next(self._numbers), Rows(shard, page[part], offset[part]), data[part], last)
            self._pieces.setdefault(stream, collections.deque()).append(piece)
            self._pending[held.ticket] += 1

    def drop(self, ticket: str) -> None:
        """Forgets what has not been scattered of a ticket."""
        dropped = [piece for pieces in self._pieces.values() for piece in pieces if piece.ticket == ticket]
        kept = {stream: collections.deque(p for p in pieces if p.ticket != ticket) for stream, pieces in self._pieces.items()}
        self._pieces = {stream: pieces for stream, pieces in kept.items() if pieces}
        del self._pending[ticket]
        for piece in dropped:
            if piece.done is not None:
                piece.done()

    def scatter(self, budget: int | None) -> list[str]:
        """Dispatches scatters until `budget` bytes are used up (None: all); the tickets that nothing is pending of any more."""
        through = []
        while self._pieces and (budget is None or budget > 0):
            stream = min(self._pieces, key=lambda s: self._pieces[s][0].number)
            pieces = self._together(stream)
            data = self._joined(stream, pieces)
            fence = self._runner.ingest(*stream, data, plan_ingest([p.rows for p in pieces], len(data), self._runner.shards))
            # Not earlier: if the scatter cannot be dispatched, the failure must still release the blocks.
            for _ in pieces:
                self._pieces[stream].popleft()
            if not self._pieces[stream]:
                del self._pieces[stream]
            self._fences.extend((fence, piece.done) for piece in pieces if piece.done is not None)
            if budget is not None:
                budget -= data.nbytes
            for piece in pieces:
                self._pending[piece.ticket] -= 1
                if not self._pending[piece.ticket]:
                    del self._pending[piece.ticket]
                    through.append(piece.ticket)
        return through

    def _together(self, stream: _Stream) -> list[_Piece]:
        """A stream's first pieces, as many as one scatter takes."""
        most, taken, rows = self._runner.ingest_sizes(stream[0])[-1], [], 0
        for piece in self._pieces[stream]:
            rows += len(piece.data)
            if rows > most:
                break
            taken.append(piece)
        return taken

    def _joined(self, stream: _Stream, pieces: list[_Piece]) -> np.ndarray:
        """Rows of the smallest size that takes them: as they lie if they fill it, otherwise copied and padded with zeros."""
        count = sum(len(piece.data) for piece in pieces)
        size = next(size for size in self._runner.ingest_sizes(stream[0]) if size >= count)
        first = pieces[0].data
        if len(first) == size:
            return first
        padding = np.zeros((size - count, *first.shape[1:]), first.dtype)
        return np.concatenate([*(piece.data for piece in pieces), padding])

    def _addresses(self, held: Reservation, key: SegmentKey) -> Rows:
        runner, cached = self._runner, self._runner.spec.groups[key.group]
        per_layer = runner.geometry.per_layer(cached)
        if cached.cache.kind == "paged":
            return paged_rows(held.pages, per_layer, runner.geometry.page_size, key.layers, key.tokens, held.shard)
        return slot_rows(held.slot, per_layer, cached.cache.window or 1, key.layers, key.tokens, held.shard)

    def release(self, wait: bool) -> None:
        """Gives blocks back whose scatters are done; `wait` for all of them."""
        while self._fences and (wait or self._fences[0][0].is_ready()):
            fence, done = self._fences[0]
            jax.block_until_ready(fence)  # on every device: each may read the block itself
            self._fences.popleft()  # not earlier: a scatter that failed must still release its block
            done()

    def clear(self) -> None:
        """Forgets everything after a failed step, and gives every block back once no scatter reads it."""
        for fence, _ in self._fences:
            try:
                jax.block_until_ready(fence)
            except Exception as error:  # whatever XLA raises: the requests fail anyway, and a scatter that failed reads nothing
                logging.warning("a scatter of received KV failed: %s", error)
        releases = [piece.done for pieces in self._pieces.values() for piece in pieces if piece.done] + [done for _, done in self._fences]
        for container in (self._fences, self._pieces, self._pending):
            container.clear()
        for done in releases:
            done()

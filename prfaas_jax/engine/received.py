"""Received cache on its way into the pools: cut into the sizes that scatters are compiled for, some bytes per step at a time."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from prfaas_jax.engine.plan import IngestPlan, plan_ingest, plan_ring
from prfaas_jax.engine.runner import Runner
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.pages import Reservation
from prfaas_jax.kvcache.segments import SegmentKey, aligned_blocks

Done = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What one scatter takes, `[layers, tokens, heads, width]` of one tensor, waiting for it; `done` is set on a block's last piece."""

    held: Reservation
    key: SegmentKey
    data: np.ndarray
    done: Done | None


class Received:
    """Blocks in order of arrival, and the scatters that still read them. Called from the engine thread only.

    A block's `done` is called exactly once: when its last scatter has read it, or when it is dropped before.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._pieces: collections.deque[_Piece] = collections.deque()
        self._fences: collections.deque[tuple[Any, Done]] = collections.deque()
        self._pending: collections.Counter[str] = collections.Counter()

    @property
    def waiting(self) -> bool:
        """Whether there is something to scatter."""
        return bool(self._pieces)

    def pending(self, ticket: str) -> int:
        """Scatters of a ticket that have not been dispatched."""
        return self._pending[ticket]

    def check(self, key: SegmentKey, block: np.ndarray, max_length: int) -> None:
        """Raises InvalidInput unless the block can belong to some request of up to `max_length` tokens.

        It must have all heads, and all layers unless it holds states.
        """
        spec = self._runner.spec
        # What stays of the shortest request that has these tokens: the block stays of no other state, and of no shorter window.
        key.check(spec, min(key.tokens[1], max_length))
        group = spec.groups[key.group]
        layers = key.layers if group.cache.kind == "state" else (0, len(group.layers))
        whole = dataclasses.replace(key, layers=layers, heads=(0, key.tensor_spec(spec).heads))
        if key != whole or block.shape != key.shape(spec):
            raise InvalidInput("block shape", (key, block.shape), f"{whole} of shape {whole.shape(spec)}")

    def push(self, held: Reservation, key: SegmentKey, block: np.ndarray, done: Done) -> None:
        """Queues a checked block for its owner's pages or slot."""
        runner, start = self._runner, key.tokens[0]
        pieces = [
            dataclasses.replace(key, layers=layers, tokens=tokens)
            for layers in aligned_blocks(key.layers, runner.ingest_layers(key.group))
            for tokens in aligned_blocks(key.tokens, runner.ingest_tokens(key.group))
        ]
        for piece in pieces:
            (first, last), (a, b) = piece.layers, piece.tokens
            data = block[first - key.layers[0] : last - key.layers[0], a - start : b - start]
            self._pieces.append(_Piece(held, piece, data, done if piece is pieces[-1] else None))
        self._pending[held.ticket] += len(pieces)

    def drop(self, ticket: str) -> None:
        """Forgets what has not been scattered of a ticket."""
        dropped = [piece for piece in self._pieces if piece.held.ticket == ticket]
        self._pieces = collections.deque(piece for piece in self._pieces if piece.held.ticket != ticket)
        del self._pending[ticket]
        for piece in dropped:
            if piece.done is not None:
                piece.done()

    def scatter(self, budget: int | None) -> list[str]:
        """Dispatches scatters until `budget` bytes are used up (None: all); the tickets that nothing is pending of any more."""
        through = []
        while self._pieces and (budget is None or budget > 0):
            piece = self._pieces[0]
            key, data = piece.key, self._padded(piece)
            fence = self._runner.ingest(key.group, key.tensor, key.layers[0], data, self._plan(piece))
            self._pieces.popleft()  # not earlier: if the scatter cannot be dispatched, the failure must still release the block
            if piece.done is not None:
                self._fences.append((fence, piece.done))
            if budget is not None:
                budget -= data.nbytes
            ticket = piece.held.ticket
            self._pending[ticket] -= 1
            if not self._pending[ticket]:
                del self._pending[ticket]
                through.append(ticket)
        return through

    def _padded(self, piece: _Piece) -> np.ndarray:
        size = self._runner.ingest_tokens(piece.key.group)
        layers, tokens, *rest = piece.data.shape
        if tokens == size:
            return piece.data
        data = np.zeros((layers, size, *rest), piece.data.dtype)
        data[:, :tokens] = piece.data
        return data

    def _plan(self, piece: _Piece) -> IngestPlan:
        runner, held, key = self._runner, piece.held, piece.key
        cache, size = runner.spec.groups[key.group].cache, runner.ingest_tokens(key.group)
        if cache.kind == "paged":
            return plan_ingest(held.pages, runner.geometry.page_size, key.tokens, size, held.shard, runner.shards)
        return plan_ring(held.slot, cache.window or 1, key.tokens, size, held.shard, runner.shards)

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
        releases = [piece.done for piece in self._pieces if piece.done] + [done for _, done in self._fences]
        for container in (self._fences, self._pieces, self._pending):
            container.clear()
        for done in releases:
            done()

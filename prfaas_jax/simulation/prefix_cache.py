"""The prefix cache of one cluster: blocks that any request may reuse, and state checkpoints without which a hybrid model cannot.

A recurrent state is exact at one length only, so a prefix hit is as long as the longest checkpoint up to which all blocks are still
there. Pages and checkpoints share one memory; what was used least recently goes first.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.footprint import KvFootprint

# Cached tokens: one number for all rows of a view, or one per row.
Held = int | Int64[np.ndarray, " rows"]


def held_at(held: Held, row: int) -> int:
    """Tokens that row `row` holds."""
    return held if isinstance(held, int) else int(held[row])


def held_column(held: list[int]) -> Held:
    """What a `Request` takes: several rows in an array, a single one as it is, none as 0."""
    return np.array(held, np.int64) if len(held) > 1 else sum(held)


class PrefixCache:
    """LRU over block ids (an id stands for the whole prefix up to its end) and over checkpoints at the ends of blocks.

    A checkpoint is kept at the last whole block of every prompt and, where this side computed it, at every `checkpoint_blocks`-th block.
    Windows are part of it: they too are exact at one length only.
    """

    def __init__(self, kv: KvFootprint, block_tokens: int, capacity_bytes: float, checkpoint_blocks: int = 16):
        if block_tokens < 1:
            raise InvalidInput("block_tokens", block_tokens, "tokens per block >= 1")
        if not capacity_bytes >= 0:
            raise InvalidInput("prefix_cache.capacity_bytes", capacity_bytes, "bytes >= 0")
        if checkpoint_blocks < 1:
            raise InvalidInput("prefix_cache.checkpoint_blocks", checkpoint_blocks, "blocks between checkpoints >= 1")
        self.block_tokens, self.capacity_bytes = block_tokens, capacity_bytes
        self._block_bytes = kv.bytes_per_token * block_tokens
        self._checkpoint_bytes = kv.state_bytes + sum(kept * per_token for kept, per_token in kv.windows)
        self._every = checkpoint_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._checkpoints: OrderedDict[int, None] = OrderedDict()
        self.used_bytes = 0.0

    def match(self, blocks: Sequence[int], tokens: int) -> int:
        """Tokens of the longest usable prefix, always fewer than the prompt's: its last token has to be computed. Nothing is touched."""
        whole = min(len(blocks), (tokens - 1) // self.block_tokens)
        hit = len(list(itertools.takewhile(self._blocks.__contains__, blocks[:whole])))
        if self._checkpoint_bytes:
            while hit and blocks[hit - 1] not in self._checkpoints:
                hit -= 1
        return hit * self.block_tokens

    def insert(self, blocks: Sequence[int], tokens: int, known: int = 0) -> None:
        """Keeps the whole blocks of a prompt and its checkpoints; evicts what does not fit beside them.

        Args:
            blocks: the prompt's.
            tokens: its length.
            known: tokens of it that this side did not compute: a prefix that it had, or all of a prompt that it received with one state.
                No checkpoint comes into being there, those that are there count as used.
        """
        whole = min(len(blocks), tokens // self.block_tokens)
        if not whole or not self.capacity_bytes:
            return
        held = self._blocks
        before, touch = len(held), held.move_to_end
        # The deepest block first: of a prefix, the end is the first to go.
        for block in blocks[whole - 1 :: -1]:
            if block in held:
                touch(block)
            else:
                held[block] = None
        self.used_bytes += (len(held) - before) * self._block_bytes
        if self._checkpoint_bytes:
            every, past = self._every, known // self.block_tokens
            self._checkpoint(blocks[whole - 1])
            for n in range((whole - 1) // every * every, 0, -every):
                if n > past or blocks[n - 1] in self._checkpoints:
                    self._checkpoint(blocks[n - 1])
        if self.used_bytes > self.capacity_bytes:
            self._evict()

    def _checkpoint(self, block: int) -> None:
        if block in self._checkpoints:
            self._checkpoints.move_to_end(block)
        else:
            self._checkpoints[block] = None
            self.used_bytes += self._checkpoint_bytes

    def clear(self) -> None:
        """Forgets everything, as a cluster that failed does."""
        self._blocks.clear()
        self._checkpoints.clear()
        self.used_bytes = 0.0

    def _evict(self) -> None:
        used, blocks, checkpoints = self.used_bytes, self._blocks, self._checkpoints
        while used > self.capacity_bytes:
            # Blocks without a checkpoint further down are useless to a hybrid, so both kinds go in turns by their share of the memory.
            if len(checkpoints) * self._checkpoint_bytes * 2 > used:
                checkpoints.popitem(last=False)
                used -= self._checkpoint_bytes
            else:
                block, _ = blocks.popitem(last=False)
                used -= self._block_bytes
                if block in checkpoints:
                    del checkpoints[block]
                    used -= self._checkpoint_bytes
        self.used_bytes = used

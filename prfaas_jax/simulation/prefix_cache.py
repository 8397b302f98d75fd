"""The prefix cache of one cluster: blocks that any request may reuse, and state checkpoints without which a hybrid model cannot.

A recurrent state is exact at one length only, so a prefix hit is as long as the longest checkpoint up to which all blocks are still
there. Pages and checkpoints share one memory; what was used least recently goes first.
"""

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.footprint import KvFootprint

# Blocks that prompts may note beyond twice those that are held, before what is superseded is forgotten.
FEW = 1024

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

    Of blocks that one prompt used, the deepest goes first: so what is held of a prompt is always a prefix of it, which can be bisected.
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
        self._blocks: dict[int, int] = {}  # block -> number of the prompt that used it last
        self._prompts: deque[tuple[int, Sequence[int]]] = deque()  # number and blocks, in order of use; what others used since, too
        self._numbered = self._noted = 0  # prompts so far, blocks in all of `_prompts`
        self._going = self._least_recent()
        self._checkpoints: OrderedDict[int, None] = OrderedDict()
        self.used_bytes = 0.0

    def match(self, blocks: Sequence[int], tokens: int) -> int:
        """Tokens of the longest usable prefix, always fewer than the prompt's: its last token has to be computed. Nothing is touched."""
        held = self._blocks
        whole = min(len(blocks), (tokens - 1) // self.block_tokens)
        if not whole or blocks[0] not in held:
            return 0
        hit = bisect_left(blocks, True, 1, whole, key=lambda block: block not in held)
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
        held, used = self._blocks, blocks[:whole]
        before = len(held)
        self._numbered += 1
        held.update(dict.fromkeys(used, self._numbered))
        self._prompts.append((self._numbered, used))
        self._noted += whole
        if self._noted > 2 * len(held) + FEW:
            self._forget_superseded()
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
        self._prompts.clear()
        self._checkpoints.clear()
        self._noted, self.used_bytes = 0, 0.0

    def _least_recent(self) -> Iterator[int]:
        """Blocks in the order in which they have to go, and go."""
        while True:
            number, used = self._prompts.popleft()
            self._noted -= len(used)
            for block in reversed(used):
                if self._blocks.get(block) == number:
                    yield block

    def _forget_superseded(self) -> None:
        """Keeps of every prompt the blocks that no later one used: they are its last ones, and of all prompts as many as are held."""
        held, alive = self._blocks, deque[tuple[int, Sequence[int]]]()
        for number, used in self._prompts:
            left = used[bisect_left(used, True, key=lambda block: held.get(block) == number) :]
            if left:
                alive.append((number, left))
        self._prompts, self._noted = alive, sum(len(left) for _, left in alive)

    def _evict(self) -> None:
        used, blocks, checkpoints = self.used_bytes, self._blocks, self._checkpoints
        while used > self.capacity_bytes:
            # Blocks without a checkpoint further down are useless to a hybrid, so both kinds go in turns by their share of the memory.
            if len(checkpoints) * self._checkpoint_bytes * 2 > used:
                checkpoints.popitem(last=False)
                used -= self._checkpoint_bytes
            else:
                block = next(self._going)
                del blocks[block]
                used -= self._block_bytes
                if block in checkpoints:
                    del checkpoints[block]
                    used -= self._checkpoint_bytes
        self.used_bytes = used

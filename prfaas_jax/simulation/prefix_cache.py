"""The prefix cache of one cluster: blocks that any request may reuse, and state checkpoints without which a hybrid model cannot.

A recurrent state is exact at one length only, so a prefix hit is as long as the longest checkpoint up to which all blocks are still
there. Pages and checkpoints share one memory; what was used least recently goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.footprint import KvFootprint


class PrefixCache:
    """LRU over block ids (an id stands for the whole prefix up to its end) and over checkpoints at the ends of blocks.

    A checkpoint is kept at the last whole block of every prompt and at every `checkpoint_blocks`-th block. Windows are part of it: they
    too are exact at one length only.
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
        hit, held, checkpoints = 0, self._blocks, self._checkpoints
        if not self._checkpoint_bytes:
            while hit < whole and blocks[hit] in held:
                hit += 1
            return hit * self.block_tokens
        for i in range(whole):
            if blocks[i] not in held:
                break
            if blocks[i] in checkpoints:
                hit = i + 1
        return hit * self.block_tokens

    def insert(self, blocks: Sequence[int], tokens: int) -> None:
        """Keeps the whole blocks of a prompt that was computed or received, and its checkpoints; evicts what does not fit beside them."""
        whole = min(len(blocks), tokens // self.block_tokens)
        if not whole or not self.capacity_bytes:
            return
        held = self._blocks
        # The deepest block first: of a prefix, the end is the first to go.
        for i in range(whole - 1, -1, -1):
            block = blocks[i]
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
                self.used_bytes += self._block_bytes
        if self._checkpoint_bytes:
            kept = self._checkpoints
            for i in (whole - 1, *range(whole - whole % self._every - 1, -1, -self._every)):
                if i < 0:
                    continue
                block = blocks[i]
                if block in kept:
                    kept.move_to_end(block)
                else:
                    kept[block] = None
                    self.used_bytes += self._checkpoint_bytes
        self._evict()

    def clear(self) -> None:
        """Forgets everything, as a cluster that failed does."""
        self._blocks.clear()
        self._checkpoints.clear()
        self.used_bytes = 0.0

    def _evict(self) -> None:
        while self.used_bytes > self.capacity_bytes:
            # Blocks without a checkpoint further down are useless to a hybrid, so both kinds go in turns by their share of the memory.
            checkpoints = len(self._checkpoints) * self._checkpoint_bytes
            if self._checkpoints and checkpoints * 2 > self.used_bytes:
                self._checkpoints.popitem(last=False)
                self.used_bytes -= self._checkpoint_bytes
            elif self._blocks:
                block, _ = self._blocks.popitem(last=False)
                self.used_bytes -= self._block_bytes
                if block in self._checkpoints:
                    del self._checkpoints[block]
                    self.used_bytes -= self._checkpoint_bytes
            else:
                self._checkpoints.popitem(last=False)
                self.used_bytes -= self._checkpoint_bytes

"""Messages in, verified full-head blocks out, within a byte budget.

Nothing here locks or waits: the puller guards every call but `Block.build` with its own lock.

Copies of a payload on this side, before the engine's scatter: the kernel's into gRPC's slices, two inside gRPC's Python layer until it is
`bytes`, none of ours where a block is one message (most are: a chunk's tokens of a few layers), else one into the block's buffer.
"""

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.segments import CARRIER, SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer.coverage import Coverage, Intervals
from prfaas_jax.transfer.wire import Header


class Buffers:
    """Host buffers for blocks. Returned ones are reused: page faults of fresh memory cost more than the copy into it."""

    def __init__(self, max_spare_bytes: int):
        self._max_spare_bytes = max_spare_bytes
        self._spare: dict[int, list[np.ndarray]] = defaultdict(list)
        self._spare_bytes = 0

    def take(self, nbytes: int) -> np.ndarray:
        """An uninitialised uint8 buffer of exactly `nbytes`."""
        if self._spare[nbytes]:
            self._spare_bytes -= nbytes
            return self._spare[nbytes].pop()
        return np.empty(nbytes, np.uint8)

    def give(self, buffer: np.ndarray) -> None:
        """Takes back a buffer that nobody reads or writes any more."""
        if self._spare_bytes + buffer.nbytes <= self._max_spare_bytes:
            self._spare_bytes += buffer.nbytes
            self._spare[buffer.nbytes].append(buffer)


@dataclasses.dataclass(eq=False)
class Block:
    """One tensor's `[layers, tokens, all heads, width]`, made of one segment or of one per head slice.

    Attributes:
        key: names all heads.
        pieces: per head slice, (offset within the slice's segment, payload); None once the block was freed.
        seen: per head slice, the byte ranges claimed so far.
        heads: heads of the slices begun so far.
        claimed: bytes that have come.
        owed: who sent how many of them, for the puller to grant again.
        buffer: what `build` filled, if it had to.
    """

    key: SegmentKey
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    nbytes: int
    pieces: dict[tuple[int, int], list[tuple[int, memoryview]]] | None = dataclasses.field(default_factory=dict)
    seen: dict[tuple[int, int], Intervals] = dataclasses.field(default_factory=dict)
    heads: Intervals = dataclasses.field(default_factory=Intervals)
    claimed: int = 0
    owed: dict[Any, int] = dataclasses.field(default_factory=dict)
    buffer: np.ndarray | None = None

    @property
    def complete(self) -> bool:
        """Every byte has come."""
        return self.claimed == self.nbytes

    def build(self, buffer: np.ndarray | None) -> np.ndarray:
        """The elements of a complete block, bfloat16 as uint16; a view of its message where it came in one, else copied into `buffer`."""
        assert self.pieces is not None
        if buffer is None:
            ((_, payload),) = next(iter(self.pieces.values()))
            return np.frombuffer(payload, self.dtype).reshape(self.shape)
        self.buffer = buffer
        for heads, pieces in self.pieces.items():
            for offset, payload in pieces:
                self._write(buffer, heads, offset, payload)
        self.pieces = {}
        return buffer.view(self.dtype).reshape(self.shape)

    @property
    def in_one_piece(self) -> bool:
        """Whether one message holds all of it."""
        return self.pieces is not None and len(self.pieces) == 1 and len(next(iter(self.pieces.values()))) == 1

    def _write(self, buffer: np.ndarray, heads: tuple[int, int], offset: int, payload: memoryview) -> None:
        """Copies bytes of the segment of `heads`, from its byte `offset` on, to their place."""
        layers, tokens, all_heads, _ = self.shape
        head_bytes = self.nbytes // (layers * tokens * all_heads)
        # One row per (layer, token): the segment's rows are contiguous, their places in the block are not unless it has all heads.
        rows = buffer.reshape(layers * tokens, all_heads * head_bytes)[:, heads[0] * head_bytes : heads[1] * head_bytes]
        size = rows.shape[1]
        data = np.frombuffer(payload, np.uint8)
        row, inside = divmod(offset, size)
        if inside:
            first = data[: size - inside]
            rows[row, inside : inside + first.size] = first
            data = data[first.size :]
            row += 1
        whole = data.size // size
        rows[row : row + whole] = data[: whole * size].reshape(whole, size)
        if rest := data.size - whole * size:
            rows[row + whole, :rest] = data[whole * size :]


class Assembly:
    """Blocks of one request in the making, and the proof of what has arrived."""

    def __init__(self, spec: CacheSpec, length: int, prefix: int, max_staging_bytes: int):
        """`spec` is the cache as it travels; the first `prefix` of `length` tokens are here already."""
        self._spec, self._length, self._prefix = spec, length, prefix
        self.max_staging_bytes = max_staging_bytes
        self.staged = 0
        self.total = spec.bytes(length, prefix)
        self.moved = 0
        self.resent = 0
        self._buffers = Buffers(max_staging_bytes)
        self._coverage = Coverage(spec, length, prefix)
        # Blocks stay known after they are handed on, without their bytes, so that a repeated message is recognised.
        self._blocks: dict[SegmentKey, Block] = {}

    @property
    def complete(self) -> bool:
        """Every byte is in place: blocks are disjoint and inside the cache, so their bytes can add up in one way only."""
        return self.moved == self.total and self._coverage.gap() is None

    def gap(self) -> str:
        """What is missing, in words."""
        return self._coverage.gap() or f"{self.total - self.moved} bytes of segments that began and never ended"

    def whole_blocks(self) -> tuple[SegmentKey, ...]:
        """Blocks of which every byte has come."""
        return tuple(key for key, block in self._blocks.items() if block.complete)

    def claim(self, header: Header, payload: memoryview) -> Block | None:
        """Keeps a checked message's raw payload; the block that it belongs in, None when it was here already.

        A block that this completes is to be built and handed on.

        Raises TransferError when the message overlaps others in any other way than being a repetition, when its block exceeds the staging,
        or when the sender goes beyond what it was granted.
        """
        nbytes = payload.nbytes
        block = self._block(header.key)
        if block.complete:
            self.resent += nbytes
            return None
        heads = header.key.heads
        if nbytes == block.nbytes and not block.claimed:
            self._keep(block, heads, 0, payload, header.again)
            return block
        if heads not in block.seen:
            if block.heads.overlap(*heads):
                raise TransferError(f"{header.key} overlaps heads that another segment carries")
            block.heads.add(*heads)
            block.seen[heads] = Intervals()
        start, stop = header.offset, header.offset + nbytes
        overlap = block.seen[heads].overlap(start, stop)
        if overlap == nbytes:
            self.resent += nbytes
            return None
        if overlap:
            raise TransferError(f"bytes [{start}, {stop}) of {header.key} overlap {overlap} bytes that came before")
        self._keep(block, heads, start, payload, header.again)
        block.seen[heads].add(start, stop)
        return block

    def _keep(self, block: Block, heads: tuple[int, int], offset: int, payload: memoryview, again: bool) -> None:
        nbytes = payload.nbytes
        if self.staged + nbytes > self.max_staging_bytes:
            raise TransferError(f"the sender goes beyond its grant: {self.staged} + {nbytes} bytes in {self.max_staging_bytes} of staging")
        assert block.pieces is not None
        block.pieces.setdefault(heads, []).append((offset, payload))
        block.claimed += nbytes
        self.staged += nbytes
        self.moved += nbytes
        self.resent += nbytes * again

    def buffer_for(self, block: Block) -> np.ndarray | None:
        """What `Block.build` needs: nothing where the block came in one message."""
        return None if block.in_one_piece else self._buffers.take(block.nbytes)

    def free(self, block: Block) -> bool:
        """The block's reader is done with it; whether it was not before."""
        if block.pieces is None:
            return False
        if block.buffer is not None:
            self._buffers.give(block.buffer)
        block.pieces = block.buffer = None
        self.staged -= block.nbytes
        return True

    def forget_partial(self) -> int:
        """Drops blocks that began and did not end, so that they may come again in any cut; the bytes that were dropped."""
        partial = [block for block in self._blocks.values() if not block.complete]
        for block in partial:
            self.forget(block)
        return sum(block.claimed for block in partial)

    def forget(self, block: Block) -> None:
        """Drops one block, staged or freed, as if nothing of it had come; what came again then counts as sent again."""
        if block.pieces is not None:
            self.staged -= block.claimed
        block.pieces = block.buffer = None
        self.moved -= block.claimed
        self.resent += block.claimed
        self._coverage.drop(block.key)
        del self._blocks[block.key]

    def _block(self, key: SegmentKey) -> Block:
        """The block that a segment belongs in, begun if need be."""
        whole = key.all_heads(self._spec)
        block = self._blocks.get(whole)
        if block is None:
            nbytes = whole.nbytes(self._spec)
            if nbytes > self.max_staging_bytes:
                raise TransferError(f"{whole} has {nbytes} bytes, more than the {self.max_staging_bytes} bytes of staging")
            self._coverage.claim(whole)
            block = self._blocks[whole] = Block(whole, whole.shape(self._spec), CARRIER[key.tensor_spec(self._spec).dtype], nbytes)
        return block

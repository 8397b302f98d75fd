"""Messages in, verified full-head blocks out, within a byte budget.

Nothing here locks or waits: the puller guards every call but `Block.write` with its own lock.
"""

import dataclasses
from collections import defaultdict

import numpy as np

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer.coverage import Coverage, Intervals
from prfaas_jax.transfer.wire import Header

# How a block shows its elements: numpy has no bfloat16, so those bits travel as uint16.
VIEW_DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}


class Staging:
    """Host buffers under a byte budget. Returned ones are reused: page faults of fresh memory cost more than the copy into it."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.in_use = 0
        self._spare: dict[int, list[np.ndarray]] = defaultdict(list)
        self._spare_bytes = 0

    def fits(self, nbytes: int) -> bool:
        """Whether `take` would stay within the budget now."""
        return self.in_use + nbytes <= self.max_bytes

    def take(self, nbytes: int) -> np.ndarray:
        """An uninitialised uint8 buffer of exactly `nbytes`; the caller has asked `fits`."""
        self.in_use += nbytes
        if self._spare[nbytes]:
            self._spare_bytes -= nbytes
            return self._spare[nbytes].pop()
        if self.in_use + self._spare_bytes > self.max_bytes:
            self._spare.clear()
            self._spare_bytes = 0
        return np.empty(nbytes, np.uint8)

    def give(self, buffer: np.ndarray) -> None:
        """Takes back a buffer that nobody reads or writes any more."""
        self.in_use -= buffer.nbytes
        self._spare_bytes += buffer.nbytes
        self._spare[buffer.nbytes].append(buffer)


@dataclasses.dataclass(eq=False)
class Block:
    """One tensor's `[layers, tokens, all heads, width]`, filled by one segment or by one per head slice.

    Attributes:
        key: names all heads.
        buffer: the bytes, None once handed on.
        seen: per head slice, the byte ranges claimed so far.
        heads: heads of the slices begun so far.
        written: bytes in place.
    """

    key: SegmentKey
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    buffer: np.ndarray | None
    seen: dict[tuple[int, int], Intervals] = dataclasses.field(default_factory=dict)
    heads: Intervals = dataclasses.field(default_factory=Intervals)
    written: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole block."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def write(self, heads: tuple[int, int], offset: int, payload: memoryview) -> None:
        """Copies bytes of the segment of `heads`, from its byte `offset` on, to their place; needs no lock, claimed ranges are disjoint."""
        assert self.buffer is not None
        layers, tokens, all_heads, _ = self.shape
        head_bytes = self.nbytes // (layers * tokens * all_heads)
        # One row per (layer, token): the segment's rows are contiguous, their places in the block are not unless it has all heads.
        rows = self.buffer.reshape(layers * tokens, all_heads * head_bytes)[:, heads[0] * head_bytes : heads[1] * head_bytes]
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

    def elements(self) -> np.ndarray:
        """The block as an array; bfloat16 as uint16."""
        assert self.buffer is not None
        return self.buffer.view(self.dtype).reshape(self.shape)


class Assembly:
    """Blocks of one request in the making, and the proof of what has arrived."""

    def __init__(self, spec: CacheSpec, length: int, staging: Staging):
        self._spec = spec
        self._length = length
        self.staging = staging
        self.total = spec.bytes(length)
        self.moved = 0
        self.resent = 0
        self._coverage = Coverage(spec, length)
        # Blocks stay known after they are handed on, without their bytes, so that a repeated message is recognised.
        self._blocks: dict[SegmentKey, Block] = {}

    @property
    def complete(self) -> bool:
        """Every byte is in place: blocks are disjoint and inside the cache, so their bytes can add up in one way only."""
        return self.moved == self.total and self._coverage.gap() is None

    def gap(self) -> str:
        """What is missing, in words."""
        return self._coverage.gap() or f"{self.total - self.moved} bytes of segments that began and never ended"

    def fits(self, key: SegmentKey) -> bool:
        """Whether a message of this segment can be claimed now; raises TransferError when its block exceeds the whole budget."""
        whole = self._whole(key)
        if whole in self._blocks:
            return True
        nbytes = whole.nbytes(self._spec)
        if nbytes > self.staging.max_bytes:
            raise TransferError(f"{whole} has {nbytes} bytes, more than the {self.staging.max_bytes} bytes of staging")
        return self.staging.fits(nbytes)

    def claim(self, header: Header, nbytes: int) -> Block | None:
        """The block that a checked message's payload belongs in; None when every byte of it came before.

        Raises TransferError when the message overlaps others in any other way than being a repetition.
        """
        key, whole = header.key, self._whole(header.key)
        block = self._blocks.get(whole)
        if block is None:
            self._coverage.claim(whole)
            dtype = VIEW_DTYPES[whole.tensor_spec(self._spec).dtype]
            block = Block(whole, whole.shape(self._spec), dtype, self.staging.take(whole.nbytes(self._spec)))
            self._blocks[whole] = block
        if key.heads not in block.seen:
            if block.heads.overlap(*key.heads):
                raise TransferError(f"{key} overlaps heads that another segment carries")
            block.heads.add(*key.heads)
            block.seen[key.heads] = Intervals()
        start, stop = header.offset, header.offset + nbytes
        overlap = block.seen[key.heads].overlap(start, stop)
        if overlap == nbytes:
            self.resent += nbytes
            return None
        if overlap:
            raise TransferError(f"bytes [{start}, {stop}) of {key} overlap {overlap} bytes that came before")
        block.seen[key.heads].add(start, stop)
        return block

    def wrote(self, block: Block, nbytes: int) -> np.ndarray | None:
        """Counts bytes that `Block.write` has put in place; the block's elements when it is now complete."""
        block.written += nbytes
        self.moved += nbytes
        return block.elements() if block.written == block.nbytes else None

    def free(self, block: Block) -> None:
        """The block's reader is done with it; a second call changes nothing."""
        if block.buffer is not None:
            buffer, block.buffer = block.buffer, None
            self.staging.give(buffer)

    def _whole(self, key: SegmentKey) -> SegmentKey:
        return dataclasses.replace(key, heads=(0, key.tensor_spec(self._spec).heads))

"""A prefill engine without a model: times from a function, real bytes, so that everything after it runs as in production."""

import functools
import itertools
import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from prfaas_jax.engine.api import (
    Admitted,
    EngineStatus,
    Event,
    Failed,
    Finished,
    InstanceLoad,
    Job,
    PrefillDone,
    PrefillProgress,
    SegmentReady,
    Sink,
    Token,
    check_job,
    check_transfer,
)
from prfaas_jax.errors import EngineFailed, Exhausted, InvalidInput
from prfaas_jax.kvcache.codecs import CODEC_NAMES, SCALE_BYTES
from prfaas_jax.kvcache.segments import Segment, SegmentKey, aligned_blocks, kept_part, layer_blocks
from prfaas_jax.kvcache.spec import CacheSpec

_TABLE = 1 << 16
# Bytes without this bit are never float8_e4m3fn's NaN; a bfloat16 scale whose upper byte this is lies between 2^-7 and 2^-5.
_FINITE_FP8 = np.uint8(0xF7)
_SCALE_UPPER = 0x3C


def profiled_block(spec: CacheSpec, key: SegmentKey, prompt: Sequence[int], seed: int = 0) -> np.ndarray:
    """The cache that a profiled engine makes of a prompt, `[layers, tokens, heads, width]`; bfloat16 as uint16.

    Of a codec's `wire_spec` too: what it writes in bytes is a head's elements, finite as int8 and as float8_e4m3fn, and a finite scale.
    Every (group, tensor, layer, token, head) has finite values of its own, whatever block they are asked for in, so a receiver with
    other chunks and shards can check what it got.
    """
    return digest_block(spec, key, prompt_digest(prompt), seed)


def digest_block(spec: CacheSpec, key: SegmentKey, digest: int, seed: int = 0) -> np.ndarray:
    """`profiled_block` of the prompt that has this digest, which whoever makes many blocks of a long prompt takes once."""
    tensor = key.tensor_spec(spec)
    layers, tokens, heads = (np.arange(*r, dtype=np.uint32) for r in (key.layers, key.tokens, key.heads))
    # Unsigned arithmetic wraps; odd multipliers spread neighbours over the table.
    start = layers[:, None, None] * 2654435761 + tokens[None, :, None] * 2246822519 + heads[None, None, :] * 3266489917
    start = start + np.uint32((digest + 668265263 * (key.group * 64 + key.tensor)) % 2**32)
    start ^= start >> 15
    block = np.lib.stride_tricks.sliding_window_view(_table(tensor.width, tensor.dtype, seed), tensor.width)[start % _TABLE]
    block = np.ascontiguousarray(block)
    if tensor.dtype == "uint8" and tensor.width > SCALE_BYTES:
        block[..., -1] = _SCALE_UPPER
    return block


@functools.lru_cache(maxsize=16)
def _table(width: int, dtype: str, seed: int) -> np.ndarray:
    """Normal values to cut rows of `width` elements from, as they travel."""
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, _TABLE + width, np.uint8) & _FINITE_FP8
    values = rng.standard_normal(_TABLE + width, np.float32)
    return values if dtype == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)


def prompt_digest(ids: Sequence[int], digest: int = 0) -> int:
    """What stands for a sequence of token ids; it goes on from the digest of the ids before."""
    return zlib.crc32(np.asarray(ids, np.int64).tobytes(), digest)


def digest_token(digest: int, vocab_size: int, with_logits: bool = False) -> Token:
    """The token that follows the ids of this digest: any, but always the same. Logits are 1 at it and 0 elsewhere."""
    token = digest % vocab_size
    return Token(token, 0.0, np.eye(1, vocab_size, token, np.float32)[0] if with_logits else None)


def first_token(prompt: Sequence[int], vocab_size: int) -> Token:
    """The token that a profiled engine draws after a prompt."""
    return digest_token(prompt_digest(prompt), vocab_size)


def segment_keys(
    spec: CacheSpec, job: Job, tokens: tuple[int, int], shards: int = 1, layers_per_segment: int | None = None
) -> Iterator[SegmentKey]:
    """Keys of what leaves once a job's `tokens` are computed: of every tensor, layer range and head slice, the part that stays.

    A window's tokens leave when they are among the prompt's last ones, states with the prompt's last token. The two last arguments are
    as for `ProfiledPrefillEngine`.
    """
    for g, group in enumerate(spec.groups):
        kept = kept_part(group.cache, tokens, len(job.prompt), job.held_tokens)
        if kept is None:
            continue
        for t, tensor in enumerate(group.cache.tensors):
            slices = min(shards, tensor.heads)
            edges = [s * tensor.heads // slices for s in range(slices + 1)]
            step = layers_per_segment
            for layers in layer_blocks(group, t) if step is None else aligned_blocks((0, len(group.layers)), step):
                for heads in itertools.pairwise(edges):
                    yield SegmentKey(g, t, layers, kept, heads)


def deliver(sink: Sink, event: Event) -> None:
    """Hands out a job's last event; a sink that raises must not take the engine thread with it."""
    try:
        sink(event)
    except Exception:
        logging.getLogger(__name__).exception("sink raised on %s", type(event).__name__)


class ProfiledPrefillEngine:
    """`PrefillEngine` of one worker thread: one prompt after the other, chunk by chunk, each taking the time that it is told.

    Events of a chunk: SegmentReady of each of its `segment_keys`, then PrefillProgress.
    """

    def __init__(
        self,
        spec: CacheSpec,
        fingerprint: str,
        seconds: Callable[[int], float] | None = None,
        chunk: int = 512,
        seed: int = 0,
        *,
        tokens_per_s: float | None = None,
        shards: int = 1,
        layers_per_segment: int | None = None,
        max_queue: int = 64,
        vocab_size: int = 32_000,
        max_length: int = 1 << 20,
    ):
        """Exactly one of `seconds` and `tokens_per_s` sets the pace.

        Args:
            spec: what the cache looks like.
            fingerprint: of the model that is played.
            seconds: time to prefill a prompt's first n tokens, non-decreasing in n.
            chunk: tokens per step; chunks end at absolute multiples of it.
            seed: of the bytes.
            tokens_per_s: a constant rate instead of `seconds`.
            shards: head slices per tensor, at most one per head.
            layers_per_segment: layers that leave in one segment; None is what a real engine sends, see `layer_blocks`.
            max_queue: prompts waiting before `submit` raises Exhausted.
            vocab_size: ids are below it.
            max_length: prompt + max_new_tokens at most.

        Raises InvalidInput naming the argument.
        """
        if (seconds is None) == (tokens_per_s is None):
            raise InvalidInput("seconds", (seconds, tokens_per_s), "either seconds or tokens_per_s")
        if tokens_per_s is not None and not tokens_per_s > 0:
            raise InvalidInput("tokens_per_s", tokens_per_s, "a positive number")
        positive = {"chunk": chunk, "shards": shards, "max_queue": max_queue, "vocab_size": vocab_size, "max_length": max_length}
        for field, value in positive.items():
            if value < 1:
                raise InvalidInput(field, value, "a positive integer")
        if layers_per_segment is not None and layers_per_segment < 1:
            raise InvalidInput("layers_per_segment", layers_per_segment, "a positive integer, or None for all")
        self.spec, self.fingerprint, self.codecs = spec, fingerprint, CODEC_NAMES
        rate = tokens_per_s or 1.0
        self._seconds = seconds or (lambda tokens: tokens / rate)
        self._chunk, self._seed, self._shards, self._layers = chunk, seed, shards, layers_per_segment
        self._max_queue, self._vocab_size, self._max_length = max_queue, vocab_size, max_length
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Job, Sink, float]] = deque()
        self._running: str | None = None
        self._cancelled: set[str] = set()
        self._closed = False
        self._tokens_prefilled = 0
        self._thread = threading.Thread(target=self._run, name="profiled prefill", daemon=True)
        self._thread.start()

    def submit(self, job: Job, sink: Sink) -> None:
        """See `PrefillEngine.submit`. Raises InvalidInput, Exhausted, or EngineFailed after `close`."""
        check_job(job, self._vocab_size, self._max_length)
        check_transfer(job, self.spec, self.codecs)
        with self._changed:
            if self._closed:
                raise EngineFailed("engine is closed")
            if job.ticket == self._running or any(job.ticket == waiting.ticket for waiting, _, _ in self._waiting):
                raise InvalidInput("job.ticket", job.ticket, "a ticket that is not in use")
            if len(self._waiting) >= self._max_queue:
                raise Exhausted(f"{len(self._waiting)} prompts are waiting, the queue holds {self._max_queue}")
            self._waiting.append((job, sink, time.monotonic()))
            self._changed.notify_all()

    def cancel(self, ticket: str) -> None:
        """Stops the job at once, or within the segment it is writing; unknown tickets are ignored."""
        with self._changed:
            if ticket == self._running or any(ticket == job.ticket for job, _, _ in self._waiting):
                self._cancelled.add(ticket)
                self._changed.notify_all()

    def status(self) -> EngineStatus:
        """Current load; it has no pages and compiles nothing."""
        with self._changed:
            running, waiting = int(self._running is not None), len(self._waiting)
            load = (InstanceLoad(0.0, running + waiting, waiting),)
            return EngineStatus(running, waiting, 0, 0, 0, tokens_prefilled=self._tokens_prefilled, instances=load)

    def close(self) -> None:
        """Fails outstanding jobs and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(10.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: bool(self._closed or self._waiting))
                if self._closed:
                    waiting = list(self._waiting)
                    self._waiting.clear()
                    break
                job, sink, submitted = self._waiting.popleft()
                self._running = job.ticket
            end: Event
            try:
                end = self._prefill(job, sink, submitted)
            except Exception as error:  # a sink or pace function that raises fails its own job, not the engine
                end = Failed(EngineFailed(f"{type(error).__name__}: {error}"))
            with self._changed:
                self._running = None
                self._cancelled.discard(job.ticket)
            deliver(sink, end)
        for job, sink, _ in waiting:
            deliver(sink, Failed(EngineFailed(f"engine closed before job {job.ticket} began")))

    def _prefill(self, job: Job, sink: Sink, submitted: float) -> Event:
        """Runs one job; its last event."""
        if end := self._interrupted(job, 0.0):
            return end
        started = time.monotonic()
        sink(Admitted())
        wire, digest = job.codec.wire_spec(self.spec), prompt_digest(job.prompt)
        for tokens in aligned_blocks((0, len(job.prompt)), self._chunk):
            if end := self._interrupted(job, started + self._seconds(tokens[1])):
                return end
            computed = time.monotonic()
            for key in segment_keys(self.spec, job, tokens, self._shards, self._layers):
                sink(SegmentReady(Segment(key, digest_block(wire, key, digest, self._seed).data)))
                if end := self._interrupted(job, 0.0):
                    return end
            with self._changed:
                self._tokens_prefilled += tokens[1] - tokens[0]
            sink(PrefillProgress(tokens[1]))
        return PrefillDone(digest_token(digest, self._vocab_size), started - submitted, computed - started)

    def _interrupted(self, job: Job, until: float) -> Event | None:
        """Waits until a time of the monotonic clock; the job's last event when it was cancelled or the engine closed meanwhile."""
        while True:
            with self._changed:
                if self._closed:
                    return Failed(EngineFailed("engine closed"))
                if job.ticket in self._cancelled:
                    return Finished("cancelled")
                dropped = self._drop_cancelled()
                if not dropped:
                    left = until - time.monotonic()
                    if left <= 0:
                        return None
                    self._changed.wait(left)
            for sink in dropped:
                deliver(sink, Finished("cancelled"))

    def _drop_cancelled(self) -> list[Sink]:
        """Takes cancelled jobs out of the queue, so that they need not wait for their turn to end."""
        dropped = [(job, sink) for job, sink, _ in self._waiting if job.ticket in self._cancelled]
        self._waiting = deque(entry for entry in self._waiting if entry[0].ticket not in self._cancelled)
        self._cancelled -= {job.ticket for job, _ in dropped}
        return [sink for _, sink in dropped]

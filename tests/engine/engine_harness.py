"""Shared by the engine tests: a small model with weights that matter, recording sinks, and the way of KV from one engine to the other."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from configs.models import load_model_config
from prfaas_jax.engine.api import (
    Admitted,
    Committed,
    Event,
    Failed,
    Finished,
    Job,
    PrefillDone,
    SamplingParams,
    SegmentReady,
    Token,
)
from prfaas_jax.engine.build import build_runner
from prfaas_jax.engine.decode import DecodeWorker
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.prefill import PrefillWorker
from prfaas_jax.engine.runner import Runner
from prfaas_jax.kvcache.segments import CARRIER, Segment, SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.models.score import forward_logits

TIMEOUT_S = 60.0
CHUNK = 64
# 40 pages of 16 tokens, less than one request of `max_length`: pool limits and length limits both bite.
SMALL = EngineOptions(
    "random:qwen3_toy", page_size=16, pages=41, chunk=CHUNK, max_length=1024, max_rows=8, max_prefill_rows=2, max_queue=8, ingest_tokens=32
)
VOCAB = 512
LENGTHS = (1, 15, 16, 17, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


def make_runner(options: EngineOptions = SMALL, *, prefill: bool = True, decode: bool = True, ingest: bool = True) -> Runner:
    """A warm Runner. Random weights are scaled up: as initialised, attention is uniform and no test would see it go wrong."""
    runner, _ = build_runner(options, load_model_config)
    runner.params = _scaled(runner.params)
    runner.warmup(prefill=prefill, decode=decode, ingest=ingest)
    return runner


def _scaled(params: nnx.State) -> nnx.State:
    rng = np.random.default_rng(0)

    def scale(path: tuple, leaf: jax.Array) -> jax.Array:
        factor = rng.uniform(0.5, 1.5, leaf.shape) if "norm" in jax.tree_util.keystr(path) else 8.0
        return jax.device_put((np.asarray(leaf) * factor).astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(scale, params)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids."""
    return tuple(np.random.default_rng([length, seed]).integers(0, VOCAB, length).tolist())


def job(ticket: str, length: int, new: int = 6, seed: int = 0, **sampling: object) -> Job:
    """A job with a random prompt that hands out its logits."""
    return Job(ticket, prompt(length, seed), SamplingParams(**{"max_new_tokens": new, "return_logits": True, **sampling}))  # type: ignore[arg-type]


class Recorder:
    """A sink that keeps events and lets a test wait for them."""

    def __init__(self, on_event: Callable[[Event], None] | None = None):
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self._on_event = on_event

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()
        if self._on_event is not None:
            self._on_event(event)

    def of(self, *kinds: type) -> list:
        """Events of these types so far."""
        return [e for e in list(self.events) if isinstance(e, kinds)]

    def wait(self, *kinds: type, count: int = 1) -> list:
        """The events of these types once there are `count`."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(*kinds)) >= count, TIMEOUT_S), f"{kinds} not among {self.events}"
            return self.of(*kinds)

    def end(self) -> Event:
        """The event that ends the job."""
        return self.wait(Finished, Failed)[0]

    @property
    def tokens(self) -> list[Token]:
        return self.of(Token)


class Done:
    """A `done` callback that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


@contextlib.contextmanager
def decode_worker(runner: Runner, start: bool = True, **options: object) -> Iterator[DecodeWorker]:
    """A fresh worker over `runner`; on exit everything must have come back."""
    with _options(runner, options):
        worker = DecodeWorker(runner)
        if start:
            worker.start()
        try:
            yield worker
            assert_idle(worker)
        finally:
            worker.close()


@contextlib.contextmanager
def prefill_worker(runner: Runner, start: bool = True, **options: object) -> Iterator[PrefillWorker]:
    """A fresh prefill worker over `runner`; on exit everything must have come back."""
    with _options(runner, options):
        worker = PrefillWorker(runner)
        if start:
            worker.start()
        try:
            yield worker
            assert_idle(worker)
        finally:
            worker.close()


@contextlib.contextmanager
def _options(runner: Runner, options: dict) -> Iterator[None]:
    before = runner.options
    runner.options = dataclasses.replace(before, **options)
    try:
        yield
    finally:
        runner.options = before


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for something that another thread is about to make true."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_idle(worker: DecodeWorker | PrefillWorker) -> None:
    """No page, state slot, decode row, queue place or staging buffer is held."""

    def idle() -> bool:
        status = worker.status()
        held = status.pages_total - status.pages_free, status.state_slots_total - status.state_slots_free
        return not any((*held, status.running, status.waiting))

    eventually(idle)
    if isinstance(worker, DecodeWorker):
        received = worker._received
        eventually(lambda: not (worker._requests or received._pieces or received._fences or received._pending or worker._prompts))
        assert worker._rows.slots_free == worker._rows.slots


def run_local(worker: DecodeWorker, *jobs: Job) -> list[Recorder]:
    """Runs jobs to their end with local prefill, all submitted at once."""
    sinks = [Recorder() for _ in jobs]
    for j, sink in zip(jobs, sinks, strict=True):
        worker.reserve(j, sink)
    for j, sink in zip(jobs, sinks, strict=True):
        sink.wait(Admitted, Failed)
        worker.prefill_local(j.ticket)
    for sink in sinks:
        assert isinstance(sink.end(), Finished), sink.events[-1]
    return sinks


def whole_blocks(segments: Sequence[Segment], spec: CacheSpec) -> list[tuple[SegmentKey, np.ndarray]]:
    """Joins head slices of one token range, layer range and tensor."""
    parts: dict[SegmentKey, list[tuple[SegmentKey, np.ndarray]]] = {}
    for s in segments:
        array = np.frombuffer(s.payload, CARRIER[s.key.tensor_spec(spec).dtype]).reshape(s.key.shape(spec))
        parts.setdefault(dataclasses.replace(s.key, heads=(0, 0)), []).append((s.key, array))
    blocks = []
    for slices in parts.values():
        slices.sort(key=lambda part: part[0].heads)
        key = dataclasses.replace(slices[0][0], heads=(0, slices[-1][0].heads[1]))
        blocks.append((key, np.concatenate([a for _, a in slices], axis=2)))
    return blocks


def prefill(worker: PrefillWorker, j: Job) -> tuple[list[tuple[SegmentKey, np.ndarray]], PrefillDone]:
    """One prompt through a prefill engine: its whole blocks and what was drawn."""
    sink = Recorder()
    worker.submit(j, sink)
    (done,) = sink.wait(PrefillDone, Failed)
    assert isinstance(done, PrefillDone), done
    return whole_blocks([e.segment for e in sink.of(SegmentReady)], j.codec.wire_spec(worker.spec)), done


def run_remote(prefills: PrefillWorker, decodes: DecodeWorker, *jobs: Job) -> list[Recorder]:
    """Runs jobs to their end with KV that another engine computed; every staging buffer is overwritten once it is given back."""
    sinks, releases = [Recorder() for _ in jobs], []
    for j, sink in zip(jobs, sinks, strict=True):
        decodes.reserve(j, sink)
    for j, sink in zip(jobs, sinks, strict=True):
        blocks, done = prefill(prefills, j)
        sink.wait(Admitted)
        for key, block in blocks:
            release = Done()
            releases.append(release)
            staging = block.copy()
            decodes.ingest(j.ticket, key, staging, functools.partial(_poison, staging, release))
        decodes.commit(j.ticket, done.first)
    for sink in sinks:
        assert isinstance(sink.end(), Finished), sink.events[-1]
    eventually(lambda: all(r.calls for r in releases))
    assert [r.calls for r in releases] == [1] * len(releases)
    return sinks


def _poison(staging: np.ndarray, done: Done) -> None:
    staging.view(np.uint8).fill(0xFF)  # NaN in every dtype
    done()


def assert_same(a: Recorder, b: Recorder, tolerance: float | None = None) -> None:
    """Same tokens, and logits equal in every bit, or within `tolerance`."""
    assert len(a.tokens) == len(b.tokens)
    for x, y in zip(a.tokens, b.tokens, strict=True):
        assert x.logits is not None and y.logits is not None
        if tolerance is None:
            np.testing.assert_array_equal(x.logits, y.logits)
        else:
            np.testing.assert_allclose(x.logits, y.logits, rtol=0, atol=tolerance)
    assert [t.token for t in a.tokens] == [t.token for t in b.tokens]


def oracle_logits(runner: Runner, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] after every position, by dense causal attention; compiled once, for 640 tokens."""
    padded = np.zeros((1, 640), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward_logits(runner.config, runner.params, padded, runner.steps.sharders["decode"]))[0, : len(tokens)]


def assert_like_oracle(runner: Runner, j: Job, sink: Recorder, tolerance: float = 1e-4) -> None:
    """Every token's logits are those of the dense forward pass over all tokens before it."""
    drawn = [t.token for t in sink.tokens]
    expected = oracle_logits(runner, [*j.prompt, *drawn])[len(j.prompt) - 1 : -1]
    np.testing.assert_allclose(np.stack([t.logits for t in sink.tokens]), expected, rtol=0, atol=tolerance)


def committed(sink: Recorder) -> bool:
    """Whether the job has entered the batch."""
    return bool(sink.of(Committed))

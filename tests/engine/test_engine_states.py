"""Any order of admissions, aborts and finishes ends with all pages, slots, queue places and callbacks back."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
from engine_harness import Done, Recorder, decode_worker, eventually, job, prefill_worker
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.engine.api import Admitted, Failed, Finished, PrefillDone, Token
from prfaas_jax.engine.runner import Runner
from prfaas_jax.errors import Exhausted
from prfaas_jax.kvcache.segments import SegmentKey, aligned_blocks

LENGTHS = st.integers(1, 150) | st.integers(1, 600)
OPERATIONS = st.one_of(
    st.tuples(st.just("reserve"), LENGTHS, st.integers(1, 12)),
    st.tuples(st.just("prefill"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("receive"), st.integers(0, 99), st.sampled_from([0, 1])),
    st.tuples(st.just("abort"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("pause"), st.integers(1, 20), st.just(0)),
)


@settings(max_examples=12)
@given(st.lists(OPERATIONS, min_size=5, max_size=60))
def test_decode_engine_returns_everything(runner: Runner, operations: list[tuple[str, int, int]]) -> None:
    live(runner, operations)


@settings(max_examples=12)
@given(st.lists(OPERATIONS, min_size=5, max_size=60))
def test_decode_engine_with_states_returns_everything(states: Runner, operations: list[tuple[str, int, int]]) -> None:
    live(states, operations)


def zeros(runner: Runner, length: int) -> Iterator[tuple[SegmentKey, np.ndarray]]:
    """What a prompt leaves behind, as blocks; states in two layer ranges."""
    for g, group in enumerate(runner.spec.groups):
        step = 1 + len(group.layers) // 2 if group.cache.kind == "state" else len(group.layers)
        for t, tensor in enumerate(group.cache.tensors):
            for layers in aligned_blocks((0, len(group.layers)), step):
                key = SegmentKey(g, t, layers, group.cache.kept(length), (0, tensor.heads))
                yield key, np.zeros(key.shape(runner.spec), np.float32)


def live(runner: Runner, operations: list[tuple[str, int, int]]) -> None:
    """Runs the operations, ends what is still there, and counts what came back."""
    sinks: dict[str, Recorder] = {}
    lengths: dict[str, int] = {}
    releases: list[Done] = []
    started: set[str] = set()
    with decode_worker(runner, ingest_bytes_per_step=1 << 16) as worker:
        for operation, a, b in operations:
            waiting = [t for t, s in sinks.items() if s.of(Admitted) and not s.of(Finished, Failed) and t not in started]
            chosen = waiting[a % len(waiting)] if waiting and operation in ("prefill", "receive") else None
            if operation == "reserve":
                ticket, sink = f"j{len(sinks)}", Recorder()
                try:
                    worker.reserve(job(ticket, a, new=b, seed=len(sinks), temperature=0.5, return_logits=False), sink)
                except Exhausted:
                    continue
                sinks[ticket], lengths[ticket] = sink, a
            elif operation == "abort" and sinks:
                worker.abort(list(sinks)[a % len(sinks)])
            elif operation == "pause":
                time.sleep(a / 1000)
            elif operation == "prefill" and chosen:
                started.add(chosen)
                worker.prefill_local(chosen)
            elif operation == "receive" and chosen:
                started.add(chosen)
                for key, block in zeros(runner, lengths[chosen]):
                    done = Done()
                    releases.append(done)
                    worker.ingest(chosen, key, block, done)
                if b:
                    worker.commit(chosen, Token(1, 0.0))
        for ticket in sinks:
            worker.abort(ticket)
        for sink in sinks.values():
            sink.end()
        eventually(lambda: all(d.calls for d in releases))
    assert all(len(s.of(Finished, Failed)) == 1 and isinstance(s.events[-1], Finished) for s in sinks.values())
    assert [d.calls for d in releases] == [1] * len(releases)


@pytest.mark.parametrize("seed", range(3))
def test_prefill_engine_returns_everything(sender: Runner, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with prefill_worker(sender) as worker:
        sinks = {}
        for i in range(20):
            sink = Recorder()
            try:
                worker.submit(job(f"j{i}", int(rng.integers(1, 300)), seed=i), sink)
            except Exhausted:
                continue
            sinks[f"j{i}"] = sink
            if rng.random() < 0.4:
                worker.cancel(f"j{rng.integers(0, i + 1)}")
            time.sleep(rng.random() / 100)
        for sink in sinks.values():
            (end,) = sink.wait(PrefillDone, Finished, Failed)
            assert isinstance(end, PrefillDone) or end == Finished("cancelled")

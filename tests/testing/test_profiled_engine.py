import queue
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from prfaas_jax.engine.api import (
    Admitted,
    Failed,
    Finished,
    Job,
    PrefillDone,
    PrefillEngine,
    PrefillProgress,
    SamplingParams,
    SegmentReady,
)
from prfaas_jax.errors import EngineFailed, Exhausted, InvalidInput
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.testing.profiled import ProfiledPrefillEngine, first_token, profiled_block
from prfaas_jax.transfer.coverage import Coverage
from prfaas_jax.transfer.lane import LaneServer
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.outbox import Outbox
from prfaas_jax.transfer.puller import Puller

SPEC = CacheSpec(
    (
        CacheGroup(LayerCache("paged", (TensorSpec("k", 4, 8, "bfloat16"), TensorSpec("v", 4, 8, "bfloat16"))), (0, 2, 3)),
        CacheGroup(LayerCache("paged", (TensorSpec("latent", 1, 12, "float32", shared=True),)), (1,)),
        CacheGroup(LayerCache("window", (TensorSpec("k", 2, 8, "bfloat16"), TensorSpec("v", 2, 4, "bfloat16")), 20), (4, 6)),
        CacheGroup(LayerCache("state", (TensorSpec("recurrent", 4, 30, "float32"), TensorSpec("q_tail", 2, 9, "bfloat16"))), (5, 7, 8)),
    )
)
LAST = (PrefillDone, Failed, Finished)


def job(ticket: str, length: int) -> Job:
    return Job(ticket, tuple(range(length)), SamplingParams())


def events_until_last(events: queue.Queue) -> list:
    seen = []
    while not seen or not isinstance(seen[-1], LAST):
        seen.append(events.get(timeout=10))
    return seen


@pytest.fixture
def engine():
    engine: PrefillEngine = ProfiledPrefillEngine(
        SPEC, "model", tokens_per_s=100_000, chunk=16, shards=3, layers_per_segment=2, max_queue=2
    )
    yield engine
    engine.close()


@pytest.mark.parametrize("length", [1, 15, 40, 67])
def test_events_cover_the_cache_exactly_and_in_order(engine, length):
    events: queue.Queue = queue.Queue()
    asked = job("a", length)
    engine.submit(asked, events.put)
    seen = events_until_last(events)
    assert isinstance(seen[0], Admitted)
    chunks = [*range(16, length, 16), length]
    assert [e.tokens for e in seen if isinstance(e, PrefillProgress)] == chunks
    segments = [e.segment for e in seen if isinstance(e, SegmentReady)]
    assert sum(s.payload.nbytes for s in segments) == SPEC.bytes(length)
    coverage = Coverage(SPEC, length)
    for segment in segments:
        segment.key.check(SPEC, length)
    for key in {SegmentKey(s.key.group, s.key.tensor, s.key.layers, s.key.tokens, (0, 1)) for s in segments}:
        coverage.claim(key)
    assert coverage.gap() is None
    assert seen[-1].first == first_token(asked.prompt, 32_000)
    assert engine.status().tokens_prefilled == length


def test_windows_leave_when_they_stay_and_states_with_the_last_chunk(engine):
    """A segment is out before the progress that reports its tokens; 67 tokens are chunks of 16 and the window is the last 20."""
    events: queue.Queue = queue.Queue()
    engine.submit(job("a", 67), events.put)
    tokens: dict[int, list] = {2: [], 3: []}
    computed = 0
    for event in events_until_last(events):
        match event:
            case SegmentReady(segment) if segment.key.group in tokens:
                tokens[segment.key.group].append((computed, segment.key.tokens))
            case PrefillProgress(done):
                computed = done
    assert set(tokens[2]) == {(32, (47, 48)), (48, (48, 64)), (64, (64, 67))}
    assert set(tokens[3]) == {(64, (66, 67))}


def test_bytes_do_not_depend_on_how_they_are_cut_and_differ_everywhere():
    prompt = tuple(range(50))
    whole = profiled_block(SPEC, SegmentKey(0, 0, (0, 3), (0, 50), (0, 4)), prompt)
    piece = profiled_block(SPEC, SegmentKey(0, 0, (1, 3), (7, 30), (1, 2)), prompt)
    np.testing.assert_array_equal(piece, whole[1:3, 7:30, 1:2])
    rows = whole.reshape(-1, 8)
    assert len(np.unique(rows, axis=0)) > 0.98 * len(rows)
    assert (profiled_block(SPEC, SegmentKey(0, 1, (0, 3), (0, 50), (0, 4)), prompt) != whole).any()
    assert (profiled_block(SPEC, SegmentKey(0, 0, (0, 3), (0, 50), (0, 4)), (1, *prompt)) != whole).any()
    as_float = (whole.astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(as_float).all()


def test_time_is_that_of_the_function():
    engine = ProfiledPrefillEngine(SPEC, "model", lambda tokens: 0.1 + tokens * 0.002, chunk=16)
    events: queue.Queue = queue.Queue()
    started = time.monotonic()
    engine.submit(job("a", 50), events.put)
    done = events_until_last(events)[-1]
    engine.close()
    assert 0.2 <= time.monotonic() - started < 0.6
    assert 0.2 <= done.compute_s < 0.6


def test_cancel_ends_running_and_waiting_jobs_at_once():
    engine = ProfiledPrefillEngine(SPEC, "model", lambda tokens: 60.0)
    running: queue.Queue = queue.Queue()
    waiting: queue.Queue = queue.Queue()
    engine.submit(job("a", 40), running.put)
    assert running.get(timeout=5) == Admitted()
    engine.submit(job("b", 40), waiting.put)
    engine.cancel("unknown")
    engine.cancel("b")
    assert waiting.get(timeout=5) == Finished("cancelled")
    engine.cancel("a")
    assert running.get(timeout=5) == Finished("cancelled")
    assert (engine.status().running, engine.status().waiting) == (0, 0)
    engine.close()


def test_close_fails_what_is_outstanding_and_ends_the_thread():
    before = threading.active_count()
    engine = ProfiledPrefillEngine(SPEC, "model", lambda tokens: 60.0)
    queues = [queue.Queue() for _ in range(2)]
    for i, events in enumerate(queues):
        engine.submit(job(str(i), 8), events.put)
    engine.close()
    assert all(isinstance(events_until_last(events)[-1], Failed) for events in queues)
    assert threading.active_count() == before
    with pytest.raises(EngineFailed):
        engine.submit(job("late", 8), print)


def test_sink_that_raises_fails_its_own_job_only(engine):
    seen: queue.Queue = queue.Queue()

    def sink(event):
        if isinstance(event, SegmentReady):
            raise ZeroDivisionError("sink")
        seen.put(event)

    engine.submit(job("bad", 8), sink)
    assert "ZeroDivisionError" in str(events_until_last(seen)[-1].error)
    engine.submit(job("good", 8), seen.put)
    assert isinstance(events_until_last(seen)[-1], PrefillDone)


def test_bad_jobs_and_full_queues_are_refused():
    engine = ProfiledPrefillEngine(SPEC, "model", lambda tokens: 60.0, max_queue=1, vocab_size=100, max_length=50)
    admitted = threading.Event()
    for bad in (job("x", 0), job("x", 40), Job("x", (100,), SamplingParams())):
        with pytest.raises(InvalidInput, match="prompt"):
            engine.submit(bad, print)
    engine.submit(job("a", 8), lambda event: admitted.set())
    assert admitted.wait(5)
    engine.submit(job("b", 8), lambda event: None)
    with pytest.raises(Exhausted):
        engine.submit(job("c", 8), lambda event: None)
    with pytest.raises(InvalidInput, match="ticket"):
        engine.submit(job("a", 8), lambda event: None)
    engine.close()


@pytest.mark.parametrize(
    ("field", "kwargs"),
    [
        ("seconds", {}),
        ("tokens_per_s", {"tokens_per_s": 0}),
        ("chunk", {"tokens_per_s": 1, "chunk": 0}),
        ("shards", {"tokens_per_s": 1, "shards": 0}),
    ],
)
def test_bad_settings_of_an_engine_are_named(field, kwargs):
    with pytest.raises(InvalidInput, match=field):
        ProfiledPrefillEngine(SPEC, "model", **kwargs)


def test_engine_to_outbox_to_lane_to_puller(engine):
    """The whole path of the bytes, checked by position at the receiver."""
    asked = job("a", 70)
    outbox = Outbox(SPEC, 1 << 20)
    lane = LaneServer(outbox)
    lane.start()
    ticket = outbox.open(70)

    def sink(event):
        match event:
            case SegmentReady(segment):
                outbox.put(ticket, segment)
            case PrefillDone():
                outbox.finish(ticket)

    def on_block(key, block, done):
        np.testing.assert_array_equal(block, profiled_block(SPEC, key, asked.prompt))
        done()

    group, puller = LaneGroup(lane.address), Puller(SPEC, 70, on_block)
    puller.start(ticket.id, ticket.epoch, [group])
    engine.submit(asked, sink)
    assert puller.finish(SPEC.bytes(70)).moved == SPEC.bytes(70)
    group.close()
    lane.stop(0)


def test_engine_and_lanes_load_without_jax():
    modules = "prfaas_jax.testing.profiled, prfaas_jax.testing.relay, prfaas_jax.transfer.puller, prfaas_jax.transfer.lane"
    code = f"import sys, {modules}; assert not {{'jax', 'flax'}} & set(sys.modules), 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

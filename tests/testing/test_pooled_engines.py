"""The two engines of a profiled cluster at their edge: bytes that are wrong or missing, limits, ends in every phase."""

import contextlib
import dataclasses
import queue
import random
import time

import numpy as np
import pytest
from profiled_fixtures import CHUNK, INSTANCE, LAST, SPEC, Events, cluster_of, job, right_tokens, run_locally

from prfaas_jax.engine.api import Admitted, Committed, Failed, Finished, PrefillDone, SegmentReady, Token
from prfaas_jax.errors import EngineFailed, Exhausted, InvalidInput, TransferError
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.kvcache.segments import CARRIER
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill

# Nothing of it ends by itself within a test.
SLOW = dataclasses.replace(INSTANCE, prefill=FittedPrefill(1e5, 1.0), decode=FittedDecode(1e5))
ENDLESS = dataclasses.replace(INSTANCE, decode=FittedDecode(1e5), max_batch=1)


@pytest.fixture
def cluster():
    with contextlib.closing(cluster_of(time_scale=200.0)) as cluster:
        yield cluster


@pytest.fixture
def slow():
    with contextlib.closing(cluster_of(1, 1, SLOW, max_queue=3)) as cluster:
        yield cluster


def segments_of(cluster, asked) -> tuple[list, PrefillDone]:
    """What the prefill engine makes of a job: keys and blocks, and its last word."""
    made: queue.Queue = queue.Queue()
    cluster.prefill_engine.submit(asked, made.put)
    wire, blocks = asked.codec.wire_spec(SPEC), []
    while not isinstance(event := made.get(timeout=30), LAST):
        if isinstance(event, SegmentReady):
            key = event.segment.key
            block = np.frombuffer(event.segment.payload, CARRIER[key.tensor_spec(wire).dtype]).reshape(key.shape(wire))
            blocks.append((key, block))
    assert isinstance(event, PrefillDone), event
    return blocks, event


def decode_of(cluster, asked, blocks, first, commit: bool = True) -> Events:
    events = Events(cluster)
    cluster.decode_engine.reserve(asked, events)
    for key, block in blocks:
        cluster.decode_engine.ingest(asked.ticket, key, block, lambda: None)
    if commit:
        cluster.decode_engine.commit(asked.ticket, first)
    return events


def idle(cluster) -> None:
    """Nothing of any request is left in either engine."""
    status, far = cluster.decode_engine.status(), cluster.prefill_engine.status()
    assert (status.running, status.waiting, status.decode_waiting, far.running, far.waiting) == (0, 0, 0, 0, 0)
    assert status.pages_free == status.pages_total
    assert all(load.jobs == load.fresh == 0 for load in status.instances)  # a step whose prompt was cancelled may still run


@pytest.mark.parametrize("codec", ["none", "paged=int8,window=fp8,state=bf16"])
@pytest.mark.parametrize(("length", "new"), [(1, 1), (CHUNK, 2), (3 * CHUNK + 9, 3)])
def test_what_one_engine_makes_the_other_takes_and_checks(cluster, codec, length, new):
    asked = job("a", length, new, codec=CacheCodec.parse(codec))
    blocks, done = segments_of(cluster, asked)
    assert sum(block.nbytes for _, block in blocks) == asked.codec.wire_spec(SPEC).bytes(length)
    assert all(key.tokens == (length - 1, length) for key, _ in blocks if key.group == 2)
    events = decode_of(cluster, asked, blocks, done.first)
    assert events.end() == Finished("length")
    assert events.tokens == right_tokens(asked)
    assert [type(event) for _, event in events.seen] == [Admitted, Committed, *[Token] * new, Finished]
    assert cluster.decode_engine.status().tokens_decoded == new - 1
    idle(cluster)


def test_tokens_that_the_receiver_holds_do_not_leave(cluster):
    asked = job("a", 700, held_tokens=500)
    blocks, _ = segments_of(cluster, asked)
    assert sum(block.nbytes for _, block in blocks) == SPEC.bytes(700, 500)


@pytest.mark.parametrize("fault", ["missing", "repeated", "wrong", "late"])
def test_a_cache_that_is_not_right_fails_its_own_request(fault):
    with contextlib.closing(cluster_of(instance=ENDLESS, time_scale=200.0)) as cluster:
        _check_fault(cluster, fault)


def _check_fault(cluster, fault: str) -> None:
    asked = job("a", 300)
    blocks, done = segments_of(cluster, asked)
    if fault == "missing":
        del blocks[1]
    elif fault == "repeated":
        blocks.append(blocks[0])
    elif fault == "wrong":
        blocks[2] = blocks[2][0], blocks[2][1] ^ np.uint16(1)
    events = decode_of(cluster, asked, blocks, done.first)
    if fault == "late":
        cluster.decode_engine.ingest("a", *blocks[0], lambda: None)
    end = events.end()
    assert isinstance(end, Failed) and isinstance(end.error, TransferError), end
    assert run_locally(cluster, job("b", 300, 1)).end() == Finished("length")
    idle(cluster)


def test_stop_tokens_end_a_request_and_its_place_goes_to_the_next():
    asked = job("a", 64, 100)
    tokens = right_tokens(asked)
    for at in (0, 3):
        with contextlib.closing(cluster_of(1, 1, dataclasses.replace(INSTANCE, max_batch=1), time_scale=100.0)) as cluster:
            stopped = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, stop_token_ids=(tokens[at],)))
            first, second = run_locally(cluster, stopped), run_locally(cluster, job("b", 64, 2))
            assert (first.end(), second.end()) == (Finished("stop"), Finished("length"))
            assert first.tokens == tokens[: at + 1]
            assert second.at(Committed)[0] >= first.at(Finished)[0]


def test_logits_are_given_when_they_are_asked_for(cluster):
    asked = job("a", 64, 2)
    asked = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, return_logits=True))
    events = run_locally(cluster, asked)
    assert events.end() == Finished("length")
    drawn = [event for _, event in events.seen if isinstance(event, Token)]
    assert [int(token.logits.argmax()) for token in drawn] == right_tokens(asked)


# --- limits --------------------------------------------------------------------------------------------------------------------------


def test_memory_for_caches_is_bounded_and_given_back():
    """Two instances hold three such requests each; what is asked for is in the bytes of the model, ten times those that move."""
    asked = job("0", 300, 4)
    room = dataclasses.replace(SLOW, kv_memory_bytes=10 * SPEC.bytes(304) * 3, max_batch=4)
    with contextlib.closing(cluster_of(1, 2, room, byte_scale=0.1)) as cluster:
        engine = cluster.decode_engine
        runs = [Events(cluster) for _ in range(6)]
        for i, events in enumerate(runs):
            engine.reserve(dataclasses.replace(asked, ticket=str(i)), events)
        taken = engine.status()
        assert taken.pages_free < taken.pages_total
        with pytest.raises(Exhausted, match="bytes for caches are taken"):
            engine.reserve(dataclasses.replace(asked, ticket="more"), print)
        with pytest.raises(InvalidInput, match="request KV"):
            engine.reserve(job("huge", 2000), print)
        engine.abort("3")
        assert runs[3].end() == Finished("cancelled")
        engine.reserve(dataclasses.replace(asked, ticket="more"), Events(cluster))
        for ticket in ("0", "1", "2", "4", "5", "more"):
            engine.abort(ticket)
        cluster.kernel.call(lambda: None)
        idle(cluster)


def test_queues_are_bounded_and_tickets_are_unique(slow):
    for i in range(3):
        slow.decode_engine.reserve(job(str(i), 64), lambda event: None)
    with pytest.raises(Exhausted, match="max_queue=3"):
        slow.decode_engine.reserve(job("more", 64), print)
    prompts = [Events(slow) for _ in range(4)]
    slow.prefill_engine.submit(job("0", 64), prompts[0])
    slow.kernel.call(lambda: None)  # it is being computed by then
    for i in range(1, 4):
        slow.prefill_engine.submit(job(str(i), 64), prompts[i])
    with pytest.raises(Exhausted, match="max_queue=3"):
        slow.prefill_engine.submit(job("more", 64), print)
    slow.prefill_engine.cancel("3")
    assert prompts[3].end() == Finished("cancelled")
    with pytest.raises(InvalidInput, match="ticket"):
        slow.prefill_engine.submit(job("2", 64), print)
    status = slow.prefill_engine.status()
    assert (status.running, status.waiting, status.instances[0].jobs, status.instances[0].fresh) == (1, 2, 3, 2)
    assert status.instances[0].free_in_s == pytest.approx(3e5 / 20, rel=0.01)


def test_bad_jobs_are_refused(cluster):
    too_long = INSTANCE.prefill.max_tokens + 1
    for asked, match in (
        (job("a", 0), "prompt"),
        (dataclasses.replace(job("a", 1), prompt=(32_000,)), "prompt token id"),
        (job("a", 10, held_tokens=11), "held_tokens"),
        (dataclasses.replace(job("a", 1), prompt=(1,) * too_long), "where the profile ends"),
    ):
        with pytest.raises(InvalidInput, match=match):
            cluster.prefill_engine.submit(asked, print)
    longer = run_locally(cluster, dataclasses.replace(job("b", 1), prompt=(1,) * too_long)).end()
    assert isinstance(longer.error, InvalidInput)
    idle(cluster)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("prefill", {"prefill": -1}),
        ("decode", {"decode": -1}),
        ("prefill", {"prefill": 0, "decode": 0}),
        ("chunk", {"chunk": 100}),
        ("token_scale", {"token_scale": 0}),
        ("byte_scale", {"byte_scale": 0.0}),
        ("time_scale", {"time_scale": 0.0}),
        ("convert_s", {"convert_s": -1.0}),
        ("max_queue", {"max_queue": 0}),
        ("decode", {"instance": dataclasses.replace(INSTANCE, decode=None)}),
    ],
)
def test_bad_settings_are_named(field, change):
    with pytest.raises(InvalidInput, match=field):
        cluster_of(**change)


# --- ends ----------------------------------------------------------------------------------------------------------------------------


def test_abort_frees_what_is_held_in_every_phase(slow):
    engine = slow.decode_engine
    reserved = Events(slow)
    engine.reserve(job("reserved", 64), reserved)
    prefilling = run_locally(slow, job("prefilling", 64))
    slow.kernel.call(lambda: None)
    for ticket, events in (("reserved", reserved), ("prefilling", prefilling)):
        engine.abort(ticket, "because")
        assert events.end() == Finished("because")
    idle(slow)
    with contextlib.closing(cluster_of(1, 1, ENDLESS)) as cluster:
        running, waiting = (run_locally(cluster, job(ticket, 64)) for ticket in ("running", "waiting"))
        deadline = time.monotonic() + 30
        while not cluster.decode_engine.status().decode_waiting:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        # Its place goes to the one that waits, and then to nobody.
        cluster.decode_engine.abort("running")
        assert running.end() == Finished("cancelled")
        cluster.kernel.call(lambda: None)
        assert len(waiting.at(Committed)) == 1
        cluster.decode_engine.abort("waiting")
        cluster.decode_engine.abort("unknown")
        assert waiting.end() == Finished("cancelled")
        idle(cluster)


def test_cancels_at_random_moments_leave_nothing_behind():
    rng = random.Random(2)
    with contextlib.closing(cluster_of(2, 2, time_scale=100.0, token_scale=8)) as cluster:
        local, far = [], []
        for i in range(120):
            asked = job(str(i), rng.choice([64, 300, 1500]), rng.randint(1, 12))
            if i % 3:
                local.append(run_locally(cluster, asked))
            else:
                far.append(Events(cluster))
                cluster.prefill_engine.submit(asked, far[-1])
            victim = str(rng.randrange(i + 1))
            cluster.prefill_engine.cancel(victim)
            cluster.decode_engine.abort(victim)
            time.sleep(rng.expovariate(200))
        ends = [events.end().reason for events in local]
        assert min(ends.count("cancelled"), ends.count("length")) > 5
        deadline = time.monotonic() + 30
        while not all(events.seen and isinstance(events.seen[-1][1], LAST) for events in far):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        idle(cluster)


def test_a_sink_that_raises_fails_its_own_job_only(cluster):
    ends: queue.Queue = queue.Queue()

    def sink(event):
        if isinstance(event, LAST):
            ends.put(event)
        elif isinstance(event, SegmentReady | Token):
            raise ZeroDivisionError("sink")

    cluster.prefill_engine.submit(job("far", 3 * CHUNK), sink)
    assert "ZeroDivisionError" in str(ends.get(timeout=30).error)
    blocks, done = segments_of(cluster, job("near", 64))
    cluster.decode_engine.reserve(job("near", 64), sink)
    for key, block in blocks:
        cluster.decode_engine.ingest("near", key, block, lambda: None)
    cluster.decode_engine.commit("near", done.first)
    assert "ZeroDivisionError" in str(ends.get(timeout=30).error)
    assert run_locally(cluster, job("good", 300)).end() == Finished("length")
    idle(cluster)


def test_close_fails_what_is_outstanding_and_refuses_more(slow):
    runs = [run_locally(slow, job("local", 64)), Events(slow), Events(slow)]
    slow.decode_engine.reserve(job("reserved", 64), runs[1])
    slow.prefill_engine.submit(job("far", 64), runs[2])
    slow.decode_engine.close()
    slow.close()
    for events in runs:
        end = events.end()
        assert isinstance(end, Failed) and isinstance(end.error, EngineFailed)
    with pytest.raises(EngineFailed):
        slow.prefill_engine.submit(job("late", 64), print)
    with pytest.raises(EngineFailed):
        slow.decode_engine.reserve(job("late", 64), print)
    for engine in (slow.decode_engine, slow.prefill_engine):
        with pytest.raises(EngineFailed):
            engine.status()
    slow.decode_engine.abort("late")
    slow.prefill_engine.cancel("late")

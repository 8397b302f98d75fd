"""The load generator: what it sends, when, and what it writes down; with the servers that tests have, and as a process."""

import asyncio
import contextlib
import itertools
import math
import threading

import grpc
import msgspec
import numpy as np
import psutil
import pytest
from profiled_fixtures import VOCAB, cluster_of

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.serving.client import Client
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc
from prfaas_jax.simulation.workloads import Arrival, Poisson, Synthetic
from prfaas_jax.testing.replay import Replay, ReplayInvalid, ReplayProcess
from prfaas_jax.testing.replay_script import (
    Ask,
    Recorded,
    Row,
    Script,
    as_played,
    asks_of,
    live_tokens,
    prompt_of,
    violations,
)


@contextlib.contextmanager
def region():
    """A profiled region without a prefill server: the address of its decode server. Twenty seconds of its profile in a wall second."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with contextlib.closing(cluster_of()) as cluster:

            async def start() -> DecodeServer:
                server = DecodeServer(cluster.decode_engine, None, DecodeServerOptions())
                await server.start()
                return server

            server = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
            yield server.address
            asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def script(asks, address="127.0.0.1:9", **more) -> Script:
    return Script(routers=(address,), asks=tuple(asks), seed=3, vocab_size=more.pop("vocab_size", VOCAB), **more)


def play(what: Script) -> Replay:
    async def run() -> Replay:
        async with Client(what.routers) as client:
            replay = Replay(what, client)
            await replay.run()
            return replay

    return asyncio.run(asyncio.wait_for(run(), 60))


# --- prompts


def test_a_prompt_is_the_same_each_time_and_another_for_another_request():
    a, b = (Ask(i, 0.0, 300, 4) for i in (0, 1))
    s = script([a, b])
    first, again, other = prompt_of(s, a), prompt_of(s, a), prompt_of(s, b)
    assert first.dtype == np.int32 and len(first) == 300 and first.min() >= 0 and first.max() < VOCAB
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first, prompt_of(msgspec.structs.replace(s, seed=4), a))


def test_equal_blocks_are_equal_tokens_and_the_last_block_is_cut():
    a, b = Ask(0, 0.0, 1100, 1, (7, 8, 9)), Ask(1, 0.0, 1536, 1, (7, 8, 11))
    s = script([a, b], block_tokens=512)
    first, second = prompt_of(s, a), prompt_of(s, b)
    assert len(first) == 1100 and len(second) == 1536
    assert np.array_equal(first[:1024], second[:1024]) and not np.array_equal(first[1024:], second[1024:1100])
    assert not np.array_equal(first[:512], first[512:1024])
    with pytest.raises(InvalidInput, match=r"ask\.blocks"):
        prompt_of(s, Ask(2, 0.0, 1600, 1, (7, 8, 9)))


@pytest.mark.parametrize(("output", "scale", "live"), [(1, 64, 1), (20, 64, 1), (1024, 64, 17), (1024, 1, 1024), (256, 16, 17)])
def test_a_live_output_stands_for_about_as_many_tokens(output, scale, live):
    assert live_tokens(output, scale) == live
    recorded = as_played(Recorded((Arrival(5.0, 10, output),)), 0, 1, scale)
    (arrival,) = recorded.recorded
    assert arrival.time_s == 0.0 and arrival.output_tokens == 1 + scale * (live - 1) and abs(arrival.output_tokens - output) <= scale / 2
    assert asks_of(recorded, scale)[0].new_tokens == live


def test_arrivals_are_those_of_the_workload_and_end_with_it():
    workload = Synthetic(Poisson(2.0), LogNormalLengths(), 100, requests=50)
    recorded = as_played(workload, 4, 80, 1)
    known = list(workload.arrivals(4))
    assert [a.tokens for a in recorded.recorded] == [a.tokens for a in known] and recorded.requests == 50
    assert [a.time_s for a in recorded.recorded] == [a.time_s - known[0].time_s for a in known]
    faster = recorded.scaled(2.0)
    assert list(faster.arrivals(0))[-1].time_s == recorded.recorded[-1].time_s / 2
    assert recorded.filling(recorded.recorded[9].time_s).requests == 10
    end = recorded.recorded[-1].time_s
    twice = recorded.filling(2.5 * end).recorded
    assert 115 < len(twice) < 135 and [a.tokens for a in twice[50:100]] == [a.tokens for a in known]
    assert all(a.time_s <= b.time_s for a, b in itertools.pairwise(twice)) and twice[-1].time_s <= 2.5 * end


def test_late_arrivals_are_late_by_no_more_and_stay_in_order():
    recorded = as_played(Synthetic(Poisson(2.0), LogNormalLengths(), 100, requests=50), 4, 50, 1)
    late = recorded.late(3.0, 1)
    assert all(a.time_s <= b.time_s for a, b in itertools.pairwise(late.recorded)) and late != recorded.late(3.0, 2)
    due = {(a.tokens, a.output_tokens): a.time_s for a in recorded.recorded}
    assert len(due) == 50, "each is known by its lengths"
    delays = [a.time_s - due[a.tokens, a.output_tokens] for a in late.recorded]
    assert len(delays) == 50 and min(delays) >= 0 and 2 < max(delays) <= 3.0
    assert recorded.late(0.0, 1) == recorded
    with pytest.raises(InvalidInput, match="up_to_s"):
        recorded.late(-1.0, 0)


# --- a script that makes no sense


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"asks": ()}, "asks"),
        ({"asks": (Ask(0, 1.0, 1, 1), Ask(1, 0.5, 1, 1))}, "asks"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_a_script_that_makes_no_sense_is_refused(change, field):
    with pytest.raises(InvalidInput) as error:
        Script(**{"routers": ("127.0.0.1:9",), "asks": (Ask(0, 0.0, 1, 1),), "seed": 0, "vocab_size": 9} | change)
    assert error.value.field == field


# --- playing


def test_rows_say_what_came_of_each_request_in_model_units():
    asks = [Ask(i, 0.5 * i, 20 + i, 5, tenant="t") for i in range(4)]
    with region() as address:
        replay = play(script(asks, address, time_scale=20.0, check=True))
    assert [row.number for row in replay.rows] == [0, 1, 2, 3] and replay.ended == 4 and len(replay.late_s) == 4
    for ask, row in zip(asks, replay.rows, strict=True):
        assert row.done and (row.tokens, row.new_tokens, row.received, row.tenant) == (ask.tokens, 5, 5, "t")
        assert row.arrival_s == ask.time_s <= row.sent_s <= row.first_s < row.done_s
        # A prefill of at least 100 ms, in the profile's own seconds.
        assert row.parts["prefill"] > 0.099 and not row.wrong
        assert row.placement == "local" and row.kv_expected == row.kv_moved == 0
        assert 0.1 < sum(row.parts.values()) <= row.ttft_s
        assert set(row.flat()) >= {"ttft_s", "route_s", "queue_s", "prefill_s", "error"}
    assert violations(replay.rows) == []


class Slow(generation_pb2_grpc.GenerationServicer):
    """Answers nothing before it has `count` requests, then all; those of tenant "no" are refused."""

    def __init__(self, count: int):
        self.count, self.arrived, self.all = count, 0, asyncio.Event()

    async def Generate(self, request, context):
        if request.tenant == "no":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        self.arrived += 1
        if self.arrived == self.count:
            self.all.set()
        await self.all.wait()
        for i in range(request.max_new_tokens):
            token = generation_pb2.TokenOut()
            token.token.id = i
            yield generation_pb2.GenerateEvent(token=token)
        yield generation_pb2.GenerateEvent(usage=generation_pb2.Usage(placement="local"))


def play_slowly(asks, count, **more) -> tuple[Replay, int]:
    async def run():
        server = grpc.aio.server()
        slow = Slow(count)
        generation_pb2_grpc.add_GenerationServicer_to_server(slow, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        what = script(asks, f"127.0.0.1:{port}", **more)
        async with Client(what.routers) as client:
            replay = Replay(what, client)
            await replay.run()
        await server.stop(0)
        return replay, slow.arrived

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_an_arrival_is_not_held_back_by_the_answers_before_it():
    """Closed loop would wait for ever: nobody is answered before all have asked."""
    replay, arrived = play_slowly([Ask(i, 0.01 * i, 10, 2) for i in range(30)], 30)
    assert arrived == 30 and all(row.done for row in replay.rows)
    assert all(row.first_s >= replay.rows[-1].sent_s for row in replay.rows)


def test_a_refusal_is_a_failure_and_wrong_tokens_are_found():
    asks = [Ask(0, 0.0, 10, 2), Ask(1, 0.0, 10, 2, tenant="no")]
    replay, _ = play_slowly(asks, 1, check=True)
    done, refused = replay.rows
    assert refused.error == "RESOURCE_EXHAUSTED" and not refused.done and refused.first_s is None and refused.flat()["ttft_s"] is None
    assert done.done and done.wrong
    assert violations(replay.rows) == ["request 0: its tokens are not those of its prompt"]


def test_answers_are_asked_again_where_nothing_says_what_they_must_be():
    replay, arrived = play_slowly([Ask(i, 0.0, 10, 2) for i in range(5)], 5, recheck=2)
    assert arrived == 7 and not any(row.wrong for row in replay.rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_moved": 90}, "90 + 0 bytes"),
        ({"kv_resent": 50}, None),
        ({"kv_moved": 60, "kv_skipped": 40}, None),
        ({"recomputed": 5}, "5 tokens were recomputed"),
        ({"received": 1}, "1 tokens of 2"),
        ({"placement": "local"}, "local prefill with 100 bytes"),
        ({"wrong": True}, "not those of its prompt"),
        ({"error": "UNAVAILABLE", "kv_moved": 0}, None),
    ],
)
def test_what_breaks_an_invariant(change, says):
    row = Row(0, "", 10, 2, 0.0, 0.0, 1.0, 2.0, 2, "remote", kv_moved=100, kv_expected=100)
    found = violations([msgspec.structs.replace(row, **change)])
    assert found == [] if says is None else len(found) == 1 and says in found[0]


# --- the process


def test_the_process_brings_the_rows_and_ends(tmp_path):
    with region() as address, ReplayProcess() as process:
        what = script([Ask(i, 0.02 * i, 30, 3) for i in range(10)], address, late_s=30.0)
        began = process.start(what, str(tmp_path / "script"), str(tmp_path / "rows"))
        rows, said = process.wait()
    assert began > 0 and len(rows) == 10 and all(row.done and row.received == 3 for row in rows)
    assert said["finished"] == 10 and 0 <= said["late_p99_s"] <= said["late_max_s"] < math.inf


def test_a_replay_that_could_not_keep_up_is_invalid(tmp_path):
    with region() as address, ReplayProcess() as process:
        # All of them at once: the last is sent after the time that it takes to send the others.
        what = script([Ask(i, 0.0, 400, 1) for i in range(60)], address, late_s=1e-6)
        process.start(what, str(tmp_path / "script"), str(tmp_path / "rows"))
        with pytest.raises(ReplayInvalid, match=r"INVALID.*cannot keep up"):
            process.wait()


def test_it_ends_with_whoever_started_it(tmp_path):
    with ReplayProcess() as process:
        what = script([Ask(0, 0.0, 10, 1)], timeout_s=300.0)  # nobody listens there
        process.start(what, str(tmp_path / "script"), str(tmp_path / "rows"))
        child = psutil.Process(process.process.pid)
        assert child.is_running()
    assert psutil.wait_procs([child], timeout=20)[1] == []

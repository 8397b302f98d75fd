"""A profiled cluster does what the simulator does: the moments of its own clock are compared with a simulation of the same arrivals."""

import contextlib
import dataclasses
import random
import time

import numpy as np
import pytest
from profiled_fixtures import CHUNK, INSTANCE, Events, cluster_of, job, right_tokens, run_locally

from prfaas_jax.engine.api import Admitted, Committed, Finished, PrefillDone, PrefillProgress, Token
from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.scheduling.profiles import FittedDecode
from prfaas_jax.scheduling.view import Load, Servers
from prfaas_jax.simulation.decode import DecodeTask
from prfaas_jax.simulation.kernel import Kernel
from prfaas_jax.simulation.pools import DecodePool, PrefillPool
from prfaas_jax.simulation.prefill import PrefillTask

STRIDE = 40


@dataclasses.dataclass
class Arrival:
    """One request: when its prompt was submitted, and what became of it; `local` ones go on to decode."""

    asked: float
    length: int
    new: int
    local: bool
    computed: float = 0.0
    joined: float = 0.0
    done: float = 0.0
    tokens: tuple[float, ...] = ()


def simulated(arrivals: list[Arrival], rows: int) -> list[tuple[Arrival, list[int]]]:
    """The same arrivals through the simulator's pools; and the whole tokens that each request had at the `tokens` of its twin."""
    kernel, runs = Kernel(), []
    servers = Servers(("test",), np.ones(1, bool), np.zeros(1, np.int64), Load.idle(1))
    prefill = PrefillPool(kernel, "test", INSTANCE, 2, CHUNK, rows, servers, 0)

    def note(owner: tuple[Arrival, list[int]], field: str) -> Arrival:
        setattr(owner[0], field, kernel.now)
        return owner[0]

    decode = DecodePool(kernel, "test", INSTANCE, 2, lambda task: note(task.owner, "done"), servers, 0)
    decode.joined = lambda task: note(task.owner, "joined")

    def computed(task: PrefillTask) -> None:
        twin = note(task.owner, "computed")
        if twin.local:
            steps = DecodeTask(task.owner, twin.length, STRIDE * (twin.new - 1), 0.0)
            decode.submit(steps)
            for moment in twin.tokens:
                kernel.at(moment, lambda _: task.owner[1].append(steps.instance.generated_of(steps)))

    for arrival in sorted(arrivals, key=lambda a: a.asked):
        run = (dataclasses.replace(arrival), [])
        runs.append((arrival, run))
        kernel.at(arrival.asked, lambda _, r=run: prefill.submit(PrefillTask(r, 0, r[0].length, computed)))
    kernel.run()
    return [run for arrival in arrivals for original, run in runs if original is arrival]


@pytest.mark.parametrize("rows", [1, 3])
def test_queues_and_batches_are_those_of_a_simulation(rows):
    rng = random.Random(rows)
    with contextlib.closing(cluster_of(rows=rows, token_scale=STRIDE)) as cluster:
        runs = []
        for i in range(50):
            asked = job(str(i), rng.choice([64, 256, 300, 1000, 1500]), rng.randint(6, 18))
            if local := bool(i % 2):
                runs.append((asked, local, run_locally(cluster, asked)))
            else:
                runs.append((asked, local, Events(cluster)))
                cluster.prefill_engine.submit(asked, runs[-1][2])
            time.sleep(rng.expovariate(40))
        arrivals = []
        for asked, local, events in runs:
            if local:
                assert events.end() == Finished("length")
                assert events.tokens == right_tokens(asked)
            while not (done := [(t, e) for t, e in events.seen if isinstance(e, PrefillDone)]):
                time.sleep(0.01)
            at, event = done[0]
            moment = at - (event.queue_s + event.compute_s) * cluster.kernel.time_scale
            ends = (events.at(Committed)[0], events.at(Finished)[0]) if local else (0.0, 0.0)
            arrivals.append(
                Arrival(moment, len(asked.prompt), asked.sampling.max_new_tokens, local, at, *ends, tuple(events.at(Token)[1:-1]))
            )
        assert cluster.kernel.max_late_s > 0
    waited = 0
    for arrival, (twin, generated) in zip(arrivals, simulated(arrivals, rows), strict=True):
        live, sim = dataclasses.astuple(arrival), dataclasses.astuple(twin)
        np.testing.assert_allclose(live[4:7], sim[4:7], rtol=0, atol=1e-5)
        assert all(abs(n - STRIDE * i) <= 1 for i, n in enumerate(generated, 1)), generated
        waited += arrival.local and arrival.joined > arrival.computed + 1e-3
    assert waited > 3  # batches were full now and then


def test_live_tokens_keep_the_pace_of_the_model():
    """Alone in its batch, at 50 ms a step and 8 steps a token: a token each 0.4 s of the model."""
    steady = dataclasses.replace(INSTANCE, decode=FittedDecode(0.05))
    with contextlib.closing(cluster_of(instance=steady, token_scale=8)) as cluster:
        events = run_locally(cluster, job("a", 64, 12))
        assert events.end() == Finished("length")
    joined = events.at(Committed)[0]
    np.testing.assert_allclose(np.subtract(events.at(Token), joined), 0.4 * np.arange(12), atol=0.06 * 0.05)


def test_tokens_come_sooner_when_others_leave_a_batch():
    """Steps of two take much longer than steps of one; the first to leave sets the other's pace at once."""
    crowded = dataclasses.replace(INSTANCE, decode=FittedDecode(0.01, 0.05))
    with contextlib.closing(cluster_of(1, 1, crowded, token_scale=16, time_scale=50.0)) as cluster:
        short, long = run_locally(cluster, job("a", 64, 2)), run_locally(cluster, job("b", 64, 6))
        assert long.end() == short.end() == Finished("length")
    gaps = np.diff(long.at(Token))
    assert short.at(Finished)[0] > long.at(Committed)[0]
    np.testing.assert_allclose(gaps[1:], 16 * 0.06, atol=0.01)


def test_a_prompt_of_one_chunk_is_one_event_and_a_long_one_tells_of_each():
    with contextlib.closing(cluster_of(1, 0)) as cluster:
        runs = {length: Events(cluster) for length in (CHUNK, 3 * CHUNK + 1)}
        for length, events in runs.items():
            cluster.prefill_engine.submit(job(str(length), length), events)
        while not all(events.at(PrefillDone) for events in runs.values()):
            time.sleep(0.01)
        assert len(runs[CHUNK].at(PrefillProgress)) == 1
        steps = runs[3 * CHUNK + 1]
        assert [e.tokens for _, e in steps.seen if isinstance(e, PrefillProgress)] == [256, 512, 768, 769]
        assert isinstance(steps.seen[0][1], Admitted)
        assert cluster.decode_engine is None
        assert cluster.prefill_engine.status().tokens_prefilled == 4 * CHUNK + 1


# --- conversion --------------------------------------------------------------------------------------------------------------------


def counts(cluster) -> tuple[int, int]:
    """Instances that take prompts, and that take requests."""
    status = cluster.decode_engine.status()
    return len(status.instances), status.decode_slots // INSTANCE.max_batch


def wait_for(cluster, expected: tuple[int, int]) -> None:
    deadline = time.monotonic() + 30
    while counts(cluster) != expected:
        assert time.monotonic() < deadline, counts(cluster)
        time.sleep(0.005)


def test_instances_change_their_roles_under_load_and_nothing_is_lost():
    rng = random.Random(1)
    with contextlib.closing(cluster_of(2, 3, token_scale=8, time_scale=40.0, convert_s=2.0)) as cluster:
        assert counts(cluster) == (2, 3)
        jobs = [job(str(i), rng.choice([64, 300, 700]), rng.randint(1, 6)) for i in range(90)]
        runs = []
        for i, asked in enumerate(jobs):
            runs.append(run_locally(cluster, asked))
            if i in (10, 40):
                cluster.convert("prefill")
            if i in (25, 60, 70):
                cluster.convert("decode")
            if i == 10:
                assert counts(cluster)[1] == 2  # it takes nothing new, at once
            time.sleep(rng.expovariate(100))
        for asked, events in zip(jobs, runs, strict=True):
            assert events.end() == Finished("length")
            assert events.tokens == right_tokens(asked)
        wait_for(cluster, (1, 4))
        status = cluster.decode_engine.status()
        assert (status.running, status.waiting, status.decode_waiting) == (0, 0, 0)


def test_an_idle_instance_changes_after_convert_s_and_works_in_its_new_role():
    with contextlib.closing(cluster_of(0, 2, convert_s=4.0)) as cluster:
        with pytest.raises(EngineFailed, match="no prefill instance"):
            cluster.prefill_engine.submit(job("far", 64), print)
        alone = run_locally(cluster, job("early", 64)).end()
        assert "no prefill instance" in str(alone.error)
        asked = cluster.kernel.present
        cluster.convert("prefill")
        wait_for(cluster, (1, 1))
        assert cluster.kernel.present >= asked + 4.0
        assert run_locally(cluster, job("late", 64)).end() == Finished("length")


def test_conversions_that_would_leave_nobody_are_refused():
    with contextlib.closing(cluster_of(1, 1)) as cluster:
        for to, match in (("prefill", "2 or more"), ("elsewhere", "prefill or decode")):
            with pytest.raises(InvalidInput, match=match):
                cluster.convert(to)
        cluster.convert("decode")
        with pytest.raises(InvalidInput, match="1 or more"):
            cluster.convert("decode")
    with contextlib.closing(cluster_of(2, 0)) as cluster, pytest.raises(InvalidInput, match="no decode engine"):
        cluster.convert("decode")

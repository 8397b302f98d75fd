import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill, Instance, MeasuredDecode
from prfaas_jax.scheduling.view import Load, Servers
from prfaas_jax.simulation.decode import DecodeInstance, DecodeTask
from prfaas_jax.simulation.kernel import Kernel
from prfaas_jax.simulation.pools import DecodePool

PREFILL = FittedPrefill(0.1, 1.0)
CONSTANT = Instance("c", PREFILL, FittedDecode(0.025), max_batch=4)
BATCHED = dataclasses.replace(CONSTANT, decode=MeasuredDecode((1, 2, 8), (0.010, 0.014, 0.050)))
GROWING = dataclasses.replace(CONSTANT, decode=FittedDecode(0.010, 0.002, 2e-6))


def pool_of(instance, count, kernel):
    """A pool, what it finished and when, and the row of the view that it writes."""
    servers = Servers(("r",), np.ones(1, bool), np.zeros(1, np.int64), Load.idle(1))
    done = {}
    pool = DecodePool(kernel, "r", instance, count, lambda task: done.setdefault(task.owner, kernel.now), servers, 0)
    return pool, done, servers.load


def fluid(instance, arrivals, count=1):
    kernel, joined = Kernel(), {}
    pool, done, load = pool_of(instance, count, kernel)
    pool.joined = lambda task: joined.setdefault(task.owner, (kernel.now, task.instance.index))
    for i, (at, context, tokens, kv) in enumerate(arrivals):
        kernel.at(at, pool.submit, DecodeTask(i, context, tokens, kv))
    kernel.run()
    assert load.slots[0] == count * instance.max_batch and load.waiting[0] == 0
    return done, joined, pool


def by_token(instance, arrivals):
    """One instance token by token: requests join and leave between steps only."""
    now, coming, waiting, running, done = 0.0, list(enumerate(arrivals)), [], {}, {}
    while coming or waiting or running:
        if not running and not waiting:
            now = max(now, coming[0][1][0])
        while coming and coming[0][1][0] <= now + 1e-12:
            i, (_, context, tokens, kv) = coming.pop(0)
            waiting.append((i, context, tokens, kv))
        while waiting and len(running) < instance.max_batch:
            held = sum(kv for *_, kv in running.values())
            i, context, tokens, kv = waiting[0]
            if held + kv > instance.kv_memory_bytes:
                break
            running[i] = [context, tokens, kv]
            waiting.pop(0)
        now += instance.decode.step_s(len(running), sum(context for context, *_ in running.values()))
        for i, state in list(running.items()):
            state[0] += 1
            state[1] -= 1
            if not state[1]:
                done[i] = now
                del running[i]
    return done


@st.composite
def loads(draw, most=9):
    arrivals, now = [], 0.0
    for _ in range(draw(st.integers(1, most))):
        now += draw(st.sampled_from([0.0, 0.013, 0.4, 2.0, 9.0]))
        tokens = draw(st.sampled_from([1, 2, 30, 200, 900]))
        arrivals.append((now, draw(st.sampled_from([0, 100, 5000])), tokens, draw(st.sampled_from([0.0, 1.0, 3.0]))))
    return arrivals


@settings(max_examples=60)
@given(loads(), st.sampled_from([CONSTANT, BATCHED, GROWING]), st.sampled_from([3.0, 6.0, math.inf]))
def test_times_are_those_of_decoding_token_by_token(arrivals, instance, memory):
    """A request may join in the middle of a step: one step of difference for each join that it waits for, and 1 % where contexts grow."""
    instance = dataclasses.replace(instance, kv_memory_bytes=memory)
    done, _, _ = fluid(instance, arrivals)
    exact = by_token(instance, arrivals)
    step = instance.decode.step_s(4, 4 * 6000)
    assert done.keys() == exact.keys()
    for i, at in exact.items():
        assert done[i] == pytest.approx(at, rel=0.01 if instance is GROWING else 1e-6, abs=step * len(arrivals))


@pytest.mark.parametrize(("instance", "error"), [(CONSTANT, 1e-9), (BATCHED, 1e-9), (GROWING, 1e-9)])
def test_a_batch_that_joins_together_has_the_exact_times(instance, error):
    arrivals = [(0.0, 500 * i, tokens, 0.0) for i, tokens in enumerate((100, 700, 700, 2000))]
    assert fluid(instance, arrivals)[0] == pytest.approx(by_token(instance, arrivals), rel=error)


@given(loads(12), st.integers(1, 3), st.sampled_from([3.0, 4.0]))
def test_memory_and_slots_are_never_exceeded_and_waiting_is_first_come_first_served(arrivals, count, memory):
    instance = dataclasses.replace(BATCHED, max_batch=2, kv_memory_bytes=memory)
    done, joined, pool = fluid(instance, arrivals, count)
    order = [joined[i][0] for i in range(len(arrivals))]
    assert order == sorted(order), "nobody overtakes"
    assert done.keys() == joined.keys() == set(range(len(arrivals)))
    for i, (start, index) in joined.items():
        beside = [j for j, (at, where) in joined.items() if j == i or (where == index and at <= start < done[j])]
        assert len(beside) <= 2 and sum(arrivals[j][3] for j in beside) <= memory
    for i in pool.instances:
        assert i.running == 0 and i.free_bytes == memory and i.progress == 0 and not i._heap
    tokens = sum(tokens for _, _, tokens, _ in arrivals)
    assert sum(i.generated for i in pool.instances) == pytest.approx(tokens, abs=1e-3)
    stays = sum(done[i] - joined[i][0] for i in joined)
    assert sum(i.slot_s for i in pool.instances) == pytest.approx(stays, abs=1e-6)


def test_a_join_takes_the_batch_that_has_fewest():
    joined = fluid(CONSTANT, [(0.1 * i, 0, 1000, 0.0) for i in range(6)], count=3)[1]
    assert [joined[i][1] for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_failed_instance_hands_back_what_ran_with_whole_tokens():
    kernel = Kernel()
    pool, done, load = pool_of(CONSTANT, 1, kernel)
    tasks = [DecodeTask(i, 0, tokens, 1.0) for i, tokens in enumerate((50, 4, 100))]
    for task in tasks:
        pool.submit(task)
    kernel.run(0.025 * 10 + 0.01)
    lost = pool.instances[0].fail()
    assert lost == [tasks[0], tasks[2]] and [t.generated for t in lost] == [10, 10] and list(done) == [1]
    pool.refresh()
    assert not pool.alive and not any(t.running for t in lost)
    assert load.slots[0] > 0, "the router does not know yet"
    pool.publish()
    assert load.slots[0] == 0
    pool.submit(DecodeTask(3, 0, 10, 1.0))
    assert load.waiting[0] == 1
    pool.instances[0].recover()
    pool.refresh()
    kernel.run()
    assert done[3] == pytest.approx(0.26 + 0.25) and load.waiting[0] == 0


def test_the_last_token_is_there_when_the_request_leaves_and_not_before():
    kernel = Kernel()
    pool, _, _ = pool_of(CONSTANT, 1, kernel)
    task = DecodeTask(0, 0, 4, 0.0)
    pool.submit(task)
    kernel.at(0.1, lambda _: None)
    kernel.run(0.1 - 1e-12)
    assert pool.instances[0].generated_of(task) == 3


def test_a_cancelled_request_leaves_its_room_and_the_rest_go_on():
    kernel = Kernel()
    pool, done, _ = pool_of(BATCHED, 1, kernel)
    a, b = DecodeTask("a", 0, 100, 0.0), DecodeTask("b", 0, 100, 0.0)
    pool.submit(a)
    pool.submit(b)
    kernel.run(0.7)
    pool.instances[0].cancel(a)
    assert a.generated == 50 and pool.instances[0].running == 1
    kernel.run()
    assert done == {"b": pytest.approx(0.7 + 50 * 0.010)}


@pytest.mark.parametrize("fails", [False, True])
def test_a_draining_instance_says_so_when_it_is_up_and_empty(fails):
    kernel, drained = Kernel(), []
    pool, done, _ = pool_of(CONSTANT, 2, kernel)
    task = DecodeTask("a", 0, 100, 0.0)
    pool.submit(task)
    instance = pool.instances[0]
    instance.draining, instance.drained = True, lambda i: drained.append(kernel.now)
    pool.submit(DecodeTask("b", 0, 1, 0.0))
    assert pool.instances[1].running == 1, "a draining instance takes nobody"
    if fails:
        kernel.run(1.0)
        assert instance.fail() == [task]
        kernel.run(3.0)
        assert not drained
        instance.recover()
        assert drained == [3.0]
    else:
        kernel.run()
        assert drained == [done["a"]] == [pytest.approx(2.5)]


def test_bad_input_names_the_field():
    pool, _, _ = pool_of(dataclasses.replace(CONSTANT, kv_memory_bytes=10.0), 1, Kernel())
    with pytest.raises(InvalidInput, match=r"request KV=11\.0: expected at most 10 bytes, the decode memory of c"):
        pool.submit(DecodeTask(0, 0, 1, 11.0))
    with pytest.raises(InvalidInput, match="one that fits"):
        pool.instances[0].join(DecodeTask(0, 0, 1, 11.0))
    with pytest.raises(InvalidInput, match=r"instance p\.decode"):
        DecodeInstance(Kernel(), Instance("p", PREFILL), print)

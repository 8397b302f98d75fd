"""The fault drill's load and its view of a router, against servers in this process whose engines need no model."""

import threading

import grpc
import pytest
from serving_fixtures import SPEC, VOCAB, decode_engine, decode_server, eventually, greedy, router

from prfaas_jax.scheduling.policies import AlwaysLocal
from prfaas_jax.testing.drill_load import Load, Reference, judge, make_prompts
from prfaas_jax.testing.drill_watch import RouterWatch
from prfaas_jax.testing.relay import Relay

NOBODY = "127.0.0.1:9"
QUICK = {"report_s": 0.1, "silence_s": 0.5}
PROMPTS = make_prompts(4, VOCAB, (10, 50), (60, 100), 20, seed=1)


def reference(prompt) -> Reference:
    return Reference(tuple(greedy(prompt.ids, prompt.new_tokens)), 0.1, 0.2)


def wrong(asked) -> list[str]:
    return judge(asked, reference(asked.prompt), SPEC.bytes)


@pytest.fixture
def system():
    """(router, relay in front of its first decode server, the other one's address)."""
    threads = threading.active_count()
    with (
        decode_server(decode_engine(step_s=0.01)) as first,
        decode_server(decode_engine(step_s=0.01)) as second,
        Relay(first.address) as link,
        router(AlwaysLocal(), f"{link.address},{second.address}", **QUICK) as front,
    ):
        yield front, link, second.address
    assert threading.active_count() <= threads + 2


def test_steady_load_is_answered_as_planned_and_ends_when_told(system):
    front, _, _ = system
    with Load(front.address, PROMPTS, 20.0, seed=0) as load:
        load.steady(50.0)
        eventually(lambda: len(load.asked) >= 20, what="requests come by themselves")
        load.steady(0)
        load.drain()
        asked = list(load.asked)
        assert load.running() == [] and {one.outcome() for one in asked} == {"as planned"}
        assert [text for one in asked for text in wrong(one)] == []
        assert {one.prompt.number for one in asked} == {0, 1, 2, 3} and {one.kind for one in asked} == {"load"}


def test_the_same_seed_asks_the_same(system):
    front, _, _ = system
    orders = []
    for seed in (3, 3, 4):
        with Load(front.address, PROMPTS, 20.0, seed) as load:
            load.steady(100.0)
            eventually(lambda load=load: len(load.asked) >= 12)
        orders.append([one.prompt.number for one in load.asked[:12]])
    assert orders[0] == orders[1] != orders[2]


def test_a_cancelled_request_and_one_without_time_end_as_such(system):
    front, _, _ = system
    with Load(front.address, PROMPTS, 20.0, seed=0) as load:
        given_up = load.ask(PROMPTS[0], "cancelled")
        eventually(lambda: given_up.answer.tokens, what="it has begun")
        load.cancel(given_up)
        late = load.ask(PROMPTS[1], "deadline", timeout_s=0.1)
        load.drain()
        assert given_up.outcome() == "cancelled" and wrong(given_up) == []
        assert late.outcome() == "DEADLINE_EXCEEDED" and late.error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and wrong(late) == []


def test_a_server_that_dies_is_detected_and_its_requests_are_restarted(system):
    front, link, _ = system
    with RouterWatch(front.address) as watch, Load(front.address, PROMPTS, 20.0, seed=0) as load:
        eventually(lambda: len(watch.backends()) == 2 and all(b.healthy for b in watch.backends().values()))
        asked = [load.ask(prompt) for prompt in PROMPTS]
        eventually(lambda: all(len(one.answer.tokens) > 2 for one in asked), what="all decode")
        there = [one for one in asked if one.answer.placed[-1].decode_address == link.address]
        struck = max(one.answer.last_s for one in asked)
        link.set_target(NOBODY)
        link.reset()
        eventually(lambda: watch.detected_s(link.address, struck) is not None, what="the router sees it")
        load.drain()
        assert there and {one.outcome() for one in there} == {"restarted"}
        assert [text for one in asked for text in wrong(one)] == []
        assert 0 <= watch.detected_s(link.address, struck) < 5 and watch.detected_s(front.address, struck) is None


def test_a_router_that_ends_is_seen_as_its_own_silence(system):
    front, _, _ = system
    with Relay(front.address) as link, RouterWatch(link.address) as watch:
        eventually(lambda: watch.backends(), what="it speaks")
        assert watch.detected_s("", 0.0) is None
        link.set_target(NOBODY)
        link.reset()
        eventually(lambda: watch.detected_s("", 0.0) is not None and not watch.backends(), what="it does not")
        link.set_target(front.address)
        eventually(lambda: len(watch.backends()) == 2, what="it is found again")

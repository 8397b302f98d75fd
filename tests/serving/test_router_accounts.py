"""What the router keeps account of while things go wrong: breakers, rates, fingerprints, and what controllers are told."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from serving_fixtures import (
    channel,
    decode_engine,
    decode_server,
    error_of,
    eventually,
    generate,
    generation_status,
    prefill_server,
    prompt_of,
    request,
    router,
)

from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote
from prfaas_jax.scheduling.view import NoDecodeServer
from prfaas_jax.serving.breaker import Breaker, BreakerOptions
from prfaas_jax.serving.decode_server import DecodeServerOptions
from prfaas_jax.serving.deployment import ClusterServers
from prfaas_jax.serving.dispatcher import Dispatcher, Rollout
from prfaas_jax.serving.fleet import FleetOptions, Server
from prfaas_jax.serving.proto import common_pb2, fleet_pb2, fleet_pb2_grpc, generation_pb2, prefill_pb2
from prfaas_jax.serving.tenancy import Tenancy
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.security import NONE

NOBODY = "127.0.0.1:9"
QUICK = {"report_s": 0.1, "silence_s": 0.5}
OPTIONS = FleetOptions()
FAR, HOME = "127.0.0.1:10", "127.0.0.1:21"
CLUSTERS = (ClusterServers("far", "prefill", (FAR,)), ClusterServers("home", "region", (), (HOME,)))


class Watches:
    """A controller that only looks."""

    def __init__(self):
        self.seen = []

    def observe(self, request, placement, now):
        self.seen.append(placement.prefill)

    def update(self, view, now):
        return ()


def dispatcher(policy, controller=None, rollout=None) -> Dispatcher:
    """Over two servers that are well."""
    rest = Tenancy({}), rollout or Rollout(), lambda action: None, lambda seconds, reason: None
    made = Dispatcher(policy, controller, CLUSTERS, None, OPTIONS, NONE, *rest)
    for cluster, role, address in (("far", "prefill", FAR), ("home", "decode", HOME)):
        server = made.fleet._servers[role, address] = Server(cluster, role, address, None, Breaker(OPTIONS))
        engine = common_pb2.EngineStatus(instances=[common_pb2.EngineStatus.PrefillInstance()], decode_slots=8)
        made.fleet._heard(server, (prefill_pb2.PrefillStatus if role == "prefill" else generation_pb2.GenerationStatus)(engine=engine))
    return made


def asked() -> generation_pb2.GenerateRequest:
    message = generation_pb2.GenerateRequest(max_new_tokens=1)
    message.token_ids.ids[:] = [1] * 10
    return message


def running(address: str) -> dict[str, int]:
    """Requests that decode, by server, as the router at an address knows them."""
    return {b.address: b.engine.running for b in generation_status(address).backends}


@pytest.mark.parametrize(("code", "allowed"), [("RESOURCE_EXHAUSTED", True), ("UNAVAILABLE", False)])
def test_a_trial_that_says_nothing_of_the_server_frees_its_place(code, allowed):
    made = dispatcher(AlwaysRemote())
    way = made.way("home", made.fleet.get("prefill", FAR))
    for _ in range(3):
        way.failed(time.monotonic() - 5, time.monotonic() - 5)
    assert way.state(time.monotonic()) == "half-open"
    dispatch = made.decide(asked())
    dispatch.begin()
    assert not way.allows(time.monotonic())
    dispatch.failed(FAR, code)
    dispatch.end()
    assert way.allows(time.monotonic()) is allowed


def first(dispatch, address: str, *failures: str) -> None:
    """The first token comes, of a prompt that this server computed after those had failed to."""
    prefilled = generation_pb2.Prefilled(
        prefill_address=address,
        failures=[generation_pb2.Failure(address=a, code="UNAVAILABLE") for a in failures],
        account=dispatch._account,
    )
    dispatch.first_token(generation_pb2.TokenOut(prefilled=prefilled))


def test_a_way_is_judged_when_the_first_token_comes_and_not_when_the_last_one_does():
    """Outputs of a minute told of a link as it had been: requests went into a dead one, and none into one that was well again."""
    made = dispatcher(AlwaysRemote())
    way = made.way("home", made.fleet.get("prefill", FAR))
    long = [made.decide(asked()) for _ in range(5)]
    for dispatch in long:
        dispatch.begin()
    for dispatch in long[:2]:
        first(dispatch, FAR)
    for dispatch in long[2:]:
        first(dispatch, "", FAR)  # the link broke, and they were prefilled at home
    assert way.state(time.monotonic()) == "open"
    usage = generation_pb2.Usage(placement="remote", prefill_address=FAR)
    for dispatch in long[:2]:
        dispatch.account(usage)
        dispatch.end()
    assert way.state(time.monotonic()) == "open", "what ends now was prefilled before"
    time.sleep(1.05)
    trial = made.decide(asked())
    trial.begin()
    assert trial._prefill is not None and not way.allows(time.monotonic())
    first(trial, FAR)
    assert way.state(time.monotonic()) == "closed", "and still it decodes"
    for dispatch in long[2:]:
        dispatch.end()
    assert way.state(time.monotonic()) == "closed"


def test_a_way_is_judged_by_the_usage_where_the_first_token_is_not_sent_again():
    """Who moves to another decode server has the first tokens already."""
    made = dispatcher(AlwaysRemote())
    way = made.way("home", made.fleet.get("prefill", FAR))
    failure = generation_pb2.Failure(address=FAR, code="UNAVAILABLE")
    for _ in range(3):
        dispatch = made.decide(asked())
        dispatch.begin()
        dispatch.first_token(generation_pb2.TokenOut())
        dispatch.account(generation_pb2.Usage(placement="local", fallbacks=1, failures=[failure], account=dispatch._account))
        dispatch.end()
    assert way.state(time.monotonic()) == "open"
    time.sleep(1.05)
    trial = made.decide(asked())
    trial.begin()
    trial.first_token(generation_pb2.TokenOut())
    trial.account(generation_pb2.Usage(placement="remote", prefill_address=FAR, account=trial._account))
    trial.end()
    assert way.state(time.monotonic()) == "closed"


def test_a_decode_server_that_answers_again_gets_more_before_its_trial_has_ended():
    made = dispatcher(AlwaysLocal())
    server = made.fleet.get("decode", HOME)
    for _ in range(3):
        server.breaker.failed(time.monotonic() - 5, time.monotonic() - 5)
    made.live.unsettled()
    trial = made.decide(asked())
    trial.begin()
    with pytest.raises(NoDecodeServer):
        made.decide(asked())
    trial.first_token(generation_pb2.TokenOut())
    made.decide(asked())
    trial.sick()
    trial.end()
    with pytest.raises(NoDecodeServer):
        made.decide(asked())


def test_coming_back_to_a_request_tries_nothing():
    """It took the place of the trial for half a minute."""
    made = dispatcher(AlwaysLocal())
    server = made.fleet.get("decode", HOME)
    for _ in range(3):
        server.breaker.failed(time.monotonic() - 5, time.monotonic() - 5)
    message = asked()
    message.held_by = HOME
    made.attach(message).begin()
    assert server.breaker.allows(time.monotonic())


def test_a_breaker_that_nobody_tries_costs_decisions_nothing(monkeypatch):
    """As long as one was half-open, every decision wrote the whole view anew."""
    made = dispatcher(AlwaysLocal())
    way = made.way("home", made.fleet.get("prefill", FAR))
    for _ in range(3):
        way.failed(time.monotonic() - 0.9, time.monotonic() - 0.9)
    made.live.unsettled()
    made.decide(asked())
    assert not made.live.at(made.live.now).prefill.healthy[0]
    time.sleep(0.15)
    assert made.live.at(made.live.now).prefill.healthy[0], "it may be tried"
    written = []
    monkeypatch.setattr(made.live, "_write", lambda name, now: written.append(name))
    for _ in range(5):
        made.decide(asked())
    assert way.state(time.monotonic()) == "half-open" and not written


def test_a_shadow_that_fails_changes_nothing():
    class Fails(AlwaysLocal):
        def place(self, request, view, now):
            raise ZeroDivisionError

    made = dispatcher(AlwaysLocal(), rollout=Rollout(shadow=Fails(), name="fails"))
    made.decide(asked())
    made.decide(asked(), again=True)
    made.report(status := generation_pb2.GenerationStatus())
    assert status.decisions == {"local: always_local": 2, "shadow failed": 1}, "it is asked once for a request"


def test_the_end_of_an_old_request_does_not_free_the_place_of_a_trial():
    breaker = Breaker(BreakerOptions(1, 1.0))
    assert not breaker.sent(0.0), "it is closed: nobody tries"
    breaker.failed(1.0, 0.0)
    assert breaker.sent(2.5) and not breaker.allows(2.6)


def test_breakers_go_with_their_servers():
    made = dispatcher(AlwaysRemote())
    for _ in range(3):
        made.way("home", made.fleet.get("prefill", FAR)).failed(time.monotonic(), time.monotonic())
    made.live.unsettled()
    del made.fleet._servers["prefill", FAR]
    made.live.at(made.live.now)
    made.live.at(made.live.now)
    assert not made.live.breakers


def test_controllers_see_each_request_once_and_as_it_is_placed():
    watches = Watches()
    made = dispatcher(AlwaysRemote(), watches, Rollout(canary_share=0.0))
    made.decide(asked())
    made.decide(asked(), again=True)
    assert watches.seen == [None], "the policy wanted it elsewhere"


def test_a_region_whose_servers_are_full_is_not_named_again():
    with (
        decode_server(decode_engine(step_s=0.05), max_requests=1) as one,
        decode_server(decode_engine(step_s=0.05)) as two,
        router(AlwaysLocal(), f"{one.address},{two.address}", **QUICK) as front,
        ThreadPoolExecutor(4) as pool,
    ):
        jobs = [pool.submit(generate, one.address, request(prompt_of(20), 60))]
        jobs += [pool.submit(generate, two.address, request(prompt_of(20 + i), 60)) for i in range(3)]
        eventually(
            lambda: {b.address: b.engine.running for b in generation_status(front.address).backends} == {one.address: 1, two.address: 3}
        )
        assert generate(front.address, request(prompt_of(30))).usage.decode_address == two.address
        for job in jobs:
            job.result(20)


def test_a_decode_server_that_answers_and_fails_is_left_alone():
    """It is the least busy of all, so it got everything. What it fails to do another one does, until its breaker opens."""
    sick = decode_engine()

    def fail(job, sink):
        raise EngineFailed("sick")

    with (
        decode_server(sick) as one,
        decode_server(decode_engine(step_s=0.05)) as two,
        router(AlwaysLocal(), f"{one.address},{two.address}", breaker_open_s=20.0, **QUICK) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        busy = pool.submit(generate, two.address, request(prompt_of(5), 100))
        eventually(
            lambda: {b.address: b.engine.running for b in generation_status(front.address).backends} == {one.address: 0, two.address: 1}
        )
        sick.reserve = fail
        done = [generate(front.address, request(prompt_of(5), 2)).usage for _ in range(6)]
        assert [u.decode_address for u in done] == [two.address] * 6 and [u.attempts for u in done] == [2, 2, 2, 1, 1, 1]
        busy.result(20)


def test_a_request_that_makes_servers_fail_is_tried_on_two_of_them():
    def fail(job, sink):
        raise EngineFailed("sick of it")

    engines = [decode_engine() for _ in range(3)]
    for engine in engines:
        engine.reserve = fail
    with decode_server(engines[0]) as one, decode_server(engines[1]) as two, decode_server(engines[2]) as three:
        servers = [one.address, two.address, three.address]
        with router(AlwaysLocal(), ",".join(servers), max_attempts=3, **QUICK) as front:
            error = error_of(front.address, request(prompt_of(5), 2))
        assert error.code() is grpc.StatusCode.INTERNAL and "sick of it" in error.details()
        assert sum(generation_status(address).failed["INTERNAL"] for address in servers) == 2


def test_a_request_that_waits_sees_a_breaker_let_go():
    with (
        decode_server() as decode,
        router(AlwaysLocal(), decode.address, breaker_failures=1, breaker_open_s=0.3, park_s=20.0, **QUICK) as front,
    ):
        front._dispatcher.fleet.get("decode", decode.address).breaker.failed(time.monotonic(), time.monotonic())
        front._dispatcher.live.unsettled()
        began = time.monotonic()
        generate(front.address, request(prompt_of(5), 2), timeout=30.0)
        assert time.monotonic() - began < 15.0


def test_clients_in_a_hurry_do_not_close_the_way_for_others():
    with Relay(NOBODY) as lane, prefill_server(advertise_lane=lane.address) as far, decode_server() as decode:
        lane.set_target(far.lane_addresses[0])
        lane.set_rate(0.0008)
        with router(AlwaysRemote(), decode.address, far.address, breaker_failures=1, **QUICK) as front:
            usage = generate(front.address, request(prompt_of(4000), 2, allow_fallback=True), timeout=6.0).usage
            assert usage.placement == "local" and "predicted" in usage.fallback_reason
            lane.set_rate(None)
            assert generate(front.address, request(prompt_of(50), 2)).usage.placement == "remote"


def test_nobody_can_take_away_a_server_that_the_deployment_names():
    with decode_server() as decode, router(AlwaysLocal(), decode.address, **QUICK) as front, channel(front.address) as opened:
        fleet_pb2_grpc.FleetStub(opened).Leave(fleet_pb2.LeaveRequest(address=decode.address), timeout=5)
        assert generate(front.address, request(prompt_of(5), 2)).tokens


def test_a_stranger_that_joins_while_the_others_are_down_does_not_say_which_model_is_right():
    with (
        decode_server() as decode,
        decode_server(decode_engine(fingerprint="0" * 32)) as stranger,
        Relay(decode.address) as link,
        router(AlwaysLocal(), link.address, **QUICK) as front,
        channel(front.address) as opened,
    ):

        def backends():
            return {b.address: (b.healthy, b.why) for b in generation_status(front.address).backends}

        eventually(lambda: backends()[link.address][0])
        link.set_target(NOBODY)
        link.reset()
        eventually(lambda: not backends()[link.address][0])
        fleet_pb2_grpc.FleetStub(opened).Join(
            fleet_pb2.JoinRequest(role="decode", address=stranger.address, cluster=link.address), timeout=5
        )
        eventually(lambda: "another model" in backends().get(stranger.address, (0, ""))[1])
        link.set_target(decode.address)
        eventually(lambda: backends()[link.address][0], timeout_s=10.0)


def test_nobody_joins_as_everywhere():
    with pytest.raises(InvalidInput, match="advertise"):
        DecodeServerOptions(address="0.0.0.0:0", insecure=True, join="127.0.0.1:1", cluster="home")
    DecodeServerOptions(address="0.0.0.0:0", insecure=True, join="127.0.0.1:1", cluster="home", advertise="host:7000")

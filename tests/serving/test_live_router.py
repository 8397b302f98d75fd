"""The router while servers die, freeze, come and go: no token is lost or repeated, and whoever fails is left alone."""

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from serving_fixtures import (
    QUICK,
    SPEC,
    channel,
    decode_engine,
    decode_server,
    error_of,
    eventually,
    generate,
    generation_status,
    greedy,
    idle,
    of_clusters,
    prefill_engine,
    prefill_server,
    prompt_of,
    request,
    router,
    serving,
)

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote, Threshold
from prfaas_jax.serving.client import Answer, Client, retry_after_s
from prfaas_jax.serving.decode_server import DecodeServerOptions
from prfaas_jax.serving.deployment import ClusterServers
from prfaas_jax.serving.pd_server import PdServer
from prfaas_jax.serving.prefill_server import PrefillServerOptions
from prfaas_jax.serving.proto import fleet_pb2, fleet_pb2_grpc, generation_pb2, generation_pb2_grpc
from prfaas_jax.testing.relay import Relay

NOBODY = "127.0.0.1:9"


def die(relay: Relay) -> None:
    """What its peers see of a server whose process is killed."""
    relay.set_target(NOBODY)
    relay.reset()


def ask(addresses, message, timeout_s=20.0) -> Answer:
    """Through the client that comes back."""

    async def run() -> Answer:
        async with Client(addresses) as client:
            return await client.generate(message, timeout_s)

    return asyncio.run(run())


@pytest.mark.parametrize("how", ["killed", "frozen"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_decode_server_that_fails_costs_latency_and_never_a_token(how, share):
    prompt = prompt_of(100)
    with (
        decode_server(decode_engine(step_s=0.02)) as first,
        decode_server(decode_engine(step_s=0.02)) as second,
        Relay(first.address) as link,
        router(AlwaysLocal(), f"{link.address},{second.address}", **QUICK) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(generate, front.address, request(prompt, 40))
        eventually(lambda: generation_status(first.address).engine.tokens_decoded >= 40 * share, what="some tokens")
        eventually(lambda: generation_status(first.address).streams, what="the request is there")
        failed_at = time.monotonic()
        die(link) if how == "killed" else link.black_hole()
        (dead,) = [b for b in generation_status(front.address).backends if b.address == link.address]
        while dead.healthy and time.monotonic() < failed_at + 5:
            (dead,) = [b for b in generation_status(front.address).backends if b.address == link.address]
        assert time.monotonic() - failed_at < 2.0 and dead.why
        usage = answer.result(20).usage
        assert answer.result().tokens == greedy(prompt, 40)
        assert (usage.decode_address, usage.attempts) == (second.address, 2)
        eventually(lambda: idle(None, second.address), what="nothing left")


def test_a_request_waits_for_the_only_decode_server_to_come_back():
    prompt = prompt_of(50)
    with (
        decode_server(decode_engine(step_s=0.02)) as decode,
        Relay(decode.address) as link,
        router(AlwaysLocal(), link.address, park_s=10.0, **QUICK) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(generate, front.address, request(prompt, 30))
        eventually(lambda: generation_status(decode.address).engine.tokens_decoded > 5, what="some tokens")
        die(link)
        eventually(lambda: not generation_status(front.address).backends[0].healthy, what="it is seen")
        link.set_target(decode.address)
        assert answer.result(20).tokens == greedy(prompt, 30)
        assert answer.result().usage.attempts == 2


def test_without_any_decode_server_the_answer_says_so_in_time():
    with router(AlwaysLocal(), NOBODY, park_s=0.3, **QUICK) as front:
        began = time.monotonic()
        error = error_of(front.address, request(prompt_of(5)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and NOBODY in error.details()
        assert 0.2 < time.monotonic() - began < 3.0


def test_a_router_that_is_restarted_loses_no_accepted_request():
    """The client comes back to the new router, that router to the decode server which still has the request."""
    prompt = prompt_of(100)
    with decode_server(decode_engine(step_s=0.02)) as decode, Relay(NOBODY) as front, ThreadPoolExecutor(1) as pool:
        with router(AlwaysLocal(), decode.address, **QUICK) as first:
            front.set_target(first.address)
            answer = pool.submit(ask, [front.address], request(prompt, 60))
            eventually(lambda: generation_status(decode.address).engine.tokens_decoded > 10, what="some tokens")
            die(front)  # as the client sees it; its end cuts the router's own call as well
        with router(AlwaysLocal(), decode.address, **QUICK) as second:
            front.set_target(second.address)
            found = answer.result(20)
            assert found.tokens == greedy(prompt, 60)
            assert found.returns >= 1 and found.usage is not None and found.usage.attempts == 1
            assert generation_status(decode.address).engine.tokens_prefilled == 100, "it was found, not done again"


def test_whoever_returns_after_the_decode_server_has_forgotten_is_served_again_without_repetition():
    prompt = prompt_of(70)
    with decode_server(decode_engine(step_s=0.01), detach_s=0.1) as decode, router(AlwaysLocal(), decode.address, **QUICK) as front:
        message = request(prompt, 20, request_id="mine")
        message.events_received, message.held_by = 5, decode.address
        assert generate(front.address, message).tokens == greedy(prompt, 20)[5:]


def test_a_client_that_gives_up_ends_its_request_everywhere():
    with (
        prefill_server(prefill_engine(tokens_per_s=500)) as prefill,
        decode_server() as decode,
        router(AlwaysRemote(), decode.address, prefill.address, **QUICK) as front,
    ):

        async def give_up() -> None:
            async with Client([front.address]) as client:
                asking = asyncio.create_task(client.generate(request(prompt_of(2000), 20), 30.0))
                await asyncio.to_thread(eventually, lambda: generation_status(decode.address).streams == 1)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

        asyncio.run(give_up())
        began = time.monotonic()
        eventually(lambda: idle(prefill.address, decode.address), what="nothing left")
        assert time.monotonic() - began < 3.0, "at once, not when nobody came back"


def test_a_prefill_server_that_keeps_failing_is_left_alone_then_tried_with_one_request():
    """Its status is fine, its prompts fail: the breaker opens, requests stay local, and one of them tries it again after a while."""
    sick = prefill_engine()
    with prefill_server(sick) as prefill, decode_server() as decode:
        options = {**QUICK, "breaker_failures": 2, "breaker_open_s": 0.5}
        with router(AlwaysRemote(), decode.address, prefill.address, **options) as front:
            well = sick.submit

            def fail(job, sink):
                raise RuntimeError("sick")

            def placed():
                usage = generate(front.address, request(prompt_of(50), allow_fallback=True)).usage
                return usage.placement, usage.fallbacks

            def breaker():
                (way,) = generation_status(front.address).ways
                return way.region, way.prefill_address, way.breaker

            sick.submit = fail
            assert [placed(), placed()] == [("local", 1)] * 2
            assert placed() == ("local", 0), "left alone"
            assert breaker() == (decode.address, prefill.address, "open")
            time.sleep(0.6)
            assert placed() == ("local", 1), "tried once"
            assert placed() == ("local", 0)
            sick.submit = well
            eventually(lambda: placed() == ("remote", 0), what="it is used again")
            assert breaker() == (decode.address, prefill.address, "closed")


def test_servers_come_and_go_while_the_router_runs():
    clusters = (ClusterServers("far", "prefill", ()), ClusterServers("home", "region", (), (NOBODY,)))
    with (
        prefill_server() as prefill,
        decode_server() as decode,
        of_clusters(AlwaysRemote(), clusters, park_s=0.2) as front,
        channel(front.address) as opened,
    ):
        stub = fleet_pb2_grpc.FleetStub(opened)
        stub.Join(fleet_pb2.JoinRequest(role="decode", address=decode.address, cluster="home"), timeout=5)

        def where():
            usage = generate(front.address, request(prompt_of(60))).usage
            return usage.placement, usage.prefill_cluster, usage.decode_cluster

        eventually(lambda: where() == ("local", "home", "home"))
        for _ in range(2):  # it says so again and again
            stub.Join(fleet_pb2.JoinRequest(role="prefill", address=prefill.address, cluster="far"), timeout=5)
        eventually(lambda: where() == ("remote", "far", "home"))
        stub.Leave(fleet_pb2.LeaveRequest(address=prefill.address), timeout=5)
        assert where() == ("local", "home", "home")
        for wrong, named in (
            (fleet_pb2.JoinRequest(role="prefill", address="h:1", cluster="nowhere"), "cluster='nowhere'"),
            (fleet_pb2.JoinRequest(role="decode", address="h:1", cluster="far"), "role='decode'"),
            (fleet_pb2.JoinRequest(role="prefill", address="h", cluster="far"), "address='h'"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Join(wrong, timeout=5)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and named in refused.value.details()


def test_local_means_the_prefill_server_beside_and_then_the_decode_server_itself():
    with prefill_server() as far, prefill_server() as near, decode_server() as decode:
        clusters = (ClusterServers("far", "prefill", (far.address,)), ClusterServers("home", "region", (near.address,), (decode.address,)))
        with of_clusters(Threshold(100), clusters) as front:
            short, long = (generate(front.address, request(prompt_of(n))).usage for n in (60, 200))
            assert (short.prefill_address, short.prefill_cluster) == (near.address, "home")
            assert (long.prefill_address, long.prefill_cluster) == (far.address, "far")
            assert short.kv_bytes_moved == SPEC.bytes(60) and long.kv_bytes_moved == SPEC.bytes(200)
            near.draining = True
            near._bulletin.changed()
            message = request(prompt_of(60), allow_fallback=True)  # for one that meets it before the router hears of it
            eventually(lambda: generate(front.address, message).usage.placement == "local", what="the last resort")


def test_a_server_that_was_told_of_its_routers_joins_them_and_one_that_is_restarted_too():
    clusters = (ClusterServers("far", "prefill", ()), ClusterServers("home", "region", (), (NOBODY,)))
    with Relay(NOBODY) as front:
        joining = {"join": front.address}
        with prefill_server(cluster="far", **joining) as prefill, decode_server(cluster="home", **joining) as decode:
            for _ in range(2):
                with of_clusters(AlwaysRemote(), clusters) as there:
                    front.set_target(there.address)

                    def known(there=there):
                        return {b.address for b in generation_status(there.address).backends if b.healthy}

                    eventually(lambda known=known: known() == {prefill.address, decode.address}, timeout_s=10)
                    assert generate(there.address, request(prompt_of(60))).usage.prefill_cluster == "far"
                front.set_target(NOBODY)
                front.reset()
            with of_clusters(AlwaysRemote(), clusters) as there:
                front.set_target(there.address)
                with prefill_server(cluster="far", **joining) as other:
                    eventually(lambda: any(b.address == other.address for b in generation_status(there.address).backends), timeout_s=10)
                eventually(lambda: all(b.address != other.address for b in generation_status(there.address).backends), what="it has left")


def test_whoever_joins_says_as_what():
    with pytest.raises(InvalidInput, match="cluster=''"):
        PrefillServerOptions(join="127.0.0.1:1")
    with pytest.raises(InvalidInput, match="join='nowhere'"):
        DecodeServerOptions(join="127.0.0.1:1, nowhere", cluster="home")


def test_a_pd_server_changes_its_role_without_a_restart_and_loses_nothing():
    """Two of them: one prefills, one decodes, and then the other way round, while requests go on."""

    def pd(role):
        engines = prefill_engine(), decode_engine(step_s=0.01)
        server = serving(lambda: PdServer(role, (engines[0], PrefillServerOptions()), (engines[1], DecodeServerOptions())))
        return contextlib.closing(engines[0]), contextlib.closing(engines[1]), server

    with contextlib.ExitStack() as stack:
        one, two = (([stack.enter_context(x) for x in pd(role)])[-1] for role in ("prefill", "decode"))
        home = ClusterServers("home", "region", (one.prefill.address, two.prefill.address), (one.decode.address, two.decode.address))
        front = stack.enter_context(of_clusters(AlwaysLocal(), (home,), park_s=10.0))
        pool = stack.enter_context(ThreadPoolExecutor(6))

        def ask_once(i):
            return generate(front.address, request(prompt_of(100 + i), 30, allow_fallback=True), timeout=30.0)

        first = ask_once(0).usage
        assert (first.prefill_address, first.decode_address) == (one.prefill.address, two.decode.address)
        running = [pool.submit(ask_once, i) for i in range(6)]
        eventually(lambda: generation_status(two.decode.address).streams == 6)
        with channel(two.decode.address) as opened:
            stub = generation_pb2_grpc.GenerationStub(opened)
            stub.Convert(generation_pb2.ConvertRequest(to="prefill"), timeout=5)
            with pytest.raises(grpc.RpcError) as twice:
                stub.Convert(generation_pb2.ConvertRequest(to="prefill"), timeout=5)
            assert twice.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with channel(one.decode.address) as opened:
            generation_pb2_grpc.GenerationStub(opened).Convert(generation_pb2.ConvertRequest(to="decode"), timeout=5)
        assert [job.result(30).tokens for job in running] == [greedy(prompt_of(100 + i), 30) for i in range(6)]
        eventually(lambda: (one.role, two.role) == ("decode", "prefill"))

        def turned():
            usage = ask_once(0).usage
            return (usage.prefill_address, usage.decode_address) == (two.prefill.address, one.decode.address)

        eventually(turned, timeout_s=10.0)


def test_a_full_decode_server_sends_requests_to_another_and_all_full_say_when_to_come_back():
    with (
        decode_server(decode_engine(step_s=0.05), max_requests=1) as one,
        decode_server(decode_engine(step_s=0.05), max_requests=1) as two,
        router(AlwaysLocal(), f"{one.address},{two.address}", **QUICK) as front,
        ThreadPoolExecutor(2) as pool,
    ):
        running = [pool.submit(generate, front.address, request(prompt_of(20 + i), 40)) for i in range(2)]
        eventually(lambda: generation_status(one.address).streams == generation_status(two.address).streams == 1)
        error = error_of(front.address, request(prompt_of(30)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "max_requests=1" in error.details()
        assert retry_after_s(error) >= 0.05
        assert [job.result(20).tokens for job in running] == [greedy(prompt_of(20 + i), 40) for i in range(2)]


def test_a_server_that_is_too_busy_to_report_keeps_what_it_has_and_gets_nothing_new():
    """With thousands of requests its reports came late, and the router took it for frozen and cut them all."""
    with (
        decode_server(decode_engine(step_s=0.05)) as busy,
        decode_server() as other,
        router(AlwaysLocal(), f"{busy.address},{other.address}", report_s=0.1, silence_s=0.3, lost_s=15.0) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(generate, front.address, request(prompt_of(50), 60))
        eventually(lambda: generation_status(busy.address).engine.tokens_decoded > 3)
        said = busy._bulletin._status

        def late():
            time.sleep(1.0)  # its event loop does nothing else meanwhile
            return said()

        busy._bulletin._status = late

        def down():
            return [b.why for b in generation_status(front.address).backends if b.address == busy.address and not b.healthy]

        eventually(lambda: any("silent" in why for why in down()))
        assert generate(front.address, request(prompt_of(5), 2)).usage.decode_address == other.address
        busy._bulletin._status = said
        usage = running.result(30).usage
        assert running.result().tokens == greedy(prompt_of(50), 60) and usage.attempts == 1
        eventually(lambda: not down(), what="it reports again")

"""Requests with an id: whoever comes back finds his own, once; whoever ends one ends it wherever it is."""

import asyncio
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
    greedy,
    prefill_engine,
    prefill_server,
    prefill_status,
    prompt_of,
    request,
    router,
)

from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote
from prfaas_jax.serving.client import Answer, Client
from prfaas_jax.serving.front import is_final
from prfaas_jax.serving.held import CutShort, HeldRequests, RequestCancelled
from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc

NOBODY = "127.0.0.1:9"
QUICK = {"report_s": 0.1, "silence_s": 0.5}


def cancel(address: str, request_id: str) -> None:
    with channel(address) as opened:
        generation_pb2_grpc.GenerationStub(opened).Cancel(generation_pb2.CancelRequest(request_id=request_id), timeout=5)


async def unread(event):
    """A `Write` to nobody."""


def again(prompt, count, held_by="", **fields):
    message = request(prompt, count, request_id="mine", **fields)
    message.held_by = held_by
    return message


def test_to_come_back_is_not_an_attempt():
    """With one attempt, a decode server that has forgotten the request was the last one, and the router fell over."""
    with decode_server() as decode, router(AlwaysLocal(), decode.address, max_attempts=1, **QUICK) as front:
        assert generate(front.address, again(prompt_of(70), 20, decode.address)).tokens == greedy(prompt_of(70), 20)


def test_whoever_returns_is_told_where_his_prompt_is_computed():
    """Also by a router that did not place it."""
    prompt = prompt_of(600)
    with (
        prefill_server(prefill_engine(tokens_per_s=600)) as prefill,
        decode_server() as decode,
        router(AlwaysRemote(), decode.address, prefill.address, **QUICK) as first,
        router(AlwaysRemote(), decode.address, prefill.address, **QUICK) as second,
        channel(first.address) as one,
        channel(second.address) as two,
    ):
        calls = [generation_pb2_grpc.GenerationStub(one).Generate(again(prompt, 4), timeout=20)]
        told = [next(calls[0]).placed]
        eventually(lambda: prefill_status(prefill.address).streams == 1, what="it is prefilled")
        calls[0].cancel()
        calls.append(generation_pb2_grpc.GenerationStub(two).Generate(again(prompt, 4, decode.address), timeout=20))
        events = list(calls[1])
        told.append(events[0].placed)
        assert told[0] == told[1] and told[0].prefill_cluster == prefill.address and told[0].decode_address == decode.address
        assert [e.token.token.id for e in events if e.HasField("token")] == greedy(prompt, 4)


def test_whoever_returns_without_knowing_where_is_given_the_run_that_there_is():
    """His connection broke before he was told: he is placed anew, the run goes on as it was, and its account is no lie."""
    prompt = prompt_of(600)
    with (
        prefill_server(prefill_engine(tokens_per_s=400)) as one,
        prefill_server(prefill_engine(tokens_per_s=400)) as two,
        decode_server() as decode,
        router(AlwaysRemote(), decode.address, f"{one.address},{two.address}", **QUICK) as front,
    ):
        with channel(front.address) as opened:
            call = generation_pb2_grpc.GenerationStub(opened).Generate(again(prompt, 5), timeout=20)
            eventually(lambda: prefill_status(one.address).streams + prefill_status(two.address).streams == 1)
            call.cancel()
        eventually(lambda: generation_status(front.address).streams == 0)
        answer = generate(front.address, again(prompt, 5))
        assert answer.tokens == greedy(prompt, 5)
        assert prefill_status(one.address).engine.tokens_prefilled + prefill_status(two.address).engine.tokens_prefilled == 600


def test_an_id_gives_nobody_elses_answer():
    with decode_server() as decode, router(AlwaysLocal(), decode.address, **QUICK) as front:
        generate(front.address, request(prompt_of(20), 8, request_id="1", tenant="a"))
        for other in (request(prompt_of(33), 8, request_id="1", tenant="a"), request(prompt_of(20), 8, request_id="1", tenant="b")):
            error = error_of(front.address, other)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "request_id" in error.details()


def test_a_request_is_cancelled_while_it_waits_for_a_server():
    with router(AlwaysLocal(), NOBODY, park_s=10.0, **QUICK) as front, ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        waiting = pool.submit(error_of, front.address, again(prompt_of(5), 4))
        eventually(lambda: generation_status(front.address).streams == 1)
        cancel(front.address, "mine")
        assert waiting.result(10).code() is grpc.StatusCode.CANCELLED and time.monotonic() - began < 8.0


def test_a_request_that_is_cancelled_twice_says_so_and_the_next_one_of_its_id_is_served():
    """Calls end in their own task: what is left of a cancel must not reach what the server does next."""
    with (
        decode_server(decode_engine(step_s=0.05)) as decode,
        router(AlwaysLocal(), decode.address, **QUICK) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        for _ in range(3):
            waiting = pool.submit(error_of, front.address, again(prompt_of(70), 100))
            eventually(lambda: generation_status(decode.address).streams == 1, what="it is generated")
            for _ in range(2):
                cancel(front.address, "mine")
            assert waiting.result(10).code() is grpc.StatusCode.CANCELLED
        assert generate(front.address, again(prompt_of(70), 5)).tokens == greedy(prompt_of(70), 5)


def test_a_cancel_reaches_the_request_although_an_older_call_for_it_has_ended():
    prompt = prompt_of(20)
    with (
        decode_server(decode_engine(step_s=0.05)) as decode,
        router(AlwaysLocal(), decode.address, **QUICK) as front,
        ThreadPoolExecutor(2) as pool,
    ):
        old = pool.submit(error_of, front.address, again(prompt, 100))
        eventually(lambda: generation_status(decode.address).streams == 1)
        new = pool.submit(error_of, front.address, again(prompt, 100, decode.address))
        assert old.result(10).code() is grpc.StatusCode.ABORTED
        cancel(front.address, "mine")
        assert new.result(10).code() is grpc.StatusCode.CANCELLED
        eventually(lambda: generation_status(decode.address).engine.running == 0)


def test_a_request_that_somebody_else_cancels_does_not_start_again():
    """CANCELLED was taken for a server that ends: client and router started it anew, and it was answered whole."""

    async def run(addresses, cancels):
        answer = Answer()
        async with Client(addresses) as client:
            with pytest.raises(grpc.RpcError) as caught:
                async for _ in client.stream(again(prompt_of(70), 200), 20.0, answer):
                    if answer.events == 5:
                        await asyncio.to_thread(cancel, cancels, "mine")
        return caught.value, answer

    with (
        decode_server(decode_engine(step_s=0.02)) as decode,
        router(AlwaysLocal(), decode.address, **QUICK) as first,
        router(AlwaysLocal(), decode.address, **QUICK) as second,
    ):
        for cancels in (first.address, second.address, decode.address):
            error, answer = asyncio.run(run([first.address], cancels))
            assert error.code() is grpc.StatusCode.CANCELLED and is_final(error)
            assert answer.returns == 0 and [p.attempt for p in answer.placed] == [1] and 5 <= answer.events < 100
            eventually(lambda: generation_status(decode.address).engine.running == 0)


def test_whoever_comes_back_to_a_request_that_was_cancelled_meanwhile_is_told_so():
    with (
        decode_server(decode_engine(step_s=0.05)) as decode,
        router(AlwaysLocal(), decode.address, **QUICK) as front,
        channel(front.address) as opened,
    ):
        call = generation_pb2_grpc.GenerationStub(opened).Generate(again(prompt_of(70), 100), timeout=20)
        next(call), next(call)
        call.cancel()
        eventually(lambda: generation_status(front.address).streams == 0)
        cancel(front.address, "mine")
        error = error_of(front.address, again(prompt_of(70), 100, decode.address))
        assert error.code() is grpc.StatusCode.CANCELLED and is_final(error)
        assert generate(front.address, again(prompt_of(70), 3)).tokens == greedy(prompt_of(70), 3), "his id is free again"


@pytest.mark.parametrize("returns", [{"events_received": 3}, {"placement": generation_pb2.Placement(again=True)}])
def test_a_cancelled_request_does_not_start_again_where_it_has_never_been(returns):
    """Its decode server is lost as well, and its router looks for another one."""

    async def run():
        held = HeldRequests(5.0)

        async def never(*_):
            raise AssertionError("it runs")

        held.cancel("x")
        with pytest.raises(RequestCancelled):
            await held.attend(generation_pb2.GenerateRequest(request_id="x", **returns), never, never)
        assert not len(held)

    asyncio.run(run())


def test_a_server_that_ends_cancels_nothing_by_its_id():
    async def run():
        held, message = HeldRequests(5.0), generation_pb2.GenerateRequest(request_id="x")

        async def work(emit):
            await asyncio.sleep(60)

        first = asyncio.create_task(held.attend(message, unread, work))
        await asyncio.sleep(0.05)
        await held.close()
        with pytest.raises(CutShort):
            await first

    asyncio.run(run())


def test_a_server_that_stands_by_still_has_its_requests():
    """Whoever came back was served by the other one, from his prompt."""
    prompt = prompt_of(70)
    with (
        decode_server(decode_engine(step_s=0.05)) as one,
        decode_server(decode_engine(step_s=0.05)) as two,
        router(AlwaysLocal(), f"{one.address},{two.address}", **QUICK) as front,
        channel(front.address) as opened,
    ):
        call = generation_pb2_grpc.GenerationStub(opened).Generate(again(prompt, 40), timeout=20)
        placed, _ = next(call).placed, next(call)
        call.cancel()
        server = one if placed.decode_address == one.address else two
        server.stand_by(True)
        eventually(lambda: any(not b.healthy for b in generation_status(front.address).backends), what="it is seen")
        answer = generate(front.address, again(prompt, 40, placed.decode_address))
        assert answer.tokens == greedy(prompt, 40) and answer.usage.decode_address == server.address and answer.usage.attempts == 1


def test_a_cancelled_request_leaves_no_timer_for_the_next_one_of_its_id():
    async def run():
        held, message = HeldRequests(0.2), generation_pb2.GenerateRequest(request_id="x")

        async def work(emit):
            await asyncio.sleep(0.8)
            return generation_pb2.Usage(output_tokens=1)

        first = asyncio.create_task(held.attend(message, unread, work))
        await asyncio.sleep(0.05)
        held.cancel("x")
        with pytest.raises(RequestCancelled):
            await first
        assert (await held.attend(message, unread, work)).output_tokens == 1
        await held.close()

    asyncio.run(run())


def test_text_behind_the_last_token_is_not_said_twice():
    async def run():
        held, said = HeldRequests(5.0), []
        message = generation_pb2.GenerateRequest(request_id="x")

        async def write(event):
            said.append(event.token.text)

        async def work(emit):
            token = generation_pb2.TokenOut(text="ab")
            token.token.id = 1
            await emit(generation_pb2.GenerateEvent(token=token))
            await emit(generation_pb2.GenerateEvent(token=generation_pb2.TokenOut(text="tail")))
            return generation_pb2.Usage()

        await held.attend(message, write, work)
        message.events_received = len(said)
        await held.attend(message, write, work)
        await held.close()
        return "".join(said)

    assert asyncio.run(run()) == "abtail"


def test_a_request_that_is_fetched_three_times_counts_once():
    with decode_server() as decode:
        for _ in range(3):
            generate(decode.address, request(prompt_of(9), 3, request_id="a"))
        assert dict(generation_status(decode.address).served) == {"local": 1}

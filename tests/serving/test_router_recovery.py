"""What a fault drill found in the router: it comes back to requests, or they to it, when it had lost sight of their servers."""

import time
from concurrent.futures import ThreadPoolExecutor

from serving_fixtures import (
    decode_engine,
    decode_server,
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
from prfaas_jax.testing.relay import Relay

NOBODY = "127.0.0.1:9"
QUICK = {"report_s": 0.1, "silence_s": 0.5, "lost_s": 0.6}


def test_whoever_returns_to_a_decode_server_that_is_gone_is_served_by_another_one():
    prompt = prompt_of(70)
    with decode_server() as decode, router(AlwaysLocal(), f"{NOBODY},{decode.address}", **QUICK) as front:
        message = request(prompt, 20, request_id="mine")
        message.events_received, message.held_by = 5, NOBODY
        assert generate(front.address, message).tokens == greedy(prompt, 20)[5:]


def test_a_request_found_again_where_it_was_keeps_the_prefill_server_that_it_had():
    """Its decode server was out of sight for a moment and went on with it; the second placement, elsewhere, changes nothing."""
    prompt = prompt_of(600)
    with (
        prefill_server(prefill_engine(tokens_per_s=300)) as first,
        prefill_server() as second,
        decode_server() as decode,
        Relay(decode.address) as link,
        router(AlwaysRemote(), link.address, f"{first.address},{second.address}", park_s=10.0, **QUICK) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(generate, front.address, request(prompt, 20, request_id="mine"))
        eventually(lambda: prefill_status(first.address).streams == 1, what="it is prefilled")
        link.black_hole(1.0)
        assert answer.result(20).tokens == greedy(prompt, 20)
        usage = answer.result().usage
        assert (usage.attempts, usage.prefill_address, usage.fallbacks, usage.resumes) == (2, first.address, 0, 0)
        assert prefill_status(second.address).engine.tokens_prefilled == 0


class Freezes(AlwaysLocal):
    """Holds up the whole router while it decides about prompts of one token."""

    def place(self, asked, view, now):
        if asked.tokens == 1:
            time.sleep(1.0)
        return super().place(asked, view, now)


def test_a_router_that_was_frozen_itself_does_not_take_its_servers_for_frozen():
    prompt = prompt_of(50)
    with (
        decode_server(decode_engine(step_s=0.02)) as decode,
        router(Freezes(), decode.address, **QUICK) as front,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(generate, front.address, request(prompt, 100))
        eventually(lambda: generation_status(decode.address).engine.tokens_decoded > 5, what="some tokens")
        assert generate(front.address, request(prompt_of(1), 2)).usage.attempts == 1
        assert answer.result(20).tokens == greedy(prompt, 100)
        assert answer.result().usage.attempts == 1
        eventually(lambda: generation_status(front.address).backends[0].healthy, what="it is healthy")


def test_nor_does_it_when_it_was_only_come_back_to():
    """The router that placed it is gone; the one that its client came back to loses sight of it, and places it elsewhere."""
    prompt = prompt_of(600)
    with (
        prefill_server(prefill_engine(tokens_per_s=300)) as first,
        prefill_server() as second,
        decode_server() as decode,
        Relay(decode.address) as link,
        ThreadPoolExecutor(1) as pool,
    ):
        options = {"park_s": 10.0, **QUICK}
        with router(AlwaysRemote(), link.address, first.address, **options) as former:
            pool.submit(generate, former.address, request(prompt, 20, request_id="mine")).add_done_callback(lambda end: end.exception())
            eventually(lambda: prefill_status(first.address).streams == 1, what="it is prefilled")
        with router(AlwaysRemote(), link.address, f"{first.address},{second.address}", **options) as front:
            message = request(prompt, 20, request_id="mine")
            message.held_by = link.address
            answer = pool.submit(generate, front.address, message)
            eventually(lambda: generation_status(front.address).streams == 1, what="its client is back")
            link.black_hole(1.0)
            assert answer.result(20).tokens == greedy(prompt, 20)
            assert (answer.result().usage.attempts, answer.result().usage.prefill_address) == (2, first.address)

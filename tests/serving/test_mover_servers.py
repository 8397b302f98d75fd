"""Servers whose KV leaves and arrives through processes of their own."""

import contextlib
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from serving_fixtures import (
    SPEC,
    decode_server,
    error_of,
    eventually,
    generate,
    generation_status,
    greedy,
    idle,
    prefill_engine,
    prefill_server,
    prompt_of,
    request,
)

from prfaas_jax.errors import InvalidInput, TransferError
from prfaas_jax.serving.decode_server import DecodeServerOptions
from prfaas_jax.serving.prefill_server import PrefillServerOptions
from prfaas_jax.testing.relay import Relay

LENGTH = 3000
TOTAL = SPEC.bytes(LENGTH)


def neighbours() -> tuple[Relay, Relay]:
    """Two relays on consecutive ports."""
    for _ in range(100):
        first = Relay("127.0.0.1:9")
        host, port = first.address.rsplit(":", 1)
        with contextlib.suppress(InvalidInput, OSError):
            return first, Relay("127.0.0.1:9", f"{host}:{int(port) + 1}")
        first.close()
    raise AssertionError("no two free ports beside each other")


def test_many_requests_over_processes_on_both_sides():
    rng = random.Random(0)
    with prefill_server(sender_processes=2) as prefill, decode_server(receiver_processes=2, codec="none") as decode:
        prompts = [prompt_of(rng.randint(1, LENGTH)) for _ in range(40)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda p: generate(decode.address, request(p, 5, prefill=prefill.address)), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.tokens == greedy(prompt, 5)
            usage = answer.usage
            assert (usage.placement, usage.fallbacks, usage.tokens_recomputed) == ("remote", 0, 0)
            assert usage.kv_bytes_moved == usage.kv_bytes_expected == SPEC.bytes(len(prompt))
        links = generation_status(decode.address).links
        assert [link.prefill_address for link in links] == [prefill.address], "one link, however many processes share it"
        eventually(lambda: idle(prefill.address, decode.address), what="nothing left")


@pytest.mark.parametrize("whose", ["sender", "receiver"])
def test_another_server_goes_on_when_a_process_is_killed(whose):
    """A process is no server: what it had in hand fails over at once, and the next request finds another in its place."""
    prompt = prompt_of(LENGTH)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(prefill_server(prefill_engine(tokens_per_s=3000), sender_processes=1))
        other = stack.enter_context(prefill_server())
        decode = stack.enter_context(decode_server(receiver_processes=1))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        message = request(prompt, 6, prefill=first.address)
        message.placement.alternatives.append(other.address)
        answer = pool.submit(generate, decode.address, message)
        groups = decode._peers._groups
        eventually(lambda: any(group.estimate().goodput_bytes_per_s > 0 for group in list(groups.values())), what="bytes come")
        processes = (lambda: first._lanes.pids) if whose == "sender" else (lambda: decode._peers._receivers.pids)
        (killed,) = processes()
        os.kill(killed, signal.SIGKILL)
        usage = answer.result(20).usage
        assert answer.result().tokens == greedy(prompt, 6)
        assert (usage.prefill_address, usage.fallbacks, usage.resumes) == (other.address, 0, 1)
        assert usage.kv_bytes_moved == TOTAL
        eventually(lambda: len(processes()) == 1 and killed not in processes(), 20, "another process")
        again = generate(decode.address, request(prompt, 6, prefill=first.address))
        assert (again.tokens, again.usage.placement) == (greedy(prompt, 6), "remote")
        eventually(lambda: idle(first.address, decode.address), what="nothing left")


def test_each_process_is_advertised_and_used():
    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(relay) for relay in neighbours()]
        prefill = stack.enter_context(prefill_server(sender_processes=2, advertise_lane=relays[0].address))
        for relay, lane in zip(relays, prefill.lane_addresses, strict=True):
            relay.set_target(lane)
        decode = stack.enter_context(decode_server())
        answer = generate(decode.address, request(prompt_of(LENGTH), 6, prefill=prefill.address))
        assert answer.usage.kv_bytes_moved == TOTAL
        for relay in relays:
            assert relay.passed() > TOTAL / 4, "shares are even"


def test_a_lane_port_in_use_is_named():
    with prefill_server() as taken:
        address = taken.lane_addresses[0]
        with pytest.raises(TransferError, match=f"sender process 0 did not start.*lane_address.*{address}"):
            prefill_server(sender_processes=1, lane_address=address).__enter__()


@pytest.mark.parametrize("count", [-1, 65])
def test_bad_numbers_of_processes_are_refused(count):
    with pytest.raises(InvalidInput, match="sender_processes"):
        PrefillServerOptions(sender_processes=count)
    with pytest.raises(InvalidInput, match="receiver_processes"):
        DecodeServerOptions(receiver_processes=count)


def test_a_prefill_server_is_refused_plainly_while_no_process_is_up():
    with prefill_server(sender_processes=1) as prefill, decode_server() as decode:
        os.kill(prefill._lanes.pids[0], signal.SIGKILL)
        eventually(lambda: not prefill._lanes.pids)
        error = error_of(decode.address, request(prompt_of(100), 4, prefill=prefill.address))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no sender process is up" in error.details()

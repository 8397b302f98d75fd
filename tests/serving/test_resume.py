"""A remote prefill whose link is cut, whose server dies, or of which the decode side holds a part: what is there is never sent again."""

import contextlib

import grpc
import pytest
from serving_fixtures import (
    SPEC,
    decode_engine,
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

from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.testing.fake_decode import FakeDecodeEngine
from prfaas_jax.testing.relay import Relay

LENGTH = 3000  # 576 KiB
TOTAL = SPEC.bytes(LENGTH)


@contextlib.contextmanager
def through_relays(gbps=None, engine=None, decode_options=None, **options):
    """A prefill server whose control plane and lane lie behind a relay each, and a decode server."""
    with contextlib.ExitStack() as stack:
        lane = stack.enter_context(Relay("127.0.0.1:9", gbps=gbps))
        server = stack.enter_context(prefill_server(engine, advertise_lane=lane.address, **options))
        lane.set_target(server.lane_addresses[0])
        control = stack.enter_context(Relay(server.address))
        decode = stack.enter_context(decode_server(**decode_options or {}))
        yield server, decode, lane, control


def in_background(target):
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1)
    return pool.submit(target)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("what", ["lane", "control", "both"])
def test_a_cut_link_is_resumed_with_the_same_tokens(what, share):
    """Lanes and control stream come back to the ticket; nothing is computed twice, and at most a window is sent twice."""
    prompt = prompt_of(LENGTH)
    with through_relays(gbps=0.01, engine=prefill_engine(tokens_per_s=8000)) as (server, decode, lane, control):
        answer = in_background(lambda: generate(decode.address, request(prompt, 6, prefill=control.address)))
        eventually(lambda: lane.passed() > share * TOTAL, what=f"{share} of the bytes")
        if what != "control":
            lane.reset()
        if what != "lane":
            control.reset()
        usage = answer.result(20).usage
        assert answer.result().tokens == greedy(prompt, 6)
        assert (usage.placement, usage.fallbacks, usage.resumes, usage.tokens_recomputed) == ("remote", 0, 0, 0)
        assert usage.kv_bytes_moved == TOTAL
        assert usage.kv_bytes_resent <= 1 << 20
        eventually(lambda: idle(server.address, decode.address), what="nothing left")


def test_another_server_goes_on_when_one_dies():
    """The same prompt on another host: blocks that came from the first stay, and only the rest is sent."""
    prompt = prompt_of(LENGTH)
    first = through_relays(gbps=0.01, engine=prefill_engine(tokens_per_s=8000), lease_s=2.0)
    with first as (server, decode, lane, control), prefill_server() as other:
        message = request(prompt, 6, prefill=control.address)
        message.placement.alternatives.append(other.address)
        answer = in_background(lambda: generate(decode.address, message))
        eventually(lambda: lane.passed() > TOTAL / 2, what="half of the bytes")
        for relay in (lane, control):
            relay.set_target("127.0.0.1:9")
            relay.reset()
        usage = answer.result(20).usage
        assert answer.result().tokens == greedy(prompt, 6)
        assert (usage.placement, usage.prefill_address, usage.fallbacks, usage.resumes) == ("remote", other.address, 0, 1)
        assert 0 < usage.tokens_recomputed <= LENGTH
        assert usage.kv_bytes_moved == TOTAL
        # What is in whole blocks here is not sent again: beyond the cache once, only what was in the middle of a block.
        assert usage.kv_bytes_wire < 1.25 * TOTAL
        eventually(lambda: idle(server.address, decode.address), what="nothing left")


def test_a_server_that_dies_without_another_is_an_error_at_once():
    prompt = prompt_of(LENGTH)
    with through_relays(gbps=0.01) as (_, decode, lane, control):
        answer = in_background(lambda: error_of(decode.address, request(prompt, 6, prefill=control.address)))
        eventually(lambda: lane.passed() > TOTAL / 4, what="a quarter of the bytes")
        for relay in (lane, control):
            relay.set_target("127.0.0.1:9")
            relay.reset()
        assert answer.result(5).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("held", [1, 64, 100, LENGTH - 1])
def test_what_decode_holds_is_never_sent(held):
    """Bug class H too: skipped bytes are said to be skipped, and a state leaves whatever was held."""
    prompt = prompt_of(LENGTH)
    with prefill_server() as server, decode_server(decode_engine(held_tokens=held)) as decode:
        answer = generate(decode.address, request(prompt, 6, prefill=server.address))
    usage = answer.usage
    assert answer.tokens == greedy(prompt, 6)
    assert usage.kv_bytes_moved == usage.kv_bytes_wire == SPEC.bytes(LENGTH, held) < TOTAL
    assert usage.kv_bytes_moved + usage.kv_bytes_skipped == usage.kv_bytes_expected == TOTAL


def test_a_full_prefix_hit_moves_nothing_and_ends():
    """Bug class C: a zero-length transfer."""
    prompt = prompt_of(200)
    with prefill_server() as server, decode_server(decode_engine(held_tokens=200)) as decode:
        usage = generate(decode.address, request(prompt, 3, prefill=server.address)).usage
    assert (usage.kv_bytes_moved, usage.kv_bytes_wire, usage.kv_bytes_skipped) == (0, 0, SPEC.bytes(200))


@pytest.mark.parametrize("codec", ["paged=int8", "paged=fp8,window=int8,state=bf16", "state=bf16"])
def test_codecs_travel_in_fewer_bytes_and_count_the_canonical_ones(codec):
    prompt = prompt_of(500)
    with prefill_server() as server, decode_server(codec=codec) as decode:
        answer = generate(decode.address, request(prompt, 4, prefill=server.address))
    usage = answer.usage
    assert answer.tokens == greedy(prompt, 4)
    assert usage.codec == codec
    assert usage.kv_bytes_moved == SPEC.bytes(500)
    assert usage.kv_bytes_wire == CacheCodec.parse(codec).wire_spec(SPEC).bytes(500) < SPEC.bytes(500)


def test_compression_is_lossless():
    prompt = prompt_of(500)
    with prefill_server() as server, decode_server(codec="zstd") as decode:
        answer = generate(decode.address, request(prompt, 4, prefill=server.address))
    assert answer.tokens == greedy(prompt, 4)
    assert (answer.usage.codec, answer.usage.kv_bytes_moved) == ("zstd", SPEC.bytes(500))
    assert 0 < answer.usage.kv_bytes_wire <= SPEC.bytes(500)


class NoPrograms(FakeDecodeEngine):
    """An engine that has programs for no codec."""

    def start(self):
        self.codecs = ()
        super().start()


def test_a_codec_that_a_side_does_not_have_is_refused_by_name():
    prompt = prompt_of(100)
    with prefill_server() as server, decode_server(decode_engine(NoPrograms), codec="paged=int8") as decode:
        error = error_of(decode.address, request(prompt, 4, prefill=server.address))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "codec" in error.details()
    engine = prefill_engine()
    engine.codecs = ()
    with prefill_server(engine) as server, decode_server(codec="paged=int8") as decode:
        error = error_of(decode.address, request(prompt, 4, prefill=server.address))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "codecs" in error.details()


def test_auto_compresses_nothing_on_a_fast_link_and_never_loses_bits_unless_allowed():
    prompt = prompt_of(500)
    with prefill_server() as server, decode_server(codec="auto") as decode:
        usages = [generate(decode.address, request(prompt, 4, prefill=server.address)).usage for _ in range(3)]
    assert {usage.codec for usage in usages} <= {"none", "zstd"}
    assert usages[0].codec == "none", "nothing was known of the link"


def test_the_link_is_measured_and_reported():
    prompt = prompt_of(4000)
    with through_relays(gbps=0.02) as (_, decode, _lane, control):
        usage = generate(decode.address, request(prompt, 4, prefill=control.address)).usage
        (link,) = generation_status(decode.address).links
    assert link.prefill_address == usage.link.prefill_address == control.address
    assert usage.link.bytes_per_s * 8 == pytest.approx(0.02e9, rel=0.25)
    assert 0 < usage.link.rtt_s < 1
    # The link is all that takes time: what it takes is exposed, but for what the prompt took to compute.
    parts, alone_s = usage.parts, SPEC.bytes(4000) / usage.link.bytes_per_s
    assert 0.9 * alone_s - parts.prefill - parts.queue < usage.exposed_bound_s < 1.01 * alone_s
    assert usage.exposed_bound_s * 0.9 < parts.exposed_transfer < usage.exposed_bound_s * 1.5 + 0.2


def test_a_link_that_slows_down_tenfold_is_waited_for_while_there_is_time():
    prompt = prompt_of(LENGTH)
    with through_relays(gbps=0.01) as (server, decode, lane, control):
        answer = in_background(lambda: generate(decode.address, request(prompt, 6, prefill=control.address, allow_fallback=True)))
        eventually(lambda: lane.passed() > TOTAL / 2, what="half of the bytes")
        lane.set_link(0.001)
        usage = answer.result(20).usage
        assert answer.result().tokens == greedy(prompt, 6)
        assert (usage.placement, usage.fallbacks, usage.kv_bytes_moved) == ("remote", 0, TOTAL)
        assert usage.link.bytes_per_s < 3 * 0.001e9 / 8, "and the link is known to be slow"
        eventually(lambda: idle(server.address, decode.address), what="nothing left")


def test_a_link_that_slows_down_too_much_is_given_up_before_the_deadline():
    """By predicted finish: the answer comes from a local prefill, in time, and not as a deadline that has passed."""
    prompt = prompt_of(LENGTH)
    with through_relays(gbps=0.01) as (server, decode, lane, control):
        message = request(prompt, 6, prefill=control.address, allow_fallback=True)
        answer = in_background(lambda: generate(decode.address, message, timeout=6.0))
        eventually(lambda: lane.passed() > TOTAL / 4, what="a quarter of the bytes")
        lane.set_link(0.0002)
        usage = answer.result(20).usage
        assert answer.result().tokens == greedy(prompt, 6)
        assert (usage.placement, usage.fallbacks) == ("local", 1)
        assert "predicted to take" in usage.fallback_reason
        assert usage.ttft_s < 5.0
        eventually(lambda: idle(server.address, decode.address), what="nothing left")

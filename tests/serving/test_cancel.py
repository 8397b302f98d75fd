"""Cancellation and deadlines in every phase reach both sides and leave nothing behind."""

import threading
import time

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
    idle,
    prefill_engine,
    prefill_server,
    prefill_status,
    prompt_of,
    request,
    resources,
    router,
)

from prfaas_jax.scheduling.policies import AlwaysRemote
from prfaas_jax.serving.proto import generation_pb2_grpc

PROMPT = prompt_of(300)
# The first chunk comes at once, the second never within a test.
STALLS_AFTER_ONE_CHUNK = {"seconds": lambda tokens: 0.0 if tokens <= 64 else 60.0}
PHASES = {
    # phase: (prefill engine, decode engine, request is remote, reached when; work counted since the request was sent)
    "queue": ({}, {"pages": 20, "step_s": 0.05}, True, lambda p, d: d.waiting == 1),
    "prefill": ({"tokens_per_s": 1.0}, {}, True, lambda p, d: p.running == 1),
    "transfer": (STALLS_AFTER_ONE_CHUNK, {}, True, lambda p, d: p.tokens_prefilled == 64),
    "local prefill": ({}, {"prefill_s_per_token": 0.01}, False, lambda p, d: d.tokens_prefilled > 0),
    "decode": ({}, {"step_s": 0.02}, True, lambda p, d: d.tokens_decoded > 2),
}


class Scene:
    """A pair of servers and one request of 300 tokens that comes to a phase."""

    def __init__(self, phase, prefill, decode):
        _, _, remote, self._reached = PHASES[phase]
        self._prefill, self._decode = prefill.address, decode.address
        self.message = request(PROMPT, 1000 if phase == "decode" else 4, prefill.address if remote else "")

    def _engines(self):
        return prefill_status(self._prefill).engine, generation_status(self._decode).engine

    def cancel_in_phase(self, stub):
        before = self._engines()

        def reached():
            engines = self._engines()
            for engine, then in zip(engines, before, strict=True):
                engine.tokens_prefilled -= then.tokens_prefilled
                engine.tokens_decoded -= then.tokens_decoded
            return self._reached(*engines)

        call = stub.Generate(self.message, timeout=60)
        eventually(reached, what="the phase")
        call.cancel()


@pytest.mark.parametrize("phase", PHASES)
def test_cancel_leaves_nothing_behind(phase):
    prefill_options, decode_options, _, _ = PHASES[phase]
    with prefill_server(prefill_engine(**prefill_options)) as prefill, decode_server(decode_engine(**decode_options)) as decode:
        scene = Scene(phase, prefill, decode)
        with channel(decode.address) as open_channel:
            stub = generation_pb2_grpc.GenerationStub(open_channel)
            if phase == "queue":
                # 20 pages of 16 tokens: one such request holds them all.
                blocker = stub.Generate(request(prompt_of(10), 305), timeout=60)
                next(blocker)

            def cancel_one() -> None:
                scene.cancel_in_phase(stub)
                if phase == "queue":
                    eventually(lambda: generation_status(decode.address).engine.waiting == 0)
                else:
                    eventually(lambda: idle(prefill.address, decode.address), 3)

            cancel_one()  # channels, pools and executors come up
            before = resources()
            for _ in range(3):
                cancel_one()
            # Never more than before; a thread that was on its way out is waited for.
            eventually(lambda: all(now <= then for now, then in zip(resources(), before, strict=True)), what=f"{resources()} <= {before}")
            if phase == "queue":
                blocker.cancel()
                eventually(lambda: idle(prefill.address, decode.address))
            assert generation_status(decode.address).failed["CANCELLED"] >= 4
        # And the servers go on as if nothing had been.
        if phase in ("queue", "decode"):
            assert generate(decode.address, request(PROMPT, 4, prefill.address)).tokens == greedy(PROMPT, 4)


@pytest.mark.parametrize(
    ("phase", "named"), [("prefill", "remote prefill"), ("transfer", "remote prefill"), ("local prefill", "local prefill")]
)
def test_a_deadline_names_its_phase_and_leaves_nothing_behind(phase, named):
    prefill_options, decode_options, _, _ = PHASES[phase]
    with (
        prefill_server(prefill_engine(**prefill_options)) as prefill,
        decode_server(decode_engine(**decode_options), deadline_margin_s=0.25) as decode,
    ):
        scene = Scene(phase, prefill, decode)
        scene.message.allow_fallback = True  # a deadline is no reason to begin again
        begun = time.monotonic()
        error = error_of(decode.address, scene.message, timeout=2.5)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begun < 3.1
        assert named in error.details()
        eventually(lambda: idle(prefill.address, decode.address), 3)
        assert generation_status(decode.address).fallbacks == 0


def test_cancel_at_the_router_reaches_the_prefill_server():
    engine = prefill_engine(tokens_per_s=1.0)
    with (
        prefill_server(engine) as prefill,
        decode_server() as decode,
        router(AlwaysRemote(), decode.address, prefill.address) as front,
        channel(front.address) as open_channel,
    ):
        call = generation_pb2_grpc.GenerationStub(open_channel).Generate(request(PROMPT), timeout=60)
        eventually(lambda: prefill_status(prefill.address).tickets == 1)
        call.cancel()
        eventually(lambda: idle(prefill.address, decode.address), 3)
        assert generation_status(front.address).streams == 0
        assert error_of(front.address, request(PROMPT), timeout=0.5).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: idle(prefill.address, decode.address), 3)


def test_many_at_once_with_cancels_in_between():
    with (
        prefill_server(prefill_engine(tokens_per_s=20_000)) as prefill,
        decode_server(decode_engine(pages=64)) as decode,
        channel(decode.address) as open_channel,
    ):
        stub = generation_pb2_grpc.GenerationStub(open_channel)

        def one(i: int) -> None:
            prompt = prompt_of(1 + 37 * i % 300)
            call = stub.Generate(request(prompt, 5, prefill.address if i % 3 else ""), timeout=30)
            if i % 4 == 0:
                time.sleep(0.003 * i)
                call.cancel()
                return
            tokens = [event.token.token.id for event in call if event.HasField("token")]
            outcomes.append(tokens == greedy(prompt, 5))

        outcomes: list[bool] = []
        threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert outcomes == [True] * 18
        eventually(lambda: idle(prefill.address, decode.address))


def test_a_client_that_does_not_read_is_cut_and_others_go_on():
    """16 MB of logits, unread: flow control holds the stream, the queue is bounded, the engine never waits."""
    with decode_server(max_unread_bytes=1 << 20) as decode, channel(decode.address) as open_channel:
        stub = generation_pb2_grpc.GenerationStub(open_channel)
        lazy = stub.Generate(request(prompt_of(10), 4000, want_logits=True), timeout=60)
        next(lazy)
        assert generate(decode.address, request(PROMPT, 4)).tokens == greedy(PROMPT, 4)
        eventually(lambda: generation_status(decode.address).engine.running == 0, 20)
        with pytest.raises(grpc.RpcError) as error:
            list(lazy)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "reads too slowly" in error.value.details()
        eventually(lambda: idle(None, decode.address))

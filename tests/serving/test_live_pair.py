"""Real engines behind real servers: a random load leaves nothing behind, and its tokens are those of a colocated engine."""

import collections
import concurrent.futures
import contextlib
import random
import time

import grpc
import pytest
from serving_fixtures import CHANNEL_OPTIONS, eventually, idle, read, request, resources, serving

from configs.models import load_model_config
from prfaas_jax.engine.api import SamplingParams
from prfaas_jax.engine.build import build_decode, build_prefill
from prfaas_jax.engine.offline import complete
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.proto import generation_pb2_grpc

VOCAB = 512
REQUESTS = 200
LONGEST = 1500


# States, rings and pages; compiling them takes a minute.
HYBRIDS = [pytest.param(model, marks=pytest.mark.slow) for model in ("kimi_linear_toy", "mimo_toy")]


@pytest.fixture(scope="module", params=["qwen3_toy", *HYBRIDS])
def engines(request):
    checkpoint = f"random:{request.param}"
    shape = {"chunk": 256, "max_length": 2048, "max_rows": 8, "max_queue": REQUESTS}
    prefill, _ = build_prefill(EngineOptions(checkpoint, page_size=64, **shape), load_model_config)
    decode, _ = build_decode(EngineOptions(checkpoint, page_size=16, **shape), load_model_config)
    with contextlib.closing(prefill), contextlib.closing(decode):
        yield prefill, decode


@pytest.fixture
def live_pair(engines):
    prefill_engine, decode_engine = engines
    staging = DecodeServerOptions(idle_s=20)
    with (
        serving(lambda: PrefillServer(prefill_engine, PrefillServerOptions())) as prefill,
        serving(lambda: DecodeServer(decode_engine, None, staging, ())) as decode,
    ):
        yield prefill.address, decode.address


@pytest.mark.smoke
def test_remote_prefill_gives_the_tokens_of_a_colocated_engine(live_pair, engines):
    prefill, decode = live_pair
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 16, 255, 256, 257, 700)]
    expected = complete(engines[1], prompts, SamplingParams(max_new_tokens=5))
    with grpc.insecure_channel(decode, CHANNEL_OPTIONS) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        answers = [read(stub.Generate(request(p, 5, prefill), timeout=60)) for p in prompts]
    assert [a.tokens for a in answers] == [c.tokens for c in expected]
    for answer in answers:
        assert answer.usage.placement == "remote" and answer.usage.tokens_recomputed == 0
        assert answer.usage.kv_bytes_moved == answer.usage.kv_bytes_expected == engines[1].spec.bytes(answer.usage.prompt_tokens)


def _one(stub, prefill: str, number: int) -> str:
    """One random request; returns how it ended."""
    rng = random.Random(number)
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, LONGEST))]
    new = rng.randint(1, 24)
    message = request(prompt, new, prefill if rng.random() < 0.8 else "")
    message.sampling.temperature = rng.choice([0.0, 1.0])
    message.sampling.seed = number
    fate = rng.choice(["finish", "finish", "stop", "cancel", "deadline"])
    if fate == "stop":
        message.sampling.stop_token_ids.extend(rng.sample(range(VOCAB), 100))
    call = stub.Generate(message, timeout=rng.uniform(0.01, 1.0) if fate == "deadline" else 240)
    if fate == "cancel":
        time.sleep(rng.uniform(0, 0.5))
        call.cancel()
    try:
        answer = read(call)
    except grpc.RpcError as error:
        assert (fate, error.code()) in (("cancel", grpc.StatusCode.CANCELLED), ("deadline", grpc.StatusCode.DEADLINE_EXCEEDED)), error
        return fate
    assert len(answer.tokens) == answer.usage.output_tokens
    assert answer.usage.finish_reason == "stop" or len(answer.tokens) == new
    assert answer.usage.kv_bytes_moved == answer.usage.kv_bytes_expected and answer.usage.tokens_recomputed == 0
    return answer.usage.finish_reason


def test_two_hundred_random_requests_leave_nothing_behind(live_pair, engines):
    prefill, decode = live_pair
    with grpc.insecure_channel(decode, CHANNEL_OPTIONS) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        # Connections and native pools come up under a first load; what grows after it is a leak.
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            list(pool.map(lambda n: _one(stub, prefill, 10_000 + n), range(24)))
        eventually(lambda: idle(prefill, decode), 30, "idle after the warm-up load")
        before = resources()
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            ends = collections.Counter(pool.map(lambda n: _one(stub, prefill, n), range(REQUESTS)))
        eventually(lambda: idle(prefill, decode), 30, "pages, slots, tickets and staged bytes back")
    assert sum(ends.values()) == REQUESTS and min(ends[end] for end in ("length", "stop", "cancel")) > 10, ends
    for engine in engines:
        status = engine.status()
        assert (status.pages_free, status.state_slots_free) == (status.pages_total, status.state_slots_total)
    eventually(lambda: all(now <= then for now, then in zip(resources(), before, strict=True)), 30, f"threads and fds back to {before}")

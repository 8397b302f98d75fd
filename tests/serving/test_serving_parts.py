"""Parts of the serving layer on their own: the account, the event queue, messages, the environment of a child."""

import asyncio
import threading

import grpc
import numpy as np
import pytest
from serving_fixtures import SPEC

from prfaas_jax.engine.api import SamplingParams, Token
from prfaas_jax.errors import EngineFailed, Exhausted, InvalidInput, PeerMismatch, TransferError
from prfaas_jax.serving import messages
from prfaas_jax.serving.events import EventQueue
from prfaas_jax.serving.launcher import environment, module_command
from prfaas_jax.serving.proto import common_pb2, generation_pb2
from prfaas_jax.serving.report import usage_dict, usage_table
from prfaas_jax.serving.usage import InvalidRun, Marks, progress_spans, ttft_parts


def parts_of(*args) -> dict[str, float]:
    message = ttft_parts(*args)
    return {field.name: round(getattr(message, field.name), 6) for field in message.DESCRIPTOR.fields}


def test_ttft_of_a_remote_prefill():
    marks = Marks(arrived=10.0, reserved=10.5, prefilled=13.0, committed=13.25, first=13.5)
    assert parts_of(marks, 0.1, True, 0.4, 1.6) == {
        "route": 0.1,
        "queue": 0.9,
        "prefill": 1.6,
        "exposed_transfer": 0.5,
        "admit": 0.25,
        "first_step": 0.25,
    }


def test_ttft_of_a_fallback_has_the_failed_attempt_as_transfer():
    marks = Marks(arrived=10.0, reserved=10.5, remote_failed=12.0, prefilled=13.0, committed=13.0, first=13.0)
    assert parts_of(marks, 0.0, False, 0.1, 0.8) == {
        "route": 0.0,
        "queue": 0.7,
        "prefill": 0.8,
        "exposed_transfer": 1.5,
        "admit": 0.0,
        "first_step": 0.0,
    }


def test_a_part_cannot_be_negative():
    """Bug class H: an engine that reports more prefill time than passed."""
    marks = Marks(arrived=10.0, reserved=10.5, prefilled=13.0, committed=13.25, first=13.5)
    with pytest.raises(InvalidRun, match="exposed_transfer"):
        ttft_parts(marks, 0.0, True, 0.4, 3.0)


def test_progress_becomes_bars_without_gaps():
    bars = progress_spans(Marks(arrived=1.0), 1.5, [(64, 2.0), (64, 2.1), (100, 3.0)])
    assert [(b.name, b.start_s, b.end_s) for b in bars] == [("prefill 0-64", 0.5, 1.0), ("prefill 64-100", 1.0, 2.0)]


def test_events_cross_from_a_thread_in_order_and_are_bounded():
    async def run():
        queue = EventQueue(10_000, weigh=lambda item: item)
        thread = threading.Thread(target=lambda: [queue.push(i) for i in range(10)])
        thread.start()
        assert [(await queue.get())[0] for _ in range(10)] == list(range(10))
        thread.join()
        for weight in (5_000, 5_000, 1):
            queue.push(weight)
        await asyncio.sleep(0)
        for _ in range(2):  # once lost, always lost
            with pytest.raises(Exhausted, match="10000 bytes"):
                await queue.get()
        return queue

    queue = asyncio.run(run())
    queue.push(1)  # the loop is closed: an engine may still speak


def test_sampling_crosses_the_wire_exactly():
    sampling = SamplingParams(0.1, 5, 0.3, 2**32 - 1, 7, (1, 2), True)
    there = common_pb2.Sampling.FromString(messages.sampling_to_proto(sampling).SerializeToString())
    assert messages.sampling_from_proto(there, 7, True) == sampling
    assert messages.sampling_from_proto(common_pb2.Sampling(), 16, False) == SamplingParams()


def test_tokens_cross_the_wire_exactly():
    token = Token(5, -0.1234567890123, np.array([1.5, -np.inf], np.float32))
    back = messages.token_from_proto(messages.token_to_proto(token))
    assert (back.token, back.logprob) == (token.token, token.logprob) and np.array_equal(back.logits, token.logits)
    assert messages.token_from_proto(messages.token_to_proto(Token(1, 0.0))).logits is None


def test_the_manifest_adds_up():
    manifest = messages.manifest(SPEC, 100)
    assert (manifest.length, manifest.bytes) == (100, SPEC.bytes(100)) and sum(g.bytes for g in manifest.groups) == manifest.bytes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("a", 1, "b"), grpc.StatusCode.INVALID_ARGUMENT),
        (Exhausted("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (PeerMismatch("a", 1, 2), grpc.StatusCode.FAILED_PRECONDITION),
        (EngineFailed("boom"), grpc.StatusCode.INTERNAL),
        (TransferError("gap"), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_errors_have_their_status(error, code):
    assert messages.code_of(error) is code


def test_the_environment_of_a_child():
    env = environment("cpu", cpu_devices=2, threads=1, compile_cache="/c")
    names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "OMP_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR")
    assert [env[name] for name in names] == ["cpu", "2", "1", "/c"]
    assert env["MALLOC_ARENA_MAX"] == "1" and "MALLOC_ARENA_MAX" not in environment(moves_kv=False)
    with pytest.raises(InvalidInput, match="cpu_devices=0"):
        environment(cpu_devices=0)


def test_flags_of_a_command():
    flags = {"a": 1, "b": True, "c": False, "d": None, "e": "x y"}
    assert module_command("m", flags)[1:] == ["-m", "m", "--a=1", "--b", "--noc", "--e=x y"]


def test_a_usage_for_people_and_programs():
    usage = generation_pb2.Usage(placement="remote", kv_bytes_moved=2**40, itl_s=[0.01, 0.03], ttft_s=1.5)
    usage.parts.prefill = 1.5
    fields = usage_dict(usage)
    assert fields["kv_bytes_moved"] == 2**40 and fields["parts"]["prefill"] == 1.5 and fields["parts"]["route"] == 0.0
    assert fields["itl_p50_s"] == pytest.approx(0.02) and usage_dict(generation_pb2.Usage())["itl_p50_s"] is None
    assert "1,099,511,627,776 moved" in usage_table(usage) and "1500.0 ms prefill" in usage_table(usage)

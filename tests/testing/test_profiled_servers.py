"""Profiled clusters behind real servers: in this process, and as the process that experiments start."""

import asyncio
import collections
import concurrent.futures
import contextlib
import random
import threading
import time

import grpc
import psutil
import pytest
from profiled_fixtures import SPEC, cluster_of, job, right_tokens

from configs.models import load_model_config
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.launcher import LaunchFailed, Processes, environment, module_command
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc, prefill_pb2_grpc
from prfaas_jax.testing.fake_decode import next_token
from prfaas_jax.testing.scaled_spec import scaled_spec

REQUESTS = 80


@contextlib.contextmanager
def serving(*make):
    """The servers that the functions make, on a loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server loop")
    thread.start()

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def start(make_one):
        server = make_one()
        await server.start()
        return server

    try:
        with contextlib.ExitStack() as stack:
            servers = [call(start(make_one)) for make_one in make]
            for server in servers:
                stack.callback(lambda server=server: call(server.stop(0)))
            yield servers
    finally:
        call(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture
def region():
    """Two prefill and two decode instances, and the two servers in front of them."""
    with (
        contextlib.closing(cluster_of(2, 2, time_scale=100.0, token_scale=8, convert_s=1.0)) as cluster,
        serving(
            # A caller that is cancelled before it hears of its ticket cannot release it: the lease does.
            lambda: PrefillServer(cluster.prefill_engine, PrefillServerOptions(lease_s=10)),
            lambda: DecodeServer(cluster.decode_engine, None, DecodeServerOptions(), convert=cluster.convert),
        ) as (prefill, decode),
        grpc.insecure_channel(decode.address) as near,
        grpc.insecure_channel(prefill.address) as far,
    ):
        yield cluster, prefill, generation_pb2_grpc.GenerationStub(near), prefill_pb2_grpc.PrefillStub(far)


def request(prompt, new: int, prefill: str = "") -> generation_pb2.GenerateRequest:
    message = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=prompt), max_new_tokens=new)
    if prefill:
        message.placement.prefill_address, message.placement.reason = prefill, "test"
    return message


def read(call) -> tuple[list[int], generation_pb2.Usage]:
    tokens, usage = [], generation_pb2.Usage()
    for event in call:
        if event.HasField("usage"):
            usage = event.usage
        elif event.token.HasField("token"):
            tokens.append(event.token.token.id)
    return tokens, usage


def until(check, what: str) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def idle(near, far) -> bool:
    status, other = near.Status(common_pb2.StatusRequest(), timeout=10), far.Status(common_pb2.StatusRequest(), timeout=10)
    engine = status.engine
    left = status.streams, engine.running, engine.waiting, engine.decode_waiting, engine.pages_total - engine.pages_free
    return (*left, other.tickets, other.staged_bytes, other.streams, other.engine.running, other.engine.waiting) == (0,) * 10


@pytest.mark.parametrize("length", [1, 256, 700])
def test_tokens_and_bytes_of_local_and_remote_prompts_are_right(region, length):
    cluster, prefill, near, far = region
    asked = job("a", length, 5)
    for address in ("", prefill.address):
        tokens, usage = read(near.Generate(request(asked.prompt, 5, address), timeout=30))
        assert tokens == right_tokens(asked)
        assert usage.placement == ("remote" if address else "local") and usage.tokens_recomputed == 0
        assert usage.kv_bytes_moved == usage.kv_bytes_expected == (SPEC.bytes(length) if address else 0)
        # Of the model's clock, exact whatever the machine does.
        expected = (0.1 + 8.0 * length / 1e4 + 2.0 * (length / 1e4) ** 2) / 100
        assert usage.parts.prefill == pytest.approx(expected, rel=1e-6)
    assert near.Status(common_pb2.StatusRequest(), timeout=10).engine.local_prefills == 1
    until(lambda: idle(near, far), "nothing left behind")
    assert cluster.kernel.max_late_s < 5


def _one(near, prefill: str, number: int) -> str:
    """One random request; how it ended."""
    rng = random.Random(number)
    asked = job("", rng.choice([1, 64, 300, 1500]), rng.randint(1, 12))
    call = near.Generate(request(asked.prompt, asked.sampling.max_new_tokens, rng.choice([prefill, ""])), timeout=60)
    if cancelled := rng.random() < 0.4:
        time.sleep(rng.uniform(0, 0.1))
        call.cancel()
    try:
        tokens, usage = read(call)
    except grpc.RpcError as error:
        assert cancelled and error.code() is grpc.StatusCode.CANCELLED, error
        return "cancelled"
    assert tokens == right_tokens(asked)
    assert usage.kv_bytes_moved == usage.kv_bytes_expected and usage.tokens_recomputed == 0
    return usage.placement


def test_random_requests_and_cancels_leave_nothing_behind(region):
    _, prefill, near, far = region
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        ends = collections.Counter(pool.map(lambda n: _one(near, prefill.address, n), range(REQUESTS)))
    assert min(ends[end] for end in ("local", "remote")) > 5, ends
    until(lambda: idle(near, far), "nothing left behind")


def test_instances_are_converted_over_the_wire(region):
    _, _, near, _ = region

    def has(instances: int, slots: int) -> bool:
        engine = near.Status(common_pb2.StatusRequest(), timeout=10).engine
        return (len(engine.instances), engine.decode_slots) == (instances, slots)

    near.Convert(generation_pb2.ConvertRequest(to="prefill"), timeout=30)
    until(lambda: has(3, 4), "an instance more that prefills")
    near.Convert(generation_pb2.ConvertRequest(to="decode"), timeout=30)
    until(lambda: has(2, 8), "and back")
    with pytest.raises(grpc.RpcError) as refused:
        near.Convert(generation_pb2.ConvertRequest(to="elsewhere"), timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_servers_of_engines_with_one_role_convert_nothing():
    with (
        contextlib.closing(cluster_of(1, 1)) as cluster,
        serving(lambda: DecodeServer(cluster.decode_engine, None, DecodeServerOptions())) as (server,),
        grpc.insecure_channel(server.address) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        generation_pb2_grpc.GenerationStub(channel).Convert(generation_pb2.ConvertRequest(to="prefill"), timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- as processes --------------------------------------------------------------------------------------------------------------------

PAPER = {"model": "paper_1t", "byte_scale": 1e-3, "time_scale": 50.0, "token_scale": 64, "chunk": 2048, "verify": True}


def test_two_clusters_as_processes_without_jax(tmp_path):
    """A far cluster and a region, each one process: what one computes the other decodes, at the times of their own profiles."""
    played = {
        "far": {"profile": "h200_paper_1t", "prefill": 2},
        "region": {"profile": "h20_paper_1t", "prefill": 1, "decode": 2, "decode_idle_s": 20},
    }
    commands = {name: module_command("experiments.serve_profiled", {**PAPER, **flags}) for name, flags in played.items()}
    small, byte_scale = scaled_spec(cache_spec(load_model_config("paper_1t")), 1e-3)
    prompt = [(7 * i) % 1000 for i in range(5000)]
    with Processes(tmp_path) as processes:
        running = {name: processes.launch(name, command, environment()) for name, command in commands.items()}
        for process in running.values():
            process.wait_ready(60)
        far, region = running["far"].ready, running["region"].ready
        assert far["decode"] is None and far["byte_scale"] == region["byte_scale"] == byte_scale
        assert far["fingerprint"] == region["fingerprint"]
        with grpc.insecure_channel(region["decode"]["address"]) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            tokens, usage = read(stub.Generate(request(prompt, 3, far["prefill"]["address"]), timeout=30))
        assert usage.placement == "remote" and usage.kv_bytes_moved == small.bytes(5000)
        assert usage.parts.prefill == pytest.approx((0.39035 + 0.42233 * 0.5 + 0.00936 * 0.25) / 50, rel=1e-6)
        ids = list(prompt)
        for _ in range(3):
            ids.append(next_token(ids, 163_840).token)
        assert tokens == ids[5000:]
        loaded = {name: [m.path for m in psutil.Process(p.pid).memory_maps()] for name, p in running.items()}
        for name, process in running.items():
            assert any("numpy" in path for path in loaded[name]) and not any("jaxlib" in path for path in loaded[name])
            assert process.stop(30) == 0
            assert '"max_late_s"' in process.log_tail()


def test_a_cluster_that_cannot_be_says_why(tmp_path):
    command = module_command("experiments.serve_profiled", {"model": "paper_1t", "profile": "h20_paper_1t", "prefill": 0})
    with Processes(tmp_path) as processes, pytest.raises(LaunchFailed, match="an instance that prefills, or one that decodes"):
        processes.spawn("empty", command, environment(), ready_s=60)

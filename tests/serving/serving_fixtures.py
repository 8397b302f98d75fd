"""What the serving tests share: a small cache, engines without a model, servers on a loop in a thread, a look at what is left."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Iterator

import grpc
import psutil

from prfaas_jax.engine import api
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.launcher import Process, Processes, environment, module_command
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from prfaas_jax.serving.router import Router, RouterOptions
from prfaas_jax.testing.fake_decode import FakeDecodeEngine, FakeDecodeOptions, next_token
from prfaas_jax.testing.profiled import ProfiledPrefillEngine
from prfaas_jax.transfer.channel import CHANNEL_OPTIONS
from prfaas_jax.transfer.security import NONE, open_channel

ROOT = pathlib.Path(__file__).resolve().parents[2]
GQA = LayerCache("paged", (TensorSpec("k", 2, 8, "float32"), TensorSpec("v", 2, 8, "float32")))
WINDOW = LayerCache("window", (TensorSpec("k", 1, 8, "bfloat16"), TensorSpec("v", 1, 4, "bfloat16")), 40)
STATE = LayerCache("state", (TensorSpec("recurrent", 2, 16, "float32"), TensorSpec("q_tail", 1, 6, "bfloat16")))
SPEC = CacheSpec((CacheGroup(GQA, (0, 1, 2)), CacheGroup(WINDOW, (3, 5)), CacheGroup(STATE, (4,))))
FINGERPRINT = "f" * 32
VOCAB = 1000
# Of routers that are to notice soon.
QUICK = {"report_s": 0.1, "silence_s": 0.5, "lost_s": 1.0}


def prompt_of(length: int) -> list[int]:
    return [(7 * i + length) % VOCAB for i in range(length)]


def greedy(prompt, count: int) -> list[int]:
    """What any correct generation of `count` tokens is."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, VOCAB).token)
    return ids[len(prompt) :]


class Profiled(ProfiledPrefillEngine):
    """Hands out logits too."""

    def _prefill(self, job, sink, submitted):
        end = super()._prefill(job, sink, submitted)
        if isinstance(end, api.PrefillDone) and job.sampling.return_logits:
            end = dataclasses.replace(end, first=next_token(job.prompt, VOCAB, with_logits=True))
        return end


def prefill_engine(spec=SPEC, fingerprint=FINGERPRINT, tokens_per_s=None, seconds=None, **options) -> Profiled:
    """Chunks of 64 tokens, two head slices; a million tokens per second unless told otherwise."""
    if seconds is None:
        options["tokens_per_s"] = tokens_per_s or 1e6
    return Profiled(spec, fingerprint, seconds, chunk=64, shards=2, vocab_size=VOCAB, **options)


def decode_engine(engine_class=FakeDecodeEngine, fingerprint: str = FINGERPRINT, **options) -> FakeDecodeEngine:
    engine = engine_class(SPEC, fingerprint, FakeDecodeOptions(vocab_size=VOCAB, **options))
    engine.start()
    return engine


@contextlib.contextmanager
def serving(make, grace_s: float = 0.0):
    """The server that `make` builds, on a loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server loop")
    thread.start()

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def start():
        server = make()
        await server.start()
        return server

    try:
        server = call(start())
        try:
            yield server
        finally:
            call(server.stop(grace_s))
    finally:
        call(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def prefill_server(engine: ProfiledPrefillEngine | None = None, **options) -> Iterator[PrefillServer]:
    engine = engine or prefill_engine()
    with contextlib.closing(engine), serving(lambda: PrefillServer(engine, PrefillServerOptions(**options))) as server:
        yield server


@contextlib.contextmanager
def decode_server(engine: FakeDecodeEngine | None = None, tokenizer=None, eos_ids=(), **options) -> Iterator[DecodeServer]:
    engine, settings = engine or decode_engine(), DecodeServerOptions(**options)
    with contextlib.closing(engine), serving(lambda: DecodeServer(engine, tokenizer, settings, eos_ids)) as server:
        yield server


@contextlib.contextmanager
def of_clusters(policy, clusters, deployment=None, **options):
    with serving(lambda: Router(policy, None, RouterOptions(**QUICK, **options), clusters, deployment)) as front:
        yield front


@contextlib.contextmanager
def router(policy, decode: str, prefill: str = "", tokenizer=None, **options) -> Iterator[Router]:
    with serving(lambda: Router(policy, tokenizer, RouterOptions(decode=decode, prefill=prefill, **options))) as server:
        yield server


def env() -> dict[str, str]:
    """Of processes that find this checkout and these files."""
    return environment(platform="cpu", moves_kv=False) | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'serving'}"}


def server_process(processes: Processes, role: str, name: str = "", **flags) -> Process:
    """One of `profiled_servers`, ready; its log has its name."""
    command = module_command("profiled_servers", {"role": role, **flags})
    return processes.spawn(name or f"{role}-{len(processes._running)}", command, env(), ready_s=60)


@dataclasses.dataclass
class Answer:
    tokens: list[int]
    text: str
    logits: list[bytes]
    usage: generation_pb2.Usage


def request(prompt=None, max_new_tokens=4, prefill="", allow_fallback=False, **fields) -> generation_pb2.GenerateRequest:
    message = generation_pb2.GenerateRequest(max_new_tokens=max_new_tokens, allow_fallback=allow_fallback, **fields)
    if prompt is not None:
        message.token_ids.ids[:] = prompt
    if prefill:
        message.placement.prefill_address = prefill
        message.placement.reason = "test"
    return message


def read(call) -> Answer:
    answer = Answer([], "", [], generation_pb2.Usage())
    for event in call:
        if event.HasField("usage"):
            answer.usage = event.usage
        else:
            if event.token.HasField("token"):
                answer.tokens.append(event.token.token.id)
                answer.logits.append(event.token.token.logits)
            answer.text += event.token.text
    return answer


@contextlib.contextmanager
def channel(address: str, security=NONE):
    with open_channel(address, CHANNEL_OPTIONS, security) as opened:
        yield opened


def generate(address: str, message, timeout: float = 20.0, security=NONE) -> Answer:
    with channel(address, security) as opened:
        return read(generation_pb2_grpc.GenerationStub(opened).Generate(message, timeout=timeout))


def error_of(address: str, message, timeout: float = 20.0, security=NONE) -> grpc.RpcError:
    """The error that the call ends with; fails when it ends well."""
    try:
        answer = generate(address, message, timeout, security)
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"no error but {answer}")


def generation_status(address: str, security=NONE) -> generation_pb2.GenerationStatus:
    with channel(address, security) as opened:
        return generation_pb2_grpc.GenerationStub(opened).Status(common_pb2.StatusRequest(), timeout=10)


def prefill_status(address: str, security=NONE) -> prefill_pb2.PrefillStatus:
    with channel(address, security) as opened:
        return prefill_pb2_grpc.PrefillStub(opened).Status(common_pb2.StatusRequest(), timeout=10)


def eventually(check, timeout_s: float = 5.0, what: str = ""):
    """Waits until `check()` holds; returns how long it took."""
    begun = time.monotonic()
    while not check():
        if time.monotonic() - begun > timeout_s:
            raise AssertionError(f"not after {timeout_s} s: {what or check}")
        time.sleep(0.01)
    return time.monotonic() - begun


def resources() -> tuple[int, int]:
    """Threads and file descriptors of this process.

    Without the idle workers of the servers' bounded pools, and without gRPC's native threads, whose number follows the machine's load.
    """
    pooled = sum(thread.name.startswith(("decode-server_", "lane_")) for thread in threading.enumerate())
    return threading.active_count() - pooled, psutil.Process().num_fds()


def idle(prefill_address: str | None, decode_address: str) -> bool:
    """Nothing of any request is left on either side."""
    decode = generation_status(decode_address)
    engine = decode.engine
    clean = (decode.streams, engine.running, engine.waiting) == (0, 0, 0) and _all_free(engine)
    if prefill_address is None:
        return clean
    prefill = prefill_status(prefill_address)
    clean = clean and _all_free(prefill.engine)
    return clean and (prefill.tickets, prefill.staged_bytes, prefill.streams, prefill.engine.running) == (0, 0, 0, 0)


def _all_free(engine: common_pb2.EngineStatus) -> bool:
    return engine.pages_free == engine.pages_total and engine.state_slots_free == engine.state_slots_total

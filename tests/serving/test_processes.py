"""Servers as real processes: killed, frozen, terminated, started on a taken port, orphaned."""

import contextlib
import ctypes
import errno
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_fixtures import (
    ROOT,
    channel,
    decode_engine,
    decode_server,
    env,
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
    server_process,
    serving,
)

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.launcher import LaunchFailed, Processes, module_command, spawn
from prfaas_jax.serving.pd_server import ServerPair
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.testing.relay import Relay

PROMPT = prompt_of(300)
SLOW = 100.0  # tokens per second: a prefill of 3 s


@pytest.fixture
def processes(tmp_path):
    with Processes(tmp_path, grace_s=5) as running:
        yield running


def health(address: str) -> int:
    with channel(address) as open_channel:
        return health_pb2_grpc.HealthStub(open_channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status


class Background:
    """A Generate call in a thread; `answer` or `error` once it is over."""

    def __init__(self, address, message):
        self.answer = self.error = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, args=(address, message))
        self._thread.start()

    def _run(self, address, message):
        begun = time.monotonic()
        try:
            self.answer = generate(address, message)
        except grpc.RpcError as error:
            self.error = error
        self.seconds = time.monotonic() - begun

    def join(self):
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self


@pytest.mark.parametrize("allow_fallback", [True, False])
def test_a_killed_prefill_server_is_a_counted_fallback_at_once(processes, allow_fallback):
    prefill = server_process(processes, "prefill", tokens_per_s=SLOW)
    address = prefill.ready["address"]
    with decode_server() as decode:
        call = Background(decode.address, request(PROMPT, 4, address, allow_fallback))
        # One chunk more than the decode side must have heard of.
        eventually(lambda: prefill_status(address).engine.tokens_prefilled >= 128)
        killed = time.monotonic()
        prefill.signal_group(signal.SIGKILL)
        call.join()
        assert time.monotonic() - killed < 2.0
        if allow_fallback:
            usage = call.answer.usage
            assert call.answer.tokens == greedy(PROMPT, 4)
            assert (usage.placement, usage.fallbacks, usage.finish_reason) == ("local", 1, "length")
            assert usage.tokens_recomputed >= 64 and usage.reason.startswith("fallback: ") and "UNAVAILABLE" in usage.fallback_reason
            parts = [getattr(usage.parts, field.name) for field in usage.parts.DESCRIPTOR.fields]
            assert sum(parts) == pytest.approx(usage.ttft_s, abs=1e-3) and usage.parts.exposed_transfer > 0.5
            assert generation_status(decode.address).fallbacks == 1
        else:
            assert call.error.code() is grpc.StatusCode.UNAVAILABLE and address in call.error.details()
        eventually(lambda: idle(None, decode.address))


def test_a_frozen_prefill_server_is_a_fallback_and_forgets_when_it_thaws(processes):
    prefill = server_process(processes, "prefill", tokens_per_s=SLOW)
    address = prefill.ready["address"]
    with decode_server(idle_s=1.0) as decode:
        call = Background(decode.address, request(PROMPT, 4, address, allow_fallback=True))
        eventually(lambda: prefill_status(address).engine.tokens_prefilled >= 64)
        frozen = time.monotonic()
        prefill.signal_group(signal.SIGSTOP)
        call.join()
        assert 0.5 < time.monotonic() - frozen < 2.5
        assert call.answer.tokens == greedy(PROMPT, 4)
        usage = call.answer.usage
        assert (usage.placement, usage.fallbacks) == ("local", 1) and "no progress for 1.0 s" in usage.fallback_reason
        prefill.signal_group(signal.SIGCONT)
        eventually(lambda: idle(address, decode.address), 10)
        assert generate(decode.address, request(prompt_of(10), 4, address)).usage.placement == "remote"


def test_a_dead_prefill_server_is_an_error_in_bounded_time_or_a_fallback():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with decode_server() as decode:
            call = Background(decode.address, request(PROMPT, 4, address)).join()
            assert call.error.code() is grpc.StatusCode.UNAVAILABLE and address in call.error.details() and call.seconds < 2
            call = Background(decode.address, request(PROMPT, 4, address, allow_fallback=True)).join()
            assert call.answer.usage.fallbacks == 1 and call.answer.usage.tokens_recomputed == 0 and call.seconds < 2
            eventually(lambda: idle(None, decode.address))


def test_a_prefill_server_that_comes_back_is_used_again(processes):
    first = server_process(processes, "prefill")
    address = first.ready["address"]
    with decode_server() as decode:

        def placed() -> str:
            return generate(decode.address, request(prompt_of(10), 2, address, allow_fallback=True)).usage.placement

        assert placed() == "remote"
        first.stop()
        assert placed() == "local"
        server_process(processes, "prefill", address=address)
        eventually(lambda: placed() == "remote", 5, "the channel reconnects")


def test_a_killed_decode_server_frees_the_prefill_server(processes):
    decode = server_process(processes, "decode")
    with prefill_server(prefill_engine(tokens_per_s=SLOW)) as prefill:
        call = Background(decode.ready["address"], request(PROMPT, 4, prefill.address))
        eventually(lambda: prefill_status(prefill.address).engine.tokens_prefilled >= 64)
        decode.signal_group(signal.SIGKILL)
        assert call.join().error.code() is grpc.StatusCode.UNAVAILABLE
        eventually(lambda: prefill_status(prefill.address).tickets == 0 and prefill_status(prefill.address).engine.running == 0, 2)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0(processes, role):
    prefill = server_process(processes, "prefill", tokens_per_s=100.0)
    decode = server_process(processes, "decode", step_s=0.01)
    stopped, message = {"prefill": prefill, "decode": decode}[role], request(PROMPT, 20, prefill.ready["address"])
    assert health(stopped.ready["address"]) == health_pb2.HealthCheckResponse.SERVING
    call = Background(decode.ready["address"], message)
    eventually(lambda: prefill_status(prefill.ready["address"]).engine.running == 1)
    stopped.signal_group(signal.SIGTERM)
    eventually(lambda: health(stopped.ready["address"]) == health_pb2.HealthCheckResponse.NOT_SERVING, 0.5)
    late = error_of(decode.ready["address"], message)
    assert late.code() is grpc.StatusCode.UNAVAILABLE and "shutting down" in late.details()
    assert call.join().answer.tokens == greedy(PROMPT, 20)
    assert stopped.popen.wait(10) == 0


def test_signals_after_the_first_one_change_nothing(processes):
    """They come until the process is gone: nothing that it finishes is cut, and it ends as it would have."""
    prefill = server_process(processes, "prefill", tokens_per_s=400.0)
    sent = itertools.cycle((signal.SIGTERM, signal.SIGINT))

    def ended() -> bool:
        prefill.signal_group(next(sent))
        return prefill.popen.poll() is not None

    with decode_server() as decode:
        call = Background(decode.address, request(PROMPT, 4, prefill.ready["address"]))
        eventually(lambda: prefill_status(prefill.ready["address"]).engine.running == 1)
        eventually(ended, 20)
        assert call.join().answer.tokens == greedy(PROMPT, 4) and call.answer.usage.placement == "remote"
    assert prefill.popen.returncode == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_signal_that_another_thread_receives_ends_an_idle_server(processes, role):
    """As does one that comes just before the main thread goes to sleep: handlers run there, and nothing had woken it up."""
    server = server_process(processes, role)
    others = {thread.id for thread in psutil.Process(server.pid).threads()} - {server.pid}
    assert ctypes.CDLL(None).tgkill(server.pid, max(others), signal.SIGTERM) == 0
    assert server.popen.wait(10) == 0


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        threads = threading.active_count()
        for make, field in [
            (lambda: prefill_server(address=address), "address"),
            (lambda: prefill_server(lane_address=address), "lane_address"),
            (lambda: decode_server(address=address), "address"),
        ]:
            with pytest.raises(InvalidInput, match=f"{field}='{address}'"), make():
                pass
        eventually(lambda: threading.active_count() <= threads, what="threads of servers that never were")


def test_a_pair_of_servers_serves_whole_or_not_at_all():
    with socket.socket() as taken, contextlib.closing(prefill_engine()) as prefill, contextlib.closing(decode_engine()) as decode:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        servers = PrefillServer(prefill, PrefillServerOptions()), DecodeServer(decode, None, DecodeServerOptions(address))
        pair = ServerPair(*servers)
        with pytest.raises(InvalidInput, match=f"address='{address}'"), serving(lambda: pair):
            pass
        for port in (pair.prefill.address, *pair.prefill.lane_addresses):
            assert not port.endswith(":0"), "it was bound"
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", int(port.rpartition(":")[2]))) == errno.ECONNREFUSED


def test_a_port_in_use_ends_the_process_with_a_message(processes):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LaunchFailed, match=f"ended with code 2 .*(?s:.*)error: address='{address}'"):
            server_process(processes, "decode", address=address)


@pytest.mark.parametrize("options", [PrefillServerOptions, DecodeServerOptions])
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "example.org:1", "nonsense", "127.0.0.1:99999", ":5", "127.0.0.1"])
def test_addresses_are_loopback_and_well_formed(options, address):
    with pytest.raises(InvalidInput, match="address="):
        options(address=address)
    if address in ("0.0.0.0:1", "[::]:1", "example.org:1"):
        assert options(address=address, insecure=True).address == address


@pytest.mark.parametrize(
    ("module", "flags", "named"),
    [
        ("serve_prefill", {"checkpoint": "x", "page_size": "abc"}, ["page_size", "abc"]),
        ("serve_prefill", {"checkpoint": "x", "page_size": 7}, ["page_size=7"]),
        ("serve_prefill", {"checkpoint": "x", "advertise_lane": "nowhere"}, ["advertise_lane='nowhere'"]),
        ("serve_prefill", {}, ["checkpoint"]),
        ("serve_decode", {"checkpoint": "x", "address": "0.0.0.0:1"}, ["address='0.0.0.0:1'", "--insecure"]),
        ("serve_decode", {"checkpoint": "/nowhere"}, ["checkpoint='/nowhere'"]),
        ("serve_router", {"decode": "h:1", "policy": "coin"}, ["policy", "coin"]),
        ("serve_router", {}, ["decode=()"]),
        ("client", {"address": "nowhere", "prompt": "x"}, ["address='nowhere'"]),
        ("client", {"address": "h:1"}, ["exactly one of --prompt"]),
    ],
)
def test_malformed_flags_are_named_with_their_value(module, flags, named):
    done = subprocess.run(module_command(f"experiments.{module}", flags), cwd=ROOT, env=env(), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert all(text in done.stderr for text in named), done.stderr


def test_the_client_streams_and_ends_with_json(tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps([PROMPT]))
    flags = {"prompt_tokens": tmp_path / "ids.json", "max_new_tokens": 5}
    with prefill_server() as prefill, decode_server() as decode:
        flags |= {"address": decode.address, "prefill": prefill.address}
        run = subprocess.run(module_command("experiments.client", flags), cwd=ROOT, env=env(), capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout.splitlines()[-1])
        assert result["tokens"] == greedy(PROMPT, 5)
        usage = result["usage"]
        assert usage["kv_bytes_moved"] == usage["kv_bytes_expected"] > 0
        assert sum(usage["parts"].values()) == pytest.approx(usage["ttft_s"], abs=1e-3)
        assert "exposed transfer" in run.stdout and "asked for by the client" in run.stdout
        flags |= {"prompt": "text"}
        del flags["prompt_tokens"]
        run = subprocess.run(module_command("experiments.client", flags), cwd=ROOT, env=env(), capture_output=True, text=True, timeout=60)
        assert run.returncode == 1 and "INVALID_ARGUMENT" in run.stderr and "no tokenizer" in run.stderr


def test_launch_failures_show_the_log(tmp_path):
    dies = [sys.executable, "-c", "import sys; print('out'); print('what went wrong', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(LaunchFailed, match=r"ended with code 3(?s:.*)what went wrong"):
        spawn("dies", dies, tmp_path / "dies.log", env(), ready_s=20)
    silent = [sys.executable, "-c", "import time; print('starting', flush=True); time.sleep(60)"]
    begun = time.monotonic()
    with pytest.raises(LaunchFailed, match=r"not ready after 3\.0 s(?s:.*)starting"):
        spawn("silent", silent, tmp_path / "silent.log", env(), ready_s=3.0)
    assert time.monotonic() - begun < 6
    assert not [p for p in psutil.Process().children(recursive=True) if "time.sleep(60)" in " ".join(p.cmdline())]


def test_the_log_of_a_process_that_has_ended_has_its_last_line(tmp_path):
    fills_a_pipe = "import os; print('READY {\"a\": 1}', flush=True); os.write(1, b'\\n' * 60_000 + b'last\\n'); os._exit(0)"
    process = spawn("prints", [sys.executable, "-c", fills_a_pipe], tmp_path / "prints.log", env(), ready_s=20)
    eventually(lambda: process.popen.poll() is not None)
    assert process.log_tail().endswith("\nlast\n")


def test_children_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "from prfaas_jax.serving.launcher import Processes\n"
        f"with Processes(pathlib.Path({str(tmp_path)!r})) as running:\n"
        f"    child = running.spawn('child', [sys.executable, {str(ROOT / 'tests/serving/profiled_servers.py')!r}, '--role=decode'],\n"
        "        dict(os.environ), 60)\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], env=env(), stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5, "the child ends")


def test_a_lane_behind_a_relay_is_advertised_and_used():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        lane = f"127.0.0.1:{probe.getsockname()[1]}"
    with (
        Relay(lane, gbps=0.01, rtt_ms=20) as relay,
        prefill_server(lane_address=lane, advertise_lane=relay.address) as prefill,
        decode_server() as decode,
    ):
        usage = generate(decode.address, request(PROMPT, 4, prefill.address)).usage
        assert usage.kv_bytes_moved == usage.kv_bytes_expected
        # 115 kB at 10 Mbit/s, and nobody else's time.
        assert 0.08 < usage.parts.exposed_transfer < 1.0

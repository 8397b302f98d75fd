"""A whole system behind TLS and tokens: what passes, what is refused at every port, and what its logs never say."""

import dataclasses
import json
import pathlib
import signal
import socket
import subprocess
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_fixtures import (
    ROOT,
    SPEC,
    channel,
    decode_server,
    env,
    error_of,
    eventually,
    generate,
    generation_status,
    greedy,
    prefill_server,
    prefill_status,
    prompt_of,
    request,
    router,
    server_process,
)

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.policies import make_policy
from prfaas_jax.serving.decode_server import DecodeServerOptions
from prfaas_jax.serving.launcher import LaunchFailed, Processes, module_command
from prfaas_jax.serving.prefill_server import PrefillServerOptions
from prfaas_jax.serving.router import RouterOptions
from prfaas_jax.testing.certificates import TOKEN_FILE, CertificateOptions, make_certificates
from prfaas_jax.transfer.channel import LANE_CHANNEL_OPTIONS
from prfaas_jax.transfer.lane import METHOD
from prfaas_jax.transfer.security import Security, open_channel

PROMPT = prompt_of(300)
PROMPTLY_S = 5.0


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> CertificateOptions:
    return made(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> CertificateOptions:
    return made(tmp_path_factory.mktemp("theirs"))


def made(path) -> CertificateOptions:
    options = CertificateOptions(str(path))
    make_certificates(options)
    return options


def flags(security: Security) -> dict[str, object]:
    return dataclasses.asdict(security)


def strangers(ours: CertificateOptions, theirs: CertificateOptions) -> dict[str, tuple[Security, grpc.StatusCode]]:
    """Clients that no port may serve, and the status that each gets."""
    client, other = ours.security("client"), theirs.security("client")
    return {
        "plaintext": (Security(), grpc.StatusCode.UNAVAILABLE),
        "plaintext with the token": (Security(token_file=client.token_file, insecure=True), grpc.StatusCode.UNAVAILABLE),
        "other CA": (dataclasses.replace(other, token_file=client.token_file), grpc.StatusCode.UNAVAILABLE),
        "certificate of another CA": (
            dataclasses.replace(other, tls_ca=client.tls_ca, token_file=client.token_file),
            grpc.StatusCode.UNAVAILABLE,
        ),
        "no token": (dataclasses.replace(client, token_file=None), grpc.StatusCode.UNAUTHENTICATED),
        "bad token": (dataclasses.replace(client, token_file=other.token_file), grpc.StatusCode.UNAUTHENTICATED),
    }


def test_a_whole_system_works_over_mutual_tls_with_a_token(ours):
    secure = {name: flags(ours.security(name)) for name in ("prefill", "decode", "router")}
    client = ours.security("client")
    with (
        prefill_server(**secure["prefill"]) as prefill,
        decode_server(**secure["decode"]) as decode,
        router(make_policy("threshold", tokens=100), decode.address, prefill.address, **secure["router"]) as front,
    ):
        answer = generate(front.address, request(PROMPT, 6), security=client)
        assert answer.tokens == greedy(PROMPT, 6)
        usage = answer.usage
        assert (usage.placement, usage.fallbacks, usage.tokens_recomputed) == ("remote", 0, 0)
        assert usage.kv_bytes_moved == usage.kv_bytes_expected == SPEC.bytes(len(PROMPT))
        assert generate(front.address, request(prompt_of(20), 3), security=client).usage.placement == "local"
        assert all(backend.healthy for backend in generation_status(front.address, client).backends)
        # No lane, ticket or stream is left.
        eventually(lambda: (s := prefill_status(prefill.address, client)).tickets == s.staged_bytes == s.streams == 0)


@pytest.mark.parametrize("who", ["plaintext", "plaintext with the token", "other CA", "certificate of another CA", "no token", "bad token"])
def test_every_port_refuses_strangers_promptly(ours, theirs, who, capfd):
    security, code = strangers(ours, theirs)[who]
    with (
        prefill_server(**flags(ours.security("prefill"))) as prefill,
        decode_server(**flags(ours.security("decode"))) as decode,
        router(make_policy("always_remote"), decode.address, prefill.address, **flags(ours.security("router"))) as front,
    ):
        begun = time.monotonic()
        for address in (front.address, decode.address):
            assert error_of(address, request(PROMPT, 4), security=security).code() is code
        with pytest.raises(grpc.RpcError) as caught:
            prefill_status(prefill.address, security)
        assert caught.value.code() is code
        with open_channel(prefill.lane_addresses[0], LANE_CHANNEL_OPTIONS, security) as lane, pytest.raises(grpc.RpcError) as caught:
            list(lane.unary_stream(METHOD)(b"anything", timeout=20))
        assert caught.value.code() is code
        assert time.monotonic() - begun < 4 * PROMPTLY_S
        # None of it was counted as a request.
        status = generation_status(decode.address, ours.security("client"))
        assert not status.failed and not status.served
    out = "".join(capfd.readouterr())
    assert not [token for token in map(token_of, (ours, theirs)) if token in out]


def token_of(certificates: CertificateOptions) -> str:
    return (pathlib.Path(certificates.out) / TOKEN_FILE).read_text().strip()


@pytest.mark.parametrize("allow_fallback", [False, True])
@pytest.mark.parametrize("who", ["plaintext", "other CA", "certificate of another CA", "no token", "bad token"])
def test_a_decode_server_that_a_prefill_server_refuses_says_so_or_falls_back(ours, theirs, who, allow_fallback):
    security, code = strangers(ours, theirs)[who]
    # The client is one that this decode server and its certificate agree with.
    client = (
        security
        if who != "certificate of another CA"
        else dataclasses.replace(ours.security("client"), tls_ca=theirs.security("client").tls_ca)
    )
    with (
        prefill_server(**flags(ours.security("prefill"))) as prefill,
        decode_server(**flags(security)) as decode,
    ):
        begun = time.monotonic()
        message = request(PROMPT, 4, prefill.address, allow_fallback)
        if allow_fallback:
            usage = generate(decode.address, message, security=client).usage
            assert (usage.placement, usage.fallbacks, usage.tokens_recomputed) == ("local", 1, 0) and code.name in usage.fallback_reason
        else:
            error = error_of(decode.address, message, security=client)
            assert error.code() is code and prefill.address in error.details()
        assert time.monotonic() - begun < PROMPTLY_S


def test_a_router_without_the_token_calls_its_servers_unhealthy(ours):
    without = dataclasses.replace(ours.security("router"), token_file=None)
    with (
        decode_server(**flags(ours.security("decode"))) as decode,
        router(make_policy("always_local"), decode.address, **flags(without)) as front,
    ):
        (backend,) = generation_status(front.address, without).backends
        assert not backend.healthy and backend.why.startswith("UNAUTHENTICATED")


def test_health_takes_a_certificate_but_no_token(ours):
    client = ours.security("client")

    def health(address: str, security: Security) -> int:
        with channel(address, security) as opened:
            return health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=20).status

    with prefill_server(**flags(ours.security("prefill"))) as prefill, decode_server(**flags(ours.security("decode"))) as decode:
        for address in (prefill.address, decode.address):
            assert health(address, dataclasses.replace(client, token_file=None)) == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                health(address, Security())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (PrefillServerOptions, "address"),
        (PrefillServerOptions, "lane_address"),
        (DecodeServerOptions, "address"),
        (RouterOptions, "address"),
    ],
)
def test_servers_listen_beyond_loopback_only_with_tls_or_insecure(ours, options, field):
    with pytest.raises(InvalidInput, match=rf"{field}='0\.0\.0\.0:0'.*--tls_ca.*--insecure"):
        options(**{field: "0.0.0.0:0"})
    for security in (ours.security("decode"), Security(insecure=True)):
        assert getattr(options(**{field: "0.0.0.0:0"}, **flags(security)), field) == "0.0.0.0:0"
    with pytest.raises(InvalidInput, match="tls_key=None"):
        options(tls_ca="a", tls_cert="b")


# --- processes ---------------------------------------------------------------------------------------------------------------------


def test_bad_files_end_a_server_before_it_loads_a_model(tmp_path, ours):
    with Processes(tmp_path) as processes:
        with pytest.raises(LaunchFailed, match=r"ended with code 2 .*(?s:.*)error: tls_key='/nowhere': expected a readable file"):
            server_process(processes, "prefill", **flags(ours.security("prefill")) | {"tls_key": "/nowhere"})
        # Before the checkpoint, which is not there either, is looked for.
        command = module_command("experiments.serve_decode", {"checkpoint": "/nowhere", "token_file": ours.out, "insecure": True})
        with pytest.raises(LaunchFailed, match=r"ended with code 2 .*(?s:.*)error: token_file="):
            processes.spawn("decode", command, env(), 60)


def test_logs_hold_no_prompt_and_no_token(tmp_path, ours, theirs):
    """Requests that succeed, fail in every way and fall back; then everything that the processes wrote is searched."""
    marked = [613, 617, 619, 631, 641, 643, 647, 653, 659, 661]
    ids = marked * 30
    text = "the-quick-brown-prompt"
    client, bad_token = (
        ours.security("client"),
        dataclasses.replace(ours.security("client"), token_file=theirs.security("client").token_file),
    )
    (tmp_path / "ids.json").write_text(json.dumps([ids]))
    with Processes(tmp_path / "logs") as processes:
        prefill = server_process(processes, "prefill", "prefill", verbosity=1, **flags(ours.security("prefill")))
        decode = server_process(processes, "decode", "decode", verbosity=1, **flags(ours.security("decode")))
        there = {"decode": decode.ready["address"], "prefill": prefill.ready["address"], "report_s": 0.2}
        command = module_command(
            "experiments.serve_router", {**there, **flags(ours.security("router")), "policy": "always_remote", "verbosity": 1}
        )
        front = processes.spawn("router", command, env(), 60).ready["address"]
        asked = {"address": front, "prompt_tokens": tmp_path / "ids.json", "max_new_tokens": 4, **flags(client)}
        run = subprocess.run(module_command("experiments.client", asked), cwd=ROOT, env=env(), capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout.splitlines()[-1])
        assert result["tokens"] == greedy(ids, 4) and result["usage"]["placement"] == "remote"
        for message in (
            request([*marked, 424242], 4),
            request([*marked, 424242], 4, there["prefill"]),
            request(ids * 1000, 4),
            request(ids, 4, stop_strings=[text]),
            request(None, 4, text=text),
            request(None, 4, chat={"messages": [{"role": text, "content": text}]}),
        ):
            for address in (front, there["decode"]):
                assert error_of(address, message, security=client).code() is grpc.StatusCode.INVALID_ARGUMENT
                assert error_of(address, message, security=bad_token).code() is grpc.StatusCode.UNAUTHENTICATED
        prefill.signal_group(signal.SIGKILL)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            usage = generate(there["decode"], request(ids, 4, address, allow_fallback=True), security=client).usage
            assert usage.fallbacks == 1
        eventually(lambda: "unhealthy" in log(tmp_path, "router"))
    logs = {name: log(tmp_path, name) for name in ("prefill", "decode", "router")}
    assert "falling back to a local prefill" in logs["decode"]  # what is searched are the logs
    wanted = {"613, 617", "613 617", "ids: 613", "424242", text, token_of(ours), token_of(theirs), "PRIVATE KEY", "authorization"}
    found = {(name, secret) for name, content in logs.items() for secret in wanted if secret in content}
    assert not found


def log(tmp_path: pathlib.Path, name: str) -> str:
    return (tmp_path / "logs" / f"{name}.log").read_text()

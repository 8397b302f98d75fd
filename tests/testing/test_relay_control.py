import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tcp_target import Target, pattern, ping, read_all

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.launcher import LaunchFailed
from prfaas_jax.testing.json_child import ChildFailed
from prfaas_jax.testing.relay import Relay
from prfaas_jax.testing.relay_control import COMMANDS, answer
from prfaas_jax.testing.relay_process import RelayProcess


def join(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("", "line"),
        ("{", "line"),
        ('"\udcff"', "line"),
        ("[1]", "line"),
        ("{}", "command"),
        ('{"command": "close"}', "command"),
        ('{"command": ["set_rate"]}', "command"),
        ('{"command": "set_rate"}', "gbps"),
        ('{"command": "set_rate", "gbps": "1"}', "gbps"),
        ('{"command": "set_rate", "gbps": true}', "gbps"),
        ('{"command": "set_rate", "gbps": 0}', "gbps"),
        ('{"command": "set_rate", "gbps": 1, "direction": "left"}', "direction"),
        ('{"command": "set_link", "rtt": 3}', "rtt"),
        ('{"command": "set_link", "rtt_ms": -3}', "rtt_ms"),
        ('{"command": "set_target", "target": "nowhere"}', "target"),
        ('{"command": "flip_byte_after", "nbytes": [1, "2"]}', "nbytes"),
        ('{"command": "flip_byte_after", "nbytes": 1.5}', "nbytes"),
        ('{"command": "black_hole", "seconds": -1}', "seconds"),
        ('{"command": "reset", "after_s": -1}', "after_s"),
        ('{"command": "status", "verbose": 1}', "verbose"),
    ],
)
def test_a_malformed_command_is_answered_with_the_name_of_its_field(line, field):
    with Relay("127.0.0.1:1") as relay:
        said = json.loads(answer(relay, line.encode(errors="surrogateescape")))
    assert (said["ok"], said["field"]) == (False, field)
    assert said["error"].startswith(f"{field}=") and said["expected"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 1 << 40) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "gbps",
    "rtt_ms",
    "jitter_ms",
    "direction",
    "after_s",
    "slice_bytes",
    "pause_ms",
    "target",
    "seconds",
    "nbytes",
    "flips_per_gb",
    "seed",
)


@given(command=st.sampled_from(COMMANDS), arguments=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_command_gets_one_answer(command, arguments):
    with Relay("127.0.0.1:1") as relay:
        said = json.loads(answer(relay, json.dumps({"command": command} | arguments)))
    assert said["ok"] or said["field"] in (*arguments, *FIELDS)


def test_a_running_relay_does_as_it_is_told():
    with Target(echo=True) as target, RelayProcess("127.0.0.1:9") as relay:
        relay.tell("set_target", target=target.address)
        with join(relay.address) as sock:
            ping(sock)
            relay.tell("set_link", rtt_ms=30)
            assert ping(sock) >= 0.03
            relay.tell("set_rate", gbps=0.5, direction="up")
            status = relay.tell("status")
            assert (status["connections"], status["up"]["gbps"], status["down"]["gbps"]) == (1, 0.5, None)
            assert status["down"] == {"passed": 2, "held": 0, "gbps": None, "stalled": False}
            relay.tell("flip_byte_after", nbytes=[0])
            sock.sendall(b"p")
            assert sock.recv(1) != b"p"
            relay.tell("black_hole", direction="down")
            assert relay.tell("status")["down"]["stalled"]
            relay.tell("resume")
            with pytest.raises(InvalidInput, match="gbps=-1: expected a positive number"):
                relay.tell("set_rate", gbps=-1)
            started = time.monotonic()
            relay.tell("reset", after_s=0.2)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            assert time.monotonic() - started >= 0.19


def test_a_relay_that_cannot_start_says_why_and_one_that_is_gone_is_an_error():
    with pytest.raises(LaunchFailed, match="gbps=-1"), RelayProcess("127.0.0.1:9", gbps=-1):
        pass
    with RelayProcess("127.0.0.1:9") as relay:
        os.kill(relay.pid, signal.SIGKILL)
        with pytest.raises(ChildFailed, match="relay"):
            relay.tell("status")


def test_flags_set_every_fault():
    nbytes = 50_000
    with Target(nbytes) as target:
        with RelayProcess(target.address, gbps_down=0.004, rtt_ms=20, jitter_ms=1, step="0.1:1") as relay, join(relay.address) as sock:
            status = relay.tell("status")
            started = time.monotonic()
            assert read_all(sock) == pattern(nbytes)
            assert status["up"]["gbps"] is None and time.monotonic() - started < 0.5
        with RelayProcess(target.address, flip_byte_after=10, half_close_after=20_000) as relay, join(relay.address) as sock:
            seen = read_all(sock)
            assert len(seen) == 20_000 and [i for i in range(20_000) if seen[i] != pattern(nbytes)[i]] == [10]
        with RelayProcess(target.address, reset_after=20_000) as relay:
            with pytest.raises(ConnectionResetError), join(relay.address) as sock:
                read_all(sock)
            assert relay.tell("status")["down"]["passed"] == 20_000
        with RelayProcess(target.address, flips_per_gb=1e9) as relay, join(relay.address) as sock:
            assert all(a != b for a, b in zip(read_all(sock), pattern(nbytes), strict=True))
        with RelayProcess(target.address, slice_bytes=5000, slice_pause_ms=20) as relay, join(relay.address) as sock:
            started = time.monotonic()
            assert read_all(sock) == pattern(nbytes)
            assert time.monotonic() - started > 0.15
        with RelayProcess(target.address, black_hole_after=1000, black_hole_s=0.3) as relay, join(relay.address) as sock:
            started = time.monotonic()
            assert read_all(sock) == pattern(nbytes)
            assert time.monotonic() - started > 0.25
        with RelayProcess(target.address, paused=True, command='{"command": "resume", "after_s": 0.3}') as relay:
            assert relay.tell("status")["up"]["stalled"]
            with join(relay.address) as sock:
                assert read_all(sock) == pattern(nbytes)


@pytest.mark.parametrize(
    ("flag", "field"),
    [("--step=soon", "step"), ("--step=1:fast", "step"), ("--black_hole_s=1", "black_hole_s"), ("--command={}", "command")],
)
def test_a_bad_flag_is_named(flag, field):
    command = [sys.executable, "-m", "prfaas_jax.testing.relay", "--target=127.0.0.1:9", flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode != 0 and f"{field}=" in done.stdout + done.stderr


def test_command_line_prints_its_port_and_what_it_cannot_show_and_stops_on_sigterm():
    with Target(echo=True) as target:
        command = [sys.executable, "-m", "prfaas_jax.testing.relay", f"--target={target.address}", "--gbps=1", "--rtt_ms=4"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                line = json.loads(process.stdout.readline())
                # The end of stdin alone does not stop it.
                with join(line["address"]) as sock:
                    assert ping(sock) >= 0.004
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
                assert process.stderr.read().count("ends TCP on both sides") == 1
            finally:
                process.kill()


def test_a_line_that_is_too_long_is_refused_and_the_next_one_is_obeyed():
    command = [sys.executable, "-m", "prfaas_jax.testing.relay", "--target=127.0.0.1:9", "--until_eof"]
    lines = b'{"command": "' + b"x" * 200_000 + b'"}\n{"command": "pause"}\n'
    done = subprocess.run(command, input=lines, capture_output=True, timeout=60)
    refused, obeyed = [json.loads(line) for line in done.stdout.splitlines()[1:]]
    assert done.returncode == 0 and refused["field"] == "line" and obeyed == {"ok": True}

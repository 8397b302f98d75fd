"""The run_cluster command: what it prints and leaves, and how it ends: by a signal, by a process that dies, by bad input."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from prfaas_jax.serving.deployment import read_servers
from prfaas_jax.testing.demo import ask, token_prompt

ROOT = Path(__file__).resolve().parents[2]
READY_S = 120.0
# Profiled engines compile nothing.
CONFIG = "--config=configs/clusters/paper_profiled_small.py"


def start(workdir: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "experiments.run_cluster", CONFIG, f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def running(workdir: Path, *flags: str):
    """(process, its lines up to READY, its children); it is gone when the block is left."""
    process = start(workdir, *flags)
    try:
        lines = []
        while not lines or not lines[-1].startswith("READY "):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        yield process, lines, children(process)
    finally:
        process.kill()
        process.communicate()


def children(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes) -> bool:
    return psutil.wait_procs(processes, timeout=30)[1] == []


def listening(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def test_it_says_where_everything_is_and_ends_at_sigterm(tmp_path):
    with running(tmp_path, '--config.links["far->pd"].gbps=4', "--config.policy=always_remote") as (process, lines, started):
        ready = json.loads(lines[-1].removeprefix("READY "))
        assert sorted(ready["servers"]) == ["far/0", "near/0", "pd/decode/0", "pd/prefill/0", "router"]
        table = {line.split()[0]: line.split() for line in lines[:-1]}
        assert all(table[name][1] == address for name, address in ready["servers"].items())
        assert any("kernel loss" in line for line in lines)
        # 4 Gbit/s, twice as fast, a fiftieth of the bytes.
        assert next(line for line in lines if line.startswith("link far->pd:")).split()[2].startswith("0.1")
        with urllib.request.urlopen(f"http://{ready['metrics']['router']}/metrics", timeout=30) as answer:
            assert answer.status == 200
        usage = ask(ready["router"], token_prompt([1] * 3000, 3), lambda text: None, 60).usage
        assert usage.prefill_cluster in ("far", "near") and usage.kv_bytes_moved == usage.kv_bytes_expected > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert gone(started) and not [a for a in ready["servers"].values() if listening(a)]
    names = {"config.json", "env.json", "servers.json", "deployment.json", "router.log"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "config.json").read_text())["links"]["far->pd"]["gbps"] == 4.0
    assert [c.name for c in read_servers(tmp_path / "servers.json")] == ["far", "near", "pd"]


def test_ctrl_c_while_it_starts_leaves_nothing(tmp_path):
    process = start(tmp_path)
    deadline = time.monotonic() + READY_S
    while len(started := children(process)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "interrupted" in said and "Traceback" not in said
    assert gone(started)


def test_a_process_that_dies_ends_all_and_is_named(tmp_path):
    with running(tmp_path) as (process, _, started):
        victim = next(child for child in started if "--prefill=2" in child.cmdline())
        victim.kill()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"error: far/0 ended with code -9; its log {tmp_path / 'far' / '0.log'} ends with" in said and "Traceback" not in said
        assert gone(started)


def test_or_is_started_again_where_it_was(tmp_path):
    with running(tmp_path, "--restart") as (process, lines, started):
        router = json.loads(lines[-1].removeprefix("READY "))["router"]
        victim = next(child for child in started if "experiments.serve_router" in child.cmdline())
        victim.kill()
        victim.wait(30)
        deadline = time.monotonic() + READY_S
        while not listening(router):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        usage = ask(router, token_prompt([1] * 300, 2), lambda text: None, 60).usage
        assert usage.output_tokens == 2
        started += children(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and gone(started)
    assert (tmp_path / "router.1.log").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.policy=best", "config.policy='best': expected one of always_local"),
        ("--config.clusters.pd.decode=0", "config.clusters.pd.decode=0"),
        ('--config.links["far->pd"].gbps=0', 'config.links["far->pd"].gbps=0'),
        ("--config.security.tls_ca=/nowhere.crt", "config.security.tls_cert"),
    ],
)
def test_bad_input_is_named_before_anything_starts(tmp_path, flag, message):
    process = start(tmp_path / "run", flag)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()

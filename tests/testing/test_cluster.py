"""The demo's cluster, small: real processes, a WAN in between, and nothing left when the block is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import psutil
import pytest

from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.serving.launcher import LaunchFailed
from prfaas_jax.serving.pair import GenerateFailed
from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc
from prfaas_jax.testing import demo
from prfaas_jax.testing.certificates import CertificateOptions, make_certificates
from prfaas_jax.testing.cluster import Cluster, ClusterOptions, LinkTrace
from prfaas_jax.testing.live_cluster import phase

ENGINE = EngineOptions("random:qwen3_toy", dtype="float32", chunk=64, max_length=256, max_rows=8, max_prefill_rows=1, page_size=16)


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def ask(address: str, length: int) -> generation_pb2.Usage:
    request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=range(1, length + 1)), max_new_tokens=3)
    with grpc.insecure_channel(address) as channel:
        *tokens, last = generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=60)
    assert len(tokens) == 3
    return last.usage


@pytest.mark.smoke
def test_long_prompts_cross_the_link_and_short_ones_do_not(tmp_path):
    before = children()
    with Cluster(ClusterOptions(ENGINE, ENGINE, threshold_tokens=100, rtt_ms=4.0), tmp_path) as cluster:
        assert cluster.startup() == "far/0: ready, home/decode/0: ready, router: ready"
        with LinkTrace(cluster.lane) as trace:
            assert ask(cluster.address, 100).placement == "local"
            assert trace.passed < 1000
            usage = ask(cluster.address, 101)
        assert (usage.placement, usage.kv_bytes_moved, usage.tokens_recomputed) == ("remote", usage.kv_bytes_expected, 0)
        assert usage.prefill_address == cluster.control.address
        # The bytes themselves, their headers, and pings now and then.
        assert usage.kv_bytes_moved < trace.passed < 1.05 * usage.kv_bytes_moved
        assert cluster.decode_status().engine.tokens_prefilled == 100
        assert cluster.prefill_status().engine.tokens_prefilled == 101
    assert children() <= before


def test_the_same_over_tls_with_a_token(tmp_path):
    certificates = CertificateOptions(str(tmp_path / "certs"))
    make_certificates(certificates)
    security = certificates.security("client")
    options = ClusterOptions(ENGINE, ENGINE, threshold_tokens=100, rtt_ms=4.0, security=security)
    with Cluster(options, tmp_path) as cluster:
        with LinkTrace(cluster.lane) as trace:
            usage = demo.ask(cluster.address, demo.token_prompt(range(1, 102), 3), lambda text: None, 60, security).usage
        assert (usage.placement, usage.kv_bytes_moved, usage.tokens_recomputed) == ("remote", usage.kv_bytes_expected, 0)
        assert usage.kv_bytes_moved < trace.passed < 1.1 * usage.kv_bytes_moved
        assert cluster.prefill_status().engine.tokens_prefilled == 101
        with pytest.raises(GenerateFailed, match="UNAVAILABLE"):
            demo.ask(cluster.address, demo.token_prompt([1], 3), lambda text: None, 60)


def test_a_server_that_does_not_start_ends_all_and_says_why(tmp_path):
    before = children()  # a pool of processes that another test used leaves its resource tracker running
    bad = EngineOptions("random:no_such_model", max_length=256)
    cluster = Cluster(ClusterOptions(ENGINE, bad, threshold_tokens=100), tmp_path)
    with pytest.raises(LaunchFailed, match=r"(?s)home/decode/0 ended with code 2.*no_such_model"), cluster:
        pass
    assert children() <= before


def test_the_phase_is_read_from_the_last_progress_bar():
    log = "I1 starting\rloading weights:  10%|#   | 3/30 [00:01]\ncompiling Toy:   0%|   | 0/2 [00:00]\r"
    log += "compiling Toy:  50%|#####     | 1/2 [00:03<00:03]"
    assert phase(log) == "compiling Toy 1/2"
    assert phase("I1 starting: 5 things\n") == ""


def test_ctrl_c_while_servers_start_leaves_no_process(tmp_path):
    code = (
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from test_cluster import ENGINE, Cluster, ClusterOptions\n"
        "with Cluster(ClusterOptions(ENGINE, ENGINE, 100), pathlib.Path(sys.argv[1])): pass\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(started := psutil.Process(parent.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60) != 0
    assert psutil.wait_procs(started, timeout=10)[1] == []

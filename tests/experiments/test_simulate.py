"""The simulate command: the same bits for the same seed, documented files and headline, bad input refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT.parent / "shared" / "traces" / "mooncake_conversation_trace.jsonl.gz"


def simulate(workdir, *flags):
    command = [sys.executable, "-m", "experiments.simulate", f"--workdir={workdir}", *flags]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)


def test_files_headline_and_the_same_bits_again(tmp_path):
    flags = ("--config.requests=300", "--seeds=2", "--config.policy=shadow_price")
    done = [simulate(tmp_path / name, *flags) for name in ("a", "b")]
    assert all(d.returncode == 0 for d in done), done[0].stderr[-2000:]
    found = json.loads(done[0].stdout.splitlines()[-1])
    assert {"requests_per_s", "ttft_p50_s", "ttft_p90_s", "goodput_rps", "slo_share", "half_width"} <= set(found)
    assert found["requests"] == 2 * 285  # a twentieth is warm-up
    names = {"config.json", "env.json", "requests.csv", "usage.csv", "trace.json", "summary.json", "figure.png"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    for name in ("requests.csv", "usage.csv", "trace.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.policy=best", "config.policy='best': expected one of always_local"),
        ("--config.workload.arrivals=steady", "config.workload.arrivals='steady': expected poisson, gamma or bursty"),
        ("--config.n_pd=0", "config.n_pd=0"),
        ("--config.trace=/nowhere.jsonl", "/nowhere.jsonl"),
        ("--config.sim.prefill_chunk=100", "prefill_chunk=100: expected a positive multiple of 64"),
    ],
)
def test_bad_input_is_named_before_any_work(tmp_path, flag, message):
    done = simulate(tmp_path / "run", flag)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not TRACE.exists(), reason="the conversation trace is not here")
def test_a_trace_runs_with_prefix_caches(tmp_path):
    done = simulate(tmp_path, f"--config.trace={TRACE}", "--config.requests=400", "--config.sim.decode_cache_bytes=4e12")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["requests"] == 380 and found["cached_share"] > 0.02

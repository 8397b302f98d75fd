"""`experiments.plan` from the shell: the paper's case, overrides, files, refusals, and no accelerator stack."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = {
    *("threshold", "n_prefill_local", "n_decode", "lambda_max", "gain_over_homogeneous", "gain_over_naive", "gain_over_length_blind"),
    *("gain_over_equal_cost", "egress_gbps", "bottleneck", "cheapest", "worth_it"),
}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def plan(*flags: str) -> tuple[dict, str]:
    done = run("--workdir=", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_the_paper_case_without_jax(tmp_path):
    workdir = tmp_path / "run"
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = ['plan', '--config=configs/studies/paper_case.py', '--workdir={workdir}']\n"
        "try:\n"
        "    runpy.run_module('experiments.plan', run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    assert not error.code, error.code\n"
        "print(json.dumps([m for m in ('jax', 'jaxlib', 'flax') if m in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *text, headline, loaded = done.stdout.splitlines()
    assert json.loads(loaded) == []
    result = json.loads(headline)
    assert set(result) == KEYS
    assert abs(result["threshold"] - 19_400) <= 100 and (result["n_prefill_local"], result["n_decode"]) == (3, 5)
    assert result["lambda_max"] == pytest.approx(3.24, rel=0.01)
    assert result["gain_over_homogeneous"] == pytest.approx(1.54, rel=0.01)
    assert result["gain_over_equal_cost"] == pytest.approx(1.15, rel=0.01)
    assert result["gain_over_length_blind"] == pytest.approx(3.25 / 3.16, rel=0.01)
    assert result["egress_gbps"] == pytest.approx(13, rel=0.06)
    assert (result["bottleneck"], result["worth_it"], result["cheapest"]) == ("prfaas_compute", True, None)
    assert any(line.startswith("yes: 1.16x") for line in text)

    names = ["config.json", "env.json", "figure.png", "links.csv", "phases.csv", "summary.json", "systems.csv", "thresholds.csv"]
    assert sorted(path.name for path in workdir.iterdir()) == names
    summary = json.loads((workdir / "summary.json").read_text())
    assert {key: summary[key] for key in KEYS} == result and len(summary["one_more"]) == 3
    assert json.loads((workdir / "config.json").read_text())["link_gbps"] == 100.0
    with (workdir / "phases.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["threshold"]) == result["threshold"]
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_narrow_link_and_a_bound_profile(tmp_path):
    result, text = plan("--config.link_gbps=8", "--config.reading=exact")
    assert result["bottleneck"] == "egress" and result["egress_gbps"] == pytest.approx(8) and not result["worth_it"]
    assert "the link of 8 Gbit/s costs throughput" in text
    compiled = {"target": "gpu:h200:1x1x8", "chips": 8, "model": "paper_1t"}
    compiled |= {"prefill": {"tokens": 8192, "roofline_s": 0.1}, "decode": {"rows": 32, "roofline_s": 0.01}}
    (tmp_path / "summary.json").write_text(json.dumps(compiled))
    (tmp_path / "config.json").write_text(json.dumps({"context": 131_072}))
    profile = f"--config.prfaas_profile={tmp_path}/summary.json"
    result, text = plan(profile, "--config.efficiency=0.5", "--config.prfaas_cost=4")
    assert "(bound)" in text and result["gain_over_equal_cost"] > 0 and "cost              24 per hour" in text
    done = run("--workdir=", profile)
    assert done.returncode == 2 and "compiled, not run" in done.stderr


def test_the_cheapest_system_for_a_rate():
    result, text = plan("--config.rate=2.5")
    roles = {"n_prfaas": 3, "n_prefill_local": 3, "n_decode": 4}
    assert result["cheapest"] == roles | {"cost_per_hour": 13.0, "lambda_max": pytest.approx(2.576, abs=1e-3)}
    assert "\ncheapest          3 PrfaaS + 3 / 4 for 2.5 requests/s: 13 per hour, sustains 2.576" in text


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--config.rate=9.9"], "none of up to 8 PrfaaS and 16 PD instances sustains 9.9 requests/s"),
        (["--config.rate=2.5", "--config.n_pd=40"], "not searched: up to 8 PrfaaS and 80 PD instances make more than 256"),
    ],
)
def test_no_cheapest_system(flags, line):
    result, text = plan(*flags)
    assert result["cheapest"] is None and f"\ncheapest          {line}" in text


def test_a_trace(tmp_path):
    """Prefixes count only where the PD cluster has a cache."""
    path = tmp_path / "trace.jsonl.gz"
    rows = [
        {"timestamp": 1000 * i, "input_length": 512 * 40, "output_length": 500, "hash_ids": [*range(30), *range(30 + 10 * i, 40 + 10 * i)]}
        for i in range(50)
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    cold, _ = plan(f"--config.trace={path}")
    warm, text = plan(f"--config.trace={path}", "--config.sim.decode_cache_bytes=1e12")
    assert warm["lambda_max"] > 1.3 * cold["lambda_max"] and "% of them held by the PD cluster" in text


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.link_gbps=-3", "error: config.link_gbps=-3.0: expected finite Gbit/s above zero"),
        ("--config.trace=none.jsonl", "error: trace.path='none.jsonl': expected a file that exists"),
        ("--config.workload.high=200000", "error: tokens="),
        ("--workdir=pyproject.toml", "error: workdir='pyproject.toml': expected a folder"),
    ],
)
def test_bad_flags_are_refused(flag, message):
    done = run("--workdir=", flag)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(message)
    assert not [line for line in done.stdout.splitlines() if line.startswith("{")]

"""The command on a toy, its bars, and (slow) that int8 holds them on real weights."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prfaas_jax.models import smollm2
from prfaas_jax.testing.codec_report import violations

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "experiments.codec_quality", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_a_toy_gives_a_row_per_codec_a_picture_and_the_windows_behind_them(tmp_path):
    done = run("--models=qwen3_toy", "--random_tokens=33", "--prefix=24", "--scored=16", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {row["codec"]: row for row in result["rows"]}
    assert list(rows) == ["none", "paged=int8", "paged=fp8", "zstd", "zstd of bfloat16"] and result["passed"]
    assert all(row["tokens"] == 48 and row["perplexity"] is None for row in rows.values())
    for exact in ("none", "zstd"):
        assert rows[exact]["kl"] == rows[exact]["max_logit_error"] == 0 and rows[exact]["top1_agreement"] == 1
    assert rows["paged=int8"]["kl"] > 0 and rows["paged=int8"]["ratio"] == pytest.approx(16 * 4 / 18)
    assert rows["paged=int8"]["break_even_gbps"] < rows["paged=int8"]["break_even_overlapped_gbps"]
    files = {"config.json", "env.json", "figure.png", "rows.json", "summary.json", "windows_qwen3_toy.csv"}
    assert {p.name for p in tmp_path.iterdir()} == files
    with (tmp_path / "windows_qwen3_toy.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 2
    assert "qwen3_toy" in done.stderr and "paged=fp8" in done.stderr, "the table"


def test_the_bars_are_judged_by_the_far_end_of_the_interval():
    good = {"low": -0.001, "high": 0.004, "ratio_bf16": 1.94}
    assert violations(good) == []
    assert len(violations(good | {"high": 0.005})) == 1
    assert len(violations(good | {"low": -0.006})) == 1
    assert len(violations(good | {"high": 0.01, "ratio_bf16": 1.8})) == 2


@pytest.mark.slow
def test_int8_holds_on_real_weights():
    try:
        smollm2.fetch()
    except smollm2.DownloadError as error:
        pytest.skip(str(error))
    done = run("--models=smollm2_135m", "--tokens=2048", "--scored=256", "--prefix=256")
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and result["passed"], done.stderr
    (int8,) = [row for row in result["rows"] if row["codec"] == "paged=int8"]
    assert int8["tokens"] == 2048 and 10 < int8["perplexity"] < 60 and int8["top1_agreement"] > 0.98


@pytest.mark.slow
def test_more_tokens_than_the_text_has_are_refused():
    done = run("--models=smollm2_135m", "--tokens=100000")
    assert done.returncode != 0 and "tokens=100000: expected at most 31488" in done.stderr

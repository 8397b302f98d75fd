"""The fault_drill command: a real deployment is broken under load, and what it prints and leaves."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(workdir: Path, *flags: str, timeout: float) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "experiments.fault_drill", f"--workdir={workdir}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def check(done, workdir: Path) -> tuple[dict, list[dict]]:
    """The headline and the rows of faults.csv of a run in which nothing was lost."""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["wrong_tokens"], result["leaked_pages"], result["hung_requests"], result["broken"]) == (0, 0, 0, 0)
    assert result == json.loads((workdir / "summary.json").read_text())
    assert {"config.json", "env.json", "requests.csv", "faults.csv", "figure.png", "router.log"} <= {
        path.name for path in workdir.iterdir()
    }
    with (workdir / "faults.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["faults"]
    return result, rows


def test_the_list_of_faults_starts_nothing(tmp_path):
    done = run(tmp_path / "run", "--list", "--only=^kill home/decode", timeout=60)
    names = [f"kill home/decode/{server} {phase}" for server, phase in ((0, "before"), (1, "during"), (0, "after"))]
    assert done.returncode == 0 and done.stdout.splitlines() == names
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--only=earthquake", "only='earthquake'"),
        ("--config.clusters.home.decode=1", "two decode servers"),
    ],
)
def test_bad_input_is_named_before_anything_starts(tmp_path, flag, message):
    done = run(tmp_path / "run", flag, timeout=60)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_faults_cost_latency_only(tmp_path):
    done = run(tmp_path, "--only=kill home/decode/1 during|freeze alpha/0 during", "--requests=4", timeout=280)
    result, rows = check(done, tmp_path)
    assert result["faults"] == 2 and result["worst_detection_s"] < 5
    moved = {row["fault"]: row["outcomes"] for row in rows}
    assert "restarted" in moved["kill home/decode/1 during"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_drill(tmp_path):
    result, rows = check(run(tmp_path, timeout=1700), tmp_path)
    assert result["faults"] == len({row["fault"] for row in rows}) > 50

"""`experiments.compare_policies` and `experiments.bench_decision` from the shell, as small as they go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prfaas_jax.simulation.contenders import CONTENDERS

ROOT = Path(__file__).parents[2]
# Two cells instead of the suite's four; mutated before the command's flags are defined.
CODE = (
    "import runpy, sys\n"
    "from configs.studies import contest\n"
    "contest.SUITES['smoke'] = (('12',), ('bursts', 'sessions'))\n"
    "runpy.run_module('experiments.compare_policies', run_name='__main__')\n"
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=ROOT)


def compare(*flags: str) -> subprocess.CompletedProcess[str]:
    return run("-c", CODE, "--requests=100", "--points=1", *flags)


def test_a_small_contest_leaves_cells_summary_and_picture(tmp_path):
    done = compare("--seeds=2", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    *text, headline = done.stdout.splitlines()
    result = json.loads(headline)
    counts = {"tuning_seeds": 1, "seeds": 2, "requests": 100}
    assert set(result) == {"cells", "ours_vs_best_static_min", "ours_ahead_share", "held_out", "behind", *counts}
    assert result.items() >= counts.items()
    assert result["cells"] == 2 and 0 <= result["ours_ahead_share"] <= 1 and result["held_out"] == ["12/bursts", "12/sessions"]
    assert any(line.startswith("12/bursts* !") for line in text) and sum(line.startswith("12/sessions* !") for line in text) == 3
    assert any("same money" in line for line in text) and any("largest share" in line for line in text)

    names = ["cells.json", "config.json", "env.json", "figure.png", "summary.json", "tables.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "tables.txt").read_text().splitlines() == text
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [cell["cell"] for cell in cells] == ["12/bursts", "12/sessions"] and all(cell["hard"] for cell in cells)
    assert set(cells[0]["policies"]) == set(CONTENDERS) - {"paper_prefix"} and set(cells[1]["policies"]) == set(CONTENDERS)
    assert min(cell["vs_best"]["mean"] for cell in cells) == result["ours_vs_best_static_min"]
    assert all(cell[field]["half_width"] >= 0 for cell in cells for field in ("vs_best", "share_vs_best", "roles_vs_ours"))
    assert result["behind"] == [cell["cell"] for cell in cells if cell["behind"]]
    assert json.loads((tmp_path / "summary.json").read_text())["cells"] == 2
    assert json.loads((tmp_path / "config.json").read_text())["contest"]["requests"] == 100


def test_one_seed_has_no_interval(tmp_path):
    done = compare("--seeds=1", "--only=*/bursts", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert all("half_width" not in cell[field] for cell in cells for field in ("vs_paper", "share_vs_best", "roles_vs_ours"))
    assert [cell["cell"] for cell in cells] == ["12/bursts"]
    assert not any(cell["ahead"] for cell in cells), "without an interval nobody is ahead"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--only=9/*", "error: only='9/*': expected cells of the suite: 12/bursts, 12/sessions"),
        ("--config.n_pd=0", "error: config.n_pd=0"),
        ("--config.load=0.0", "error: "),
        ("--config.sim.slo_scale=0.0", "error: slo_scale=0.0"),
        ("--config=configs/studies/paper_case.py", "error: config='a study without outage_at, outage_s, sessions'"),
    ],
)
def test_bad_flags_are_refused(flag, message, tmp_path):
    done = compare(flag, f"--workdir={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(message)


def test_decisions_are_timed_for_every_policy():
    done = run("-m", "experiments.bench_decision", "--clusters=3", "--regions=1,2", "--batches=1", "--decisions=4", "--limit_us=1e6")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["passed"] is True and set(result["microseconds"]) == set(CONTENDERS) - {"paper_controlled", "shadow_price_roles"}
    assert all(us > 0 for us in result["microseconds"].values())
    slow = run("-m", "experiments.bench_decision", "--clusters=3", "--regions=1", "--batches=1", "--decisions=4", "--limit_us=0")
    assert slow.returncode == 1 and json.loads(slow.stdout.splitlines()[-1])["passed"] is False

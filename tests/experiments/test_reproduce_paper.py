"""`experiments.reproduce_paper` from the shell, and that its checks can fail."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prfaas_jax.testing import paper, paper_queues
from prfaas_jax.testing.paper import Check

ROOT = Path(__file__).parents[2]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.reproduce_paper", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)


def test_every_printed_number(tmp_path):
    sections = "table1,table3,table5,table6,figure2,figure4,figure5,sizing,beyond"
    done = run(f"--only={sections}", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    *text, headline = done.stdout.splitlines()
    expected = {"checks": 91, "by_kind": {"printed": 13, "circular": 60, "extension": 18}, "failed": []}
    assert json.loads(headline) == expected
    assert not [line for line in text if "FAIL" in line] and sum("PASS" in line for line in text) == 91
    with (tmp_path / "checks.csv").open() as file:
        checks = list(csv.DictReader(file))
    assert {c["section"] for c in checks} == {"table1", "table3", "table5", "table6", "sizing", "beyond"}
    kinds = {name: {c["kind"] for c in checks if c["section"] == name} for name in ("table3", "table5", "sizing")}
    assert kinds == {name: {"circular"} for name in ("table3", "table5", "sizing")}, "made of the very numbers"
    independent = [c["what"] for c in checks if c["section"] == "table6" and c["kind"] == "printed"]
    assert len(independent) == 7 and "threshold, tokens" in independent
    assert sum(" printed " in line or " circular " in line or " extension " in line for line in text if "PASS" in line) == 91
    loose = [c["what"] for c in checks if float(c["tolerance"]) > 0.01]
    assert all(what.startswith(("T_prefill", "Phi_kv", "egress")) for what in loose)
    egress = next(c for c in checks if c["what"] == "egress, Gbps")
    assert float(egress["error"]) == pytest.approx(-0.047, abs=0.002) and egress["because"]
    for name in ("figure2", "figure4", "figure5"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "figure5.csv").open() as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["lambda_max"]))
    assert int(best["n_p"]) == 3 and abs(float(best["t"]) - 19_400) <= 500
    assert json.loads((tmp_path / "summary.json").read_text()) == expected


def test_queues_of_a_few_requests(tmp_path):
    """Too few for the tail near saturation: only that they run, say so and fail honestly."""
    done = run("--only=queues", "--requests=300", "--seeds=1", f"--workdir={tmp_path}")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["checks"] == result["by_kind"]["extension"] == 6 and done.returncode == bool(result["failed"])
    with (tmp_path / "queues.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and all(float(row["ttft_p90_s"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"), [("--only=table2", "error: only=['table2']"), ("--workdir=pyproject.toml", "error: workdir=")]
)
def test_bad_flags_are_refused(flags, message):
    done = run(flags)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    ("check", "ok"),
    [
        (Check("s", "printed", "w", 100.0, 100.9), True),
        (Check("s", "printed", "w", 100.0, 101.1), False),
        (Check("s", "printed", "w", 100.0, 98.9), False),
        (Check("s", "printed", "w", 100.0, 104.0, absolute=5.0), True),
        (Check("s", "printed", "w", 100.0, 100.1, 0.0), False),
        (Check("s", "printed", "w", 0.0, 0.0, 0.0), True),
        (Check("s", "printed", "w", 100.0, float("nan")), False),
        (Check("s", "printed", "w", "3 / 5", "3 / 5"), True),
        (Check("s", "printed", "w", "3 / 5", "4 / 4"), False),
    ],
)
def test_checks_can_fail(check, ok):
    assert check.ok == ok


def test_another_profile_does_not_pass():
    """The checks see a profile that is 5 % slower, a model with another state, a link that binds."""
    from experiments.reproduce_paper import read_paper

    good = read_paper()
    slower = dataclasses.replace(good.case.prfaas, prefill=dataclasses.replace(good.case.prfaas.prefill, linear_s=0.45))
    wider = dataclasses.replace(good.case.kv, state_bytes=good.case.kv.state_bytes * 2)
    for case, section in (
        (dataclasses.replace(good.case, prfaas=slower), paper.table5),
        (dataclasses.replace(good.case, prfaas=slower), paper.table6),
        (dataclasses.replace(good.case, kv=wider), paper.table5),
        (dataclasses.replace(good.case, b_out=good.case.b_out / 12), paper.table6),
    ):
        assert not all(check.ok for check in section(dataclasses.replace(good, case=case)))
    assert all(check.ok for check in paper.table6(good))


def test_queue_figures_are_means_over_seeds():
    queues = [paper_queues.Queue("naive", 0.7, seed, 1.0, 2.0, p90) for seed, p90 in ((0, 4.0), (1, 5.0))]
    assert paper_queues.p90_s(queues, "naive", 0.7) == 4.5

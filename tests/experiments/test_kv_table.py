"""`experiments.kv_table` from the shell: table, files, headline, refusals, and no accelerator stack."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.models import available_models, load_model_config
from prfaas_jax.kvcache.spec import cache_spec

ROOT = Path(__file__).parents[2]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.kv_table", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_all_models_without_jax(tmp_path):
    """The whole run, figure included, in an interpreter that is asked afterwards what it has loaded."""
    workdir = tmp_path / "run"
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = ['kv_table', '--workdir={workdir}']\n"
        "try:\n"
        "    runpy.run_module('experiments.kv_table', run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    assert not error.code, error.code\n"
        "print(json.dumps([m for m in ('jax', 'jaxlib', 'flax') if m in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *table, headline, loaded = done.stdout.splitlines()
    assert json.loads(loaded) == []

    models = json.loads(headline)["models"]
    assert set(models) == set(available_models())
    assert models["paper_1t"] == {"fixed_bytes": 182_353_920, "bytes_per_token": 17_280}
    for name, size in models.items():
        spec = cache_spec(load_model_config(name))
        assert size == {"fixed_bytes": spec.fixed_bytes, "bytes_per_token": spec.bytes_per_token}
    paper = next(line for line in table if line.startswith("paper_1t "))
    assert [cell for cell in paper.split() if "." in cell and "x" not in cell] == ["190.78", "308.91", "701.25", "2,316.24"]

    assert sorted(path.name for path in workdir.iterdir()) == ["config.json", "env.json", "figure.png", "sizes.csv", "summary.json"]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary == {"lengths": [1024, 8192, 32_000, 130_000], "models": models}
    assert json.loads((workdir / "env.json").read_text())["devices"] is None
    with (workdir / "sizes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(models)
    assert {int(row["bytes"]) for row in rows if row["model"] == "kimi_linear_48b"} == {
        43_417_600 + 8064 * n for n in (1024, 8192, 32_000, 130_000)
    }
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_models_and_lengths_of_ones_own(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        "from configs.models.kimi_linear_toy import get_config as base\n"
        "def get_config():\n    config = base()\n    config.name = 'mine'\n    config.dtype = 'bfloat16'\n    return config\n"
    )
    done = run(f"--models={config},kimi_linear_toy", "--lengths=1,7")
    assert done.returncode == 0, done.stderr
    # Half the elements' size, but for the five states of 4 heads of 16 x 16, which stay float32.
    states, toy = 5 * 4 * 16 * 16 * 4, cache_spec(load_model_config("kimi_linear_toy"))
    assert json.loads(done.stdout.splitlines()[-1])["models"] == {
        "kimi_linear_toy": {"fixed_bytes": toy.fixed_bytes, "bytes_per_token": toy.bytes_per_token},
        "mine": {"fixed_bytes": states + (toy.fixed_bytes - states) // 2, "bytes_per_token": toy.bytes_per_token // 2},
    }
    assert "1 tokens" in done.stdout and "7 tokens" in done.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lengths=1024,8k", "error: lengths='1024,8k': expected whole numbers of tokens"),
        ("--lengths=8,8", "error: lengths=[8, 8]: expected"),
        ("--models=paper_2t", "error: model='paper_2t': expected a file with get_config() or one of"),
        ("--models=paper_1t,paper_1t", "error: models='paper_1t': expected each model once"),
        ("--workdir=pyproject.toml", "error: workdir='pyproject.toml': expected a folder"),
    ],
)
def test_bad_flags_are_refused(flag, message):
    done = run(flag)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(message)

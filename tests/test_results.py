import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, environment, headline, to_json, write_env


@dataclasses.dataclass
class Point:
    x: int
    y: float


def test_headline_is_one_json_line_on_stdout(capsys):
    print("earlier output")
    headline({"moved": np.int64(3), "ttft_s": np.float32(0.5), "parts": {"queue": 0.1}, "tokens": np.arange(3), "where": Path("a/b")})
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"moved": 3, "ttft_s": 0.5, "parts": {"queue": 0.1}, "tokens": [0, 1, 2], "where": "a/b"}
    assert list(json.loads(last)) == ["moved", "ttft_s", "parts", "tokens", "where"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), np.array([1.0, np.nan]), object(), {1, 2}])
def test_headline_refuses_what_is_no_result(bad, capsys):
    with pytest.raises(InvalidInput, match="result"):
        headline({"nested": [{"value": bad}]})
    assert capsys.readouterr().out == ""


def test_headline_survives_a_pipe():
    """Flushed before the process dies without cleaning up."""
    code = "import os; from prfaas_jax.results import headline; headline({'a': 1}); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == {"a": 1}


def test_dataclasses_and_config_dicts_have_a_json_form():
    assert json.loads(to_json({"p": Point(1, 2.5), "c": ConfigDict({"a": {"b": 1}})})) == {"p": {"x": 1, "y": 2.5}, "c": {"a": {"b": 1}}}


def test_environment_without_jax_starts_no_jax(tmp_path):
    code = (
        "import json, sys; from prfaas_jax.results import environment; e = environment();"
        "assert 'jax' not in sys.modules; assert e['devices'] is None; print(json.dumps(e))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    env = json.loads(done.stdout)
    assert env["packages"]["jax"] and env["cpu"]["cores"] >= 1 and env["cpu"]["model"]
    assert env["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("program", "recorded"),
    [(Path(__file__).parents[1] / "experiments" / "plan.py", "experiments/plan.py"), ("/elsewhere/run.py", "/elsewhere/run.py")],
)
def test_the_command_names_programs_of_this_checkout_from_its_top(program, recorded, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(program), "--seed=1"])
    assert environment()["command"] == [recorded, "--seed=1"]


def test_environment_with_jax_names_devices(monkeypatch):
    import jax

    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    env = environment()
    assert [d["id"] for d in env["devices"]] == [d.id for d in jax.devices()]
    assert env["environment"]["JAX_PLATFORMS"] == os.environ["JAX_PLATFORMS"] and "XLA_FLAGS" in env["environment"]
    assert "PATH" not in env["environment"]


def test_write_env(tmp_path):
    assert json.loads(write_env(tmp_path).read_text())["platform"]


def test_workdir_holds_a_run(tmp_path):
    work = Workdir(tmp_path / "new" / "run")
    work.write_config(ConfigDict({"seed": 1}))
    work.write_requests([{"id": 0, "ttft_s": 0.25}, {"id": 1, "error": "a, b"}])
    work.write_env()
    work.write_summary({"n": 2})
    assert sorted(p.name for p in work.path.iterdir()) == ["config.json", "env.json", "requests.csv", "summary.json"]
    assert json.loads((work.path / "config.json").read_text()) == {"seed": 1}
    with (work.path / "requests.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"id": "0", "ttft_s": "0.25", "error": ""}, {"id": "1", "ttft_s": "", "error": "a, b"}]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    work = Workdir(tmp_path)
    work.write_json("a.json", {"x": 1})
    work.write_requests([{"id": 0}])

    class Explodes:
        def __str__(self):
            raise RuntimeError("in the middle of a row")

    with pytest.raises(InvalidInput):
        work.write_json("a.json", {"x": float("nan")})
    with pytest.raises(RuntimeError):
        work.write_requests([{"id": 1}, {"id": Explodes()}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "requests.csv"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert (tmp_path / "requests.csv").read_text() == "id\n0\n"


def test_a_finished_run_is_not_overwritten_by_accident(tmp_path):
    Workdir(tmp_path).write_summary({"n": 1})
    with pytest.raises(InvalidInput, match=r"workdir=.*summary\.json"):
        Workdir(tmp_path)
    Workdir(tmp_path, overwrite=True).write_summary({"n": 2})
    with pytest.raises(InvalidInput, match="workdir=''"):  # it filled the current folder
        Workdir("", overwrite=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidInput, match="a folder"):
        Workdir(file)

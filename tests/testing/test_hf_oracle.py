"""The oracle gets exactly our weights, answers or fails in time, and the bench notices work that is not the same."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.models import load_model_config
from prfaas_jax.engine.build import build_runner
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.errors import EngineFailed
from prfaas_jax.models.params import flat_names, init_random
from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh
from prfaas_jax.testing import hf_oracle
from prfaas_jax.testing.engine_bench import EngineBench, Sample, compare, rates, ratios

needs_safetensors = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="needs safetensors")


@needs_safetensors
@pytest.mark.parametrize("name", ["qwen3_toy", "llama_toy"])
def test_exported_weights_are_ours(tmp_path: Path, name: str) -> None:
    from prfaas_jax.models.hf import read_hf

    config = load_model_config(name)
    params = init_random(config, 3, Sharder(make_mesh(MeshSpec()), "decode"))
    hf_oracle.export_hf(tmp_path, config, params)
    read, arrays = read_hf(tmp_path)
    assert read.fingerprint() == config.fingerprint()
    for path, leaf in flat_names(params).items():
        np.testing.assert_array_equal(arrays[path], leaf[...])


def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f"import json, sys, time\nfor line in sys.stdin:\n    request = json.loads(line)\n    {body}\n")
    monkeypatch.setattr(hf_oracle, "_WORKER", script)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("time.sleep(60)", "within"),
        ("sys.exit(3)", "ended with 3"),
        ("print(json.dumps({'error': 'no such model'}), flush=True)", "no such model"),
    ],
)
def test_an_oracle_that_hangs_dies_or_refuses_is_an_error_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    fake_worker(tmp_path, monkeypatch, body)
    with pytest.raises(EngineFailed, match=message):
        hf_oracle.HfOracle(sys.executable, tmp_path, 1, timeout_s=5.0)


def test_a_missing_interpreter_or_package_is_said() -> None:
    assert "nowhere" in (hf_oracle.oracle_missing("/nowhere/python") or "")


def test_bench_measures_and_refuses_an_oracle_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions("random:qwen3_toy", chunk=64, max_length=128, max_rows=8, max_prefill_rows=1, page_size=64)
    runner, _ = build_runner(options, load_model_config)
    bench = EngineBench(runner, context=70)
    samples = list(compare(bench, None, [10, 100], [1, 8], repeats=2, steps=2))
    measured = [("prefill", 10), ("prefill", 100), ("decode", 1), ("decode", 8)]
    assert [(s.phase, s.size) for s in samples] == [m for m in measured for _ in range(2)]
    assert set(rates(samples, "ours", "prefill")) == {"10", "100"} and ratios(samples) is None
    fake_worker(tmp_path, monkeypatch, "print(json.dumps({'seconds': 1.0, 'token': -1}), flush=True)")
    with hf_oracle.HfOracle(sys.executable, tmp_path, 1) as oracle, pytest.raises(EngineFailed, match="not the same work"):
        list(compare(bench, oracle, [10], [], repeats=1))


def test_ratios_are_ours_over_theirs() -> None:
    samples = [Sample(side, "decode", 8, i, 8, s) for side, s in [("ours", 1.0), ("hf", 2.0)] for i in range(3)]
    assert ratios(samples) == {"prefill_tok_s": {}, "decode_tok_s": {"8": 2.0}}

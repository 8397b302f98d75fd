"""Speed of ops by form: what is reported adds up, and the bound is a bound of the right shapes."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs.models import load_model_config
from prfaas_jax.models.layer_config import MoeConfig
from prfaas_jax.testing import ops_bench

ROOT = Path(__file__).resolve().parents[2]


def test_recurrences_are_measured_by_form_with_their_bound():
    samples = list(ops_bench.measure([128], repeats=2))
    assert len(samples) == 2 * 3 * 2
    for kind, by_tokens in ops_bench.summary(samples).items():
        rates = by_tokens["128"]
        for ratio, form in (("speedup", "chunkwise"), ("speedup_bound", ops_bench.BOUND)):
            assert rates[ratio] == pytest.approx(rates[f"{form}_tok_s"] / rates["recurrent_tok_s"], abs=0.01), kind


def test_the_bound_has_the_shapes_of_the_op():
    inputs, state, valid = ops_bench._inputs("kda", 128)
    out, new = jax.eval_shape(lambda: ops_bench._run(inputs, state, valid, form="chunkwise"))
    bound_new, bound_out = jax.eval_shape(lambda: ops_bench._products(state, ops_bench._chunks(inputs)))
    assert bound_new == new and bound_out.size == out.size


def test_experts_are_measured_by_form():
    config = load_model_config("qwen3_moe_toy")
    moe = next(layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeConfig))
    found = ops_bench.experts(moe, config.hidden_size, ("ragged", "grouped"), (1, 8), repeats=1)
    assert {tokens: set(forms) for tokens, forms in found.items()} == {"1": {"ragged", "grouped"}, "8": {"ragged", "grouped"}}
    flops = 6 * 8 * moe.top_k * config.hidden_size * moe.intermediate_size
    assert all(f["seconds"] * f["flops_per_s"] == pytest.approx(flops) for f in found["8"].values())


def test_the_picture_is_drawn_from_the_files_of_an_accelerator(tmp_path):
    for name in ("forms.json", "engine.json", "env.json"):
        shutil.copy(ROOT / "results" / "h200" / name, tmp_path)
    # In a process of its own: a process has room for the flags of one command.
    code = f"from pathlib import Path; from experiments.device_check import draw; draw(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

"""Deployments compiled without their chips: what is reported, and what is refused before any compilation."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs.models import load_model_config
from prfaas_jax.engine import aot, targets
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.targets import CHIPS, Target
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec

ROOT = Path(__file__).resolve().parents[2]
CHIP = CHIPS["tpu"]["v5e"]


def deployed(mesh="data:1,model:2", chip=CHIP, model="qwen3_toy", chips=None, **options):
    """The toy model on CPU devices that stand for chips."""
    options = {"mesh": mesh, "chunk": 64, "max_length": 256, "max_rows": 8, **options}
    count = chips or aot.MeshSpec.parse(mesh).size
    config = load_model_config(model)
    return aot.Deployment(config, EngineOptions(checkpoint="random:toy", **options), chip, "cpu", tuple(jax.devices()[:count]))


@pytest.fixture(scope="module")
def reports():
    return {mesh: aot.compile_steps(deployed(mesh)) for mesh in ("data:1,model:1", "data:2,model:2")}


def test_decode_reduces_twice_per_layer_and_prefill_gathers_twice(reports):
    decode, prefill = (reports["data:2,model:2"][step].collectives for step in ("decode", "prefill"))
    assert decode["all-reduce"]["per_layer"] == 2
    assert {k for k, c in decode.items() if c["per_layer"]} == {"all-reduce"}
    assert prefill["all-gather"]["per_layer"] == 2
    assert reports["data:1,model:1"]["decode"].collectives == {}


@pytest.fixture(scope="module")
def hybrid():
    """Head and tail layers, two kinds of mixers, dense and expert feed-forward, a latent that all devices hold."""
    return aot.compile_steps(deployed("expert:2,model:2", model="kimi_linear_toy"))


@pytest.mark.slow  # compile-check asks the same of real compilers
def test_hybrids_reduce_as_often_as_dense_models(hybrid):
    pattern = load_model_config("kimi_linear_toy").pattern
    alone = pattern.head + pattern.tail
    assert alone and pattern.repeats
    decode, prefill = (hybrid[step].collectives for step in ("decode", "prefill"))
    assert {k: c["per_layer"] for k, c in decode.items() if c["per_layer"]} == {"all-reduce": 2}
    # Two for each layer outside the body, and one for the embedding.
    assert decode["all-reduce"]["outside_large"] == 2 * alone + 1
    assert decode["all-reduce"]["outside"] >= decode["all-reduce"]["outside_large"]
    assert prefill["all-gather"]["per_layer"] == 2
    assert prefill["all-reduce"]["per_layer"] + prefill["reduce-scatter"]["per_layer"] == 2
    for collectives in (decode, prefill):
        assert all(c["per_step"] == pytest.approx(c["per_layer"] * pattern.body_layers + c["outside"]) for c in collectives.values())


@pytest.mark.slow  # compile-check asks the same of real compilers
def test_a_chip_holds_its_heads_of_states_and_latents_whole(hybrid):
    config = load_model_config("kimi_linear_toy")
    options = deployed("expert:2,model:2", model="kimi_linear_toy").options
    state, latent = 0, 0
    for group in cache_spec(config).groups:
        width = len(group.layers) * sum(t.token_bytes for t in group.cache.tensors)
        if group.cache.kind == "state":
            state += options.slots_per_shard(1) * width
        else:
            latent += options.pages_per_shard(1) * options.page_size * width
    assert state and latent
    for report in hybrid.values():
        assert report.bytes_per_chip["pools"] == report.aliased_bytes == state // 4 + latent
        assert report.pool_copies == []


@pytest.mark.slow  # compile-check asks the same of real compilers
def test_norms_over_all_heads_reduce_once_more():
    collectives = aot.compile_step(deployed(model="lightning_toy"), "decode").collectives
    # Three of four layers are Lightning with one group for the norm, which two devices share.
    assert {k: c["per_layer"] for k, c in collectives.items() if c["per_layer"]} == {"all-reduce": 2.75}


@pytest.mark.parametrize("mesh", ["data:1,model:1", "data:2,model:2"])
def test_bytes_and_flops_follow_the_formulas(reports, mesh):
    config, spec = load_model_config("qwen3_toy"), aot.MeshSpec.parse(mesh)
    mixer = config.layers[0].mixer
    layer = config.hidden_size * mixer.head_dim * 2 * (mixer.num_heads + mixer.num_kv_heads) + 3 * 64 * 128
    for step, report in reports[mesh].items():
        assert report.aliased_bytes == report.bytes_per_chip["pools"]
        assert report.pool_copies == []
        assert report.label == "compiled, not run"
        matmuls = 2 * (report.tokens * layer * config.num_layers + report.rows * 512 * 64) / spec.size
        (attention,) = report.island_flops_per_chip.values()
        found = report.flops_per_chip - attention
        # The CPU compiler forgets where a chunk's attention over itself comes from, so it is not left out; others do not.
        nameless = report.rows * 2 * 2 * 64 * 64 * 16 * 8 * 4 / spec.size if step == "prefill" else 0
        assert found == pytest.approx(matmuls + nameless, rel=0.02)
        pairs = 8 // spec.data * 257 if step == "decode" else sum(range(193, 257))
        assert attention == pairs * 4 * 16 * 8 * 4 / spec.model
        total = sum(v for k, v in report.bytes_per_chip.items() if k != "total")
        assert report.bytes_per_chip["total"] == total
        assert report.roofline_s == max(report.bounds_s.values()) > 0
    replicated = 4 * (64 * (2 * 4 + 1) + 16 * 2 * 4)  # norms
    parameters = 4 * config.num_params()
    assert reports[mesh]["decode"].bytes_per_chip["parameters"] == (parameters - replicated) // spec.model + replicated


def test_what_does_not_fit_says_by_how_much():
    small = dataclasses.replace(CHIP, hbm_bytes=1e6)
    report = aot.compile_step(deployed(chip=small), "decode")
    assert not report.fits and report.over_bytes == report.bytes_per_chip["total"] - 1_000_000


def test_pools_do_not_grow_temporaries():
    before, after = (aot.compile_step(deployed(pages=pages), "decode") for pages in (200, 400))
    assert after.bytes_per_chip["pools"] == 2 * before.bytes_per_chip["pools"]
    assert after.bytes_per_chip["temporaries"] == before.bytes_per_chip["temporaries"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"chips": 4}, "mesh='data:1,model:2': expected a product of 4"),
        ({"max_length": 8192}, "context=8192: expected at most max_position=4096"),
        ({"mesh": "data:2,model:1", "max_rows": 9}, "batch=9: expected a multiple of the mesh's data axis"),
        ({"chunk": 512}, "chunk=512: expected at most the context"),
        ({"mesh": "data:1,model:3"}, "mesh='data:1,model:3': expected a model axis that divides heads=8"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, field):
    with pytest.raises(InvalidInput) as refused:
        deployed(**change)
    assert field in str(refused.value)


@pytest.mark.parametrize("text", ["", "tpu", "tpu:v9:2x2", "npu:v5e:2x2", "tpu:v5e:", "tpu:v5e:2x0", "tpu:v5e:2xa", "gpu:h200:8"])
def test_unknown_targets_are_refused(text):
    with pytest.raises(InvalidInput, match="target="):
        Target.parse(text)


def test_targets_name_their_parts():
    pod, node = Target.parse("tpu:v5e:4x4"), Target.parse("gpu:h200:1x1x8")
    assert (pod.platform, pod.chips, str(pod)) == ("tpu", 16, "tpu:v5e:4x4")
    assert (node.platform, node.chips, node.chip.hbm_bytes) == ("cuda", 8, 141e9)
    assert node.chip.peak_flops("bfloat16") > node.chip.peak_flops("float32")


@pytest.mark.parametrize(("target", "extra"), [("tpu:v5e:2x2", "[tpu]"), ("gpu:h200:1x1x2", "[cuda]")])
def test_a_missing_compiler_is_named_with_its_extra(monkeypatch, target, extra):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    options = EngineOptions(checkpoint="random:toy", mesh="model:4")
    with pytest.raises(InvalidInput) as refused:
        aot.deployment(load_model_config("qwen3_toy"), Target.parse(target), options)
    assert target in str(refused.value) and extra in str(refused.value)


def compile_for(*arguments):
    command = [sys.executable, "-m", "experiments.compile_for", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def test_the_command_names_the_flag_and_leaves_with_an_error():
    done = compile_for("--model=qwen3_toy", "--target=tpu:v9:4x4")
    assert done.returncode == 2 and "target='tpu:v9:4x4'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (make install-compile)")
def test_the_command_compiles_for_a_pod_that_is_not_here(tmp_path):
    done = compile_for(
        "--model=qwen3_toy", "--target=tpu:v5e:2x2", "--mesh=data:1,model:4", "--context=256", "--chunk=64", f"--workdir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["chips"] == 4 and result["decode"]["fits"] and result["decode"]["collectives"]["all-reduce"]["per_layer"] == 2
    assert json.loads((tmp_path / "summary.json").read_text()) == result


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (make install-compile)")
def test_a_step_that_its_compiler_refuses_is_reported_not_raised():
    arguments = ["--model=qwen3_8b", "--target=tpu:v5e:2x2", "--mesh=data:1,model:4", "--batch=64", "--context=8192"]
    done = compile_for(*arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for step in ("prefill", "decode"):
        assert not result[step]["fits"] and result[step]["over_bytes"] > 5e9 and "memory" in result[step]["message"].lower()

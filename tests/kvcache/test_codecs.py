import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec

GQA = LayerCache("paged", (TensorSpec("k", 3, 64, "bfloat16"), TensorSpec("v", 3, 64, "bfloat16")))
WINDOW = LayerCache("window", (TensorSpec("k", 2, 8, "bfloat16"),), 6)
DELTA = LayerCache("state", (TensorSpec("recurrent", 4, 30, "float32"), TensorSpec("tail", 2, 9, "bfloat16")))
SPEC = CacheSpec((CacheGroup(GQA, (0, 1)), CacheGroup(WINDOW, (2,)), CacheGroup(DELTA, (3,))))


@pytest.mark.parametrize("text", ["none", "paged=int8", "paged=fp8,window=int8,state=bf16", "state=bf16"])
def test_text_round_trip(text):
    assert str(CacheCodec.parse(text)) == text


@pytest.mark.parametrize("text", ["", "int8", "paged=bf16", "paged=int8,paged=int8", "state=int8", "pages=int8", "paged"])
def test_malformed_codecs_are_named(text):
    with pytest.raises(InvalidInput, match="codec"):
        CacheCodec.parse(text)


def test_no_codec_changes_nothing():
    assert CacheCodec().wire_spec(SPEC) == SPEC and not CacheCodec().lossy


def test_bytes_on_the_wire():
    codec = CacheCodec.parse("paged=int8,window=fp8,state=bf16")
    assert codec.lossy
    paged, window, state = codec.wire_spec(SPEC).groups
    assert paged.bytes(10) == 2 * 10 * 2 * 3 * (64 + 2)
    assert SPEC.groups[0].bytes(10) / paged.bytes(10) > 1.9
    assert window.bytes(10) == 6 * 2 * (8 + 2)
    assert state.bytes(10) == (4 * 30 + 2 * 9) * 2


@pytest.mark.parametrize(
    ("cache", "length", "held", "kept"),
    [
        (GQA, 10, 0, (0, 10)),
        (GQA, 10, 7, (7, 10)),
        (GQA, 10, 12, (10, 10)),
        (WINDOW, 10, 3, (4, 10)),
        (WINDOW, 10, 8, (8, 10)),
        (WINDOW, 10, 10, (10, 10)),
        (DELTA, 10, 9, (9, 10)),
        (DELTA, 10, 10, (10, 10)),
        (DELTA, 0, 0, (0, 0)),
    ],
)
def test_what_a_held_prefix_saves(cache, length, held, kept):
    assert cache.kept(length, held) == kept

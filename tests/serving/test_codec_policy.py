"""How a cache travels: by the options, or by what pays on the link as it was measured."""

import pytest
from serving_fixtures import SPEC

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.serving.codec_policy import CodecPolicy, zstd_rate
from prfaas_jax.transfer.link import LinkEstimate

NAMES = ("int8", "fp8", "bf16")
FAST = dict.fromkeys(NAMES, (5e9, 5e9))


def link(bytes_per_s: float) -> LinkEstimate:
    return LinkEstimate(bytes_per_s=bytes_per_s)


@pytest.mark.parametrize("wanted", ["lossless", "paged=gzip", ""])
def test_unknown_codecs_are_named(wanted):
    with pytest.raises(InvalidInput, match=r"codec.*auto"):
        CodecPolicy(wanted)


def test_what_is_asked_for_by_name_is_done_on_any_link():
    for wanted, codec, compressed in [("none", "none", False), ("zstd", "none", True), ("paged=int8", "paged=int8", False)]:
        travel = CodecPolicy(wanted).decide(SPEC, (), (), None, {})
        assert (str(travel.codec), travel.compressed, travel.name) == (codec, compressed, wanted)


def test_auto_does_nothing_before_the_link_is_known():
    assert CodecPolicy("auto", True).decide(SPEC, NAMES, NAMES, None, FAST).name == "none"
    assert CodecPolicy("auto", True).decide(SPEC, NAMES, NAMES, link(0.0), FAST).name == "none"


@pytest.mark.parametrize("rate", [1e5, 1e7, 1e9, 1e11])
def test_auto_never_loses_bits_unless_allowed(rate):
    travel = CodecPolicy("auto").decide(SPEC, NAMES, NAMES, link(rate), FAST)
    assert not travel.codec.lossy


def test_auto_compresses_where_a_core_is_faster_than_the_link():
    slow = zstd_rate().break_even_bytes_per_s(overlapped=True) / 4
    assert CodecPolicy("auto").decide(SPEC, NAMES, NAMES, link(slow), FAST).name == "zstd"
    assert CodecPolicy("auto").decide(SPEC, NAMES, NAMES, link(slow * 100), FAST).name == "none"


def test_auto_takes_the_smallest_that_both_have_when_bits_may_go():
    travel = CodecPolicy("auto", True).decide(SPEC, NAMES, NAMES, link(1e7), FAST)
    assert travel.codec.lossy and travel.codec.state == "bf16" and travel.codec.paged in ("int8", "fp8")
    one_sided = CodecPolicy("auto", True).decide(SPEC, NAMES, ("bf16",), link(1e7), FAST)
    assert one_sided.codec in (CacheCodec(state="bf16"), CacheCodec())
    assert CodecPolicy("auto", True).decide(SPEC, NAMES, NAMES, link(1e11), FAST).name == "none"

"""The break-even rule: what pays, what is never chosen, and that a slower link never makes a codec pay less."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.transfer.codec_choice import NONE, CodecRate, choose

ZSTD = CodecRate("zstd", 1.4, 0.5e9, 1.3e9, lossy=False)
INT8 = CodecRate("int8", 1.94, 5e9, 10e9, lossy=True)

rates = st.floats(1e3, 1e12)
codecs = st.builds(CodecRate, st.text("abc", min_size=1, max_size=3), st.floats(0.5, 8), rates, rates, st.booleans())


@pytest.mark.parametrize(
    ("link", "allow_lossy", "overlapped", "name"),
    [
        (0.05e9, False, False, "zstd"),  # (1 - 1/1.4) / (1/0.5 + 1/1.3) = 0.103 GB/s
        (0.12e9, False, False, NONE),
        (0.12e9, False, True, "zstd"),  # overlapped up to the encoder's 0.5 GB/s
        (0.6e9, False, True, NONE),
        (0.05e9, True, False, "int8"),
        (1.6e9, True, False, "int8"),  # (1 - 1/1.94) / (1/5 + 1/10) = 1.615 GB/s
        (1.7e9, True, False, NONE),
    ],
)
def test_the_break_even_rate_decides(link, allow_lossy, overlapped, name):
    assert choose(link, [ZSTD, INT8], allow_lossy, overlapped).name == name


def test_reasons_hold_the_numbers():
    assert choose(0.05e9, [ZSTD], False, False).reason == "at 50 MB/s zstd takes 17.05 ns per byte, none 20"
    assert choose(1e9, [ZSTD, INT8], False, False).reason == "at 1000 MB/s no codec pays: zstd below 103.2 MB/s"
    assert choose(1e9, [INT8], False, False).reason == "at 1000 MB/s only lossy codecs are to be had, and none is allowed"
    assert choose(1e9, [], True, False).reason == "at 1000 MB/s no codec is to be had"


def test_of_equals_the_lossless_one():
    twin = CodecRate("exact", INT8.ratio, INT8.encode_bytes_per_s, INT8.decode_bytes_per_s, lossy=False)
    assert choose(1e6, [INT8, twin], True, False).name == "exact"


def test_a_codec_that_costs_nothing_always_pays_and_one_that_saves_nothing_never_does():
    free = CodecRate("free", 2.0, math.inf, math.inf, lossy=False)
    useless = CodecRate("useless", 1.0, math.inf, math.inf, lossy=False)
    for overlapped in (False, True):
        assert free.pays(1e12, overlapped) and not useless.pays(1.0, overlapped)


@given(codecs, rates, rates, st.booleans())
def test_what_pays_at_some_rate_pays_at_every_slower_one(codec, one, other, overlapped):
    slow, fast = sorted((one, other))
    assert codec.pays(slow, overlapped) or not codec.pays(fast, overlapped)


@given(codecs, rates, st.booleans())
def test_paying_is_taking_less_time(codec, link, overlapped):
    """The rule as the break-even states it, and as times compared, away from the point where rounding decides."""
    threshold = codec.break_even_bytes_per_s(overlapped)
    assume(abs(link - threshold) > 1e-6 * link)
    taken = codec.seconds_per_byte(link, overlapped)
    if codec.pays(link, overlapped):
        assert taken < 1 / link
    else:
        assert taken >= 1 / link * (1 - 1e-6)


@given(st.lists(codecs, max_size=4, unique_by=lambda c: c.name), rates, st.booleans(), st.booleans())
def test_the_choice_is_the_best_that_is_allowed_and_no_worse_than_none(codecs, link, allow_lossy, overlapped):
    choice = choose(link, codecs, allow_lossy, overlapped)
    by_name = {codec.name: codec for codec in codecs}
    assert choice.seconds_per_byte <= 1 / link * (1 + 1e-9)
    if choice.name != NONE:
        assert allow_lossy or not by_name[choice.name].lossy
    for codec in codecs:
        if codec.pays(link, overlapped) and (allow_lossy or not codec.lossy):
            assert choice.seconds_per_byte <= codec.seconds_per_byte(link, overlapped)
    assert choice.name in choice.reason or choice.name == NONE


@pytest.mark.parametrize("link", [0.0, -1.0, math.nan, math.inf])
def test_a_link_without_a_rate_is_refused(link):
    with pytest.raises(InvalidInput, match="link_bytes_per_s"):
        choose(link, [ZSTD], True, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("zstd", 0.0, 1.0, 1.0), "ratio"),
        (("zstd", math.inf, 1.0, 1.0), "ratio"),
        (("zstd", 1.0, math.nan, 1.0), "encode_bytes_per_s"),
        (("zstd", 1.0, 1.0, -1.0), "decode_bytes_per_s"),
        (("none", 1.0, 1.0, 1.0), "name"),
    ],
)
def test_nonsense_measurements_are_refused(fields, message):
    with pytest.raises(InvalidInput, match=message):
        CodecRate(*fields, lossy=False)


def test_two_codecs_of_one_name_are_refused():
    with pytest.raises(InvalidInput, match="names that differ"):
        choose(1e9, [ZSTD, ZSTD], True, True)

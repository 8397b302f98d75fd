import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.models import load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.segments import STATE_SEGMENT_BYTES
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.testing.scaled_spec import scaled_spec

SPECS = {name: cache_spec(load_model_config(name)) for name in ("paper_1t", "kimi_linear_48b", "mimo_v2_flash", "qwen3_235b")}
SCALES = st.floats(-4.0, 0.0).map(lambda exponent: 10.0**exponent)


@given(st.sampled_from(sorted(SPECS)), SCALES, st.integers(1, 200_000), st.integers(0, 200_000))
def test_bytes_of_every_length_and_of_what_is_added_to_a_prefix_are_scaled(name, byte_scale, length, held):
    spec = SPECS[name]
    small, real = scaled_spec(spec, byte_scale)
    # 2 % is the limit; the windows of mimo, whose tokens are small, may need more than 1 % of it.
    limit = 0.02 if name == "mimo_v2_flash" else 0.01
    assert small.bytes(length) == pytest.approx(real * spec.bytes(length), rel=limit)
    assert small.bytes(length, min(held, length)) == pytest.approx(real * spec.bytes(length, min(held, length)), rel=limit)


@given(st.sampled_from(sorted(SPECS)), SCALES)
def test_the_scale_is_one_of_the_two_next_to_the_wanted_one_and_parts_are_few(name, byte_scale):
    spec = SPECS[name]
    small, real = scaled_spec(spec, byte_scale)
    coarsest = min(group.bytes(1) for group in spec.groups)
    assert abs(real - byte_scale) <= 1 / coarsest
    if byte_scale < 1:
        assert len(small.groups) == len(spec.groups) <= 2
        for group in small.groups:
            (tensor,) = group.cache.tensors
            assert len(group.layers) == 1 or tensor.token_bytes <= STATE_SEGMENT_BYTES
        layers = [layer for group in small.groups for layer in group.layers]
        assert layers == list(range(len(layers)))


def test_the_paper_case_at_a_thousandth_and_a_ten_thousandth():
    small, real = scaled_spec(SPECS["paper_1t"], 1e-3)
    assert (small.bytes_per_token, real) == (17, 17 / 17_280)
    small, real = scaled_spec(SPECS["paper_1t"], 1e-4)
    assert (small.bytes_per_token, small.fixed_bytes, real) == (2, 21_104, 2 / 17_280)


def test_a_scale_of_one_gives_the_spec_itself():
    for spec in SPECS.values():
        assert scaled_spec(spec, 1.0) == (spec, 1.0)


@pytest.mark.parametrize("byte_scale", [0.0, -1.0, 1.5, 1e-6, float("nan")])
def test_scales_that_cannot_be_are_refused(byte_scale):
    with pytest.raises(InvalidInput, match="byte_scale"):
        scaled_spec(SPECS["paper_1t"], byte_scale)

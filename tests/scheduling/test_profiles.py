import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.models import load_model_config
from configs.profiles import available_profiles, load_profile
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.profiles import (
    FittedDecode,
    FittedPrefill,
    Instance,
    MeasuredDecode,
    MeasuredPrefill,
    prefill_s,
    prefill_s_of,
)
from prfaas_jax.testing.paper import LENGTHS, TABLE_3

FITTED = FittedPrefill(0.4, 0.5, 0.01)
MEASURED = MeasuredPrefill((1000, 2000, 4000), (0.2, 0.3, 0.7))
MODELS = ("paper_1t", "mimo_v2_flash", "qwen3_235b", "ring_2_5_1t")


def test_fitted_times_are_the_polynomial():
    assert prefill_s(FITTED, 20_000) == pytest.approx(0.4 + 0.5 * 2 + 0.01 * 4)
    # New tokens over a prefix attend it: 0.01 * (3^2 - 1^2).
    assert prefill_s(FITTED, 20_000, 10_000) == pytest.approx(0.4 + 0.5 * 2 + 0.01 * 8)


def test_measured_times_are_linear_between_points():
    assert [prefill_s(MEASURED, n) for n in (1000, 1500, 2000, 3000, 4000)] == pytest.approx([0.2, 0.25, 0.3, 0.5, 0.7])
    assert prefill_s(MEASURED, 500) == pytest.approx(0.15) and MEASURED.start_s == pytest.approx(0.1)
    assert MEASURED.max_tokens == 4000


def test_a_line_that_would_start_below_zero_starts_at_zero():
    steep = MeasuredPrefill((1000, 2000), (0.1, 1.0))
    assert steep.start_s == 0 and prefill_s(steep, 500) == pytest.approx(0.05)


@given(
    st.sampled_from([FITTED, MEASURED, FittedPrefill(0.0, 1.0)]),
    st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 2000)), min_size=1),
)
def test_arrays_are_the_scalars_and_chunks_add_up(time, pairs):
    new, cached = np.array(pairs).T
    assert prefill_s_of(time, new, cached) == pytest.approx([prefill_s(time, n, c) for n, c in pairs])
    for n, c in pairs:
        # A prompt in two chunks costs what it costs whole: the second one is computed over the first.
        assert prefill_s(time, c) + prefill_s(time, n, c) - time.start_s == pytest.approx(prefill_s(time, n + c))


def test_decode_steps():
    assert FittedDecode(0.01, 0.001, 1e-6).step_s(10, 5000) == pytest.approx(0.025)
    table = MeasuredDecode((4, 8, 32), (0.02, 0.03, 0.06))
    assert [table.step_s(b, 0) for b in (1, 4, 6, 8, 20, 32, 64)] == pytest.approx([0.02, 0.02, 0.025, 0.03, 0.045, 0.06, 0.1])
    assert MeasuredDecode((8,), (0.03,)).step_s(100, 1e9) == 0.03


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: FittedPrefill(-1.0, 1.0), "prefill.start_s"),
        (lambda: FittedPrefill(0.0, math.nan), "prefill.linear_s"),
        (lambda: FittedPrefill(0.0, 1.0, math.inf), "prefill.quadratic_s"),
        (lambda: FittedPrefill(0.0, 0.0), "prefill"),
        (lambda: FittedPrefill(0.0, 1.0, max_tokens=0), "prefill.max_tokens"),
        (lambda: MeasuredPrefill((1000,), (0.1,)), "prefill.tokens"),
        (lambda: MeasuredPrefill((0, 1000), (0.1, 0.2)), "prefill.tokens"),
        (lambda: MeasuredPrefill((2000, 1000), (0.1, 0.2)), "prefill.tokens"),
        (lambda: MeasuredPrefill((1000, 2000), (0.1,)), "prefill.seconds"),
        (lambda: MeasuredPrefill((1000, 2000), (0.0, 0.1)), "prefill.seconds"),
        (lambda: MeasuredPrefill((1000, 2000), (0.2, 0.1)), "prefill.seconds"),
        (lambda: MeasuredPrefill((1000, 2000), (0.1, math.inf)), "prefill.seconds"),
        (lambda: FittedDecode(-0.1), "decode.base_s"),
        (lambda: FittedDecode(0.0, 0.0, 1e-6), "decode"),
        (lambda: MeasuredDecode((), ()), "decode.batches"),
        (lambda: MeasuredDecode((8, 8), (0.1, 0.1)), "decode.batches"),
        (lambda: MeasuredDecode((8,), (0.0,)), "decode.seconds"),
        (lambda: Instance("x", FITTED, max_batch=0), "instance x.max_batch"),
        (lambda: Instance("x", FITTED, kv_memory_bytes=0), "instance x.kv_memory_bytes"),
        (lambda: Instance("x", FITTED, nic_bytes_per_s=math.nan), "instance x.nic_bytes_per_s"),
        (lambda: Instance("x", FITTED, cost_per_hour=-1), "instance x.cost_per_hour"),
        (lambda: Instance("x", FITTED, cost_per_hour=math.inf), "instance x.cost_per_hour"),
        (lambda: Instance("x", FITTED, basis="guessed"), "instance x.basis"),
        (lambda: KvFootprint(-1, 0), "kv.state_bytes"),
        (lambda: KvFootprint(0, -1), "kv.bytes_per_token"),
        (lambda: KvFootprint(0, 1, ((0, 4),)), "kv.windows"),
    ],
)
def test_impossible_profiles_are_refused(make, field):
    with pytest.raises(InvalidInput) as error:
        make()
    assert error.value.field == field


@pytest.mark.parametrize("model", MODELS)
@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=20), st.floats(0, 1))
def test_footprint_is_the_cache_spec(model, lengths, share):
    spec = cache_spec(load_model_config(model))
    kv = KvFootprint.of(spec)
    assert [kv.bytes(n) for n in lengths] == [spec.bytes(n) for n in lengths]
    held = np.floor(np.array(lengths) * share)
    assert kv.bytes_of(np.array(lengths), held) == pytest.approx([kv.bytes(n, h) for n, h in zip(lengths, held, strict=True)])


def test_a_held_prefix_saves_tokens_and_never_state():
    kv = KvFootprint(1000, 10, ((128, 5),))
    assert kv.bytes(1000) == 1000 + 10_000 + 640
    assert kv.bytes(1000, 900) == 1000 + 1000 + 500
    assert kv.bytes(1000, 999) == 1000 + 10 + 5


def test_shipped_profiles_load_under_their_names():
    assert set(available_profiles()) == {"h200_paper_1t", "h20_paper_1t", *(f"h200_{model}" for model in TABLE_3)}
    for name in available_profiles():
        profile = load_profile(name)
        hardware, _, model = name.partition("_")
        assert profile.name == f"8x{hardware.upper()} {model}"
        assert (profile.decode is not None) == (hardware == "h20")
        assert profile.cost_per_hour == {"h200": 2.0, "h20": 1.0}[hardware]


@pytest.mark.parametrize("model", sorted(TABLE_3))
def test_table_3_profiles_are_size_over_throughput(model):
    spec, profile = cache_spec(load_model_config(model)), load_profile(f"h200_{model}").prefill
    assert isinstance(profile, MeasuredPrefill) and profile.tokens == tuple(LENGTHS.values())
    derived = [spec.bytes(n) * 8 / (phi * 1e9) for n, phi in zip(profile.tokens, TABLE_3[model], strict=True)]
    assert profile.seconds == pytest.approx(derived, abs=1e-6)


def test_instances_of_a_study_stay_comparable():
    assert dataclasses.replace(load_profile("h20_paper_1t"), cost_per_hour=3.0).cost_per_hour == 3.0
    assert load_profile("h20_paper_1t", cost_per_hour=3.0, kv_memory_gib=80).kv_memory_bytes == 80 * 2**30

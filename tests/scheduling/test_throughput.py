import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from systems import PAPER, PAPER_MIX, cases, mixes

from configs.models import load_model_config
from configs.profiles import load_profile
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.profiles import FittedDecode, prefill_s
from prfaas_jax.scheduling.throughput import decode_batch, decode_step_s, egress_needed, phi_kv
from prfaas_jax.scheduling.topology import GBPS

GIB = 2**30


def operate(case, mix, t, n_p, **options):
    at = case.operate(mix, t, n_p, **options)
    return {field.name: float(getattr(at, field.name)[0]) for field in dataclasses.fields(at)}


def test_the_papers_operating_point():
    at = operate(PAPER, PAPER_MIX, 19_400, 3)
    assert [at[x] for x in ("theta_prfaas_compute", "theta_pd_p", "theta_pd_d")] == pytest.approx([1.61, 1.64, 3.91], rel=0.01)
    assert at["lambda_max"] == pytest.approx(3.24, rel=0.01)
    assert at["p"] == pytest.approx(0.496, rel=0.01)
    assert at["egress"] / GBPS == pytest.approx(13, rel=0.06)


@pytest.mark.parametrize(
    ("tokens", "mib", "seconds", "gbps"), [(1024, 190.8, 0.44, 3.61), (8192, 308.9, 0.72, 3.59), (32_000, 701.3, 1.84, 3.19)]
)
def test_table_5(tokens, mib, seconds, gbps):
    assert PAPER.kv.bytes(tokens) / 2**20 == pytest.approx(mib, abs=0.1)
    assert prefill_s(PAPER.prfaas.prefill, tokens) == pytest.approx(seconds, rel=0.035)
    assert phi_kv(PAPER.kv, PAPER.prfaas, tokens) / GBPS == pytest.approx(gbps, rel=0.035)


@pytest.mark.parametrize(
    ("model", "instances", "tokens", "gbps", "half"),
    [("minimax_m2_5", 64, 32_000, 3800, 50), ("qwen3_235b", 64, 32_000, 2100, 50), ("ring_2_5_1t", 64, 32_000, 170, 5)],
)
def test_sizing(model, instances, tokens, gbps, half):
    kv = KvFootprint.of(cache_spec(load_model_config(model)))
    assert egress_needed(kv, load_profile(f"h200_{model}"), instances, tokens) / GBPS == pytest.approx(gbps, abs=half)


def test_ttft_without_queues():
    """Table 6; a round trip adds half of itself, a window divides the rate of each transfer."""
    for t, mean, p90 in ((19_400, 2.22, 3.51), (math.inf, 4.44, 9.73), (0, 1.74, 3.51)):
        ttft = PAPER.ttft(PAPER_MIX, t)
        assert PAPER_MIX.mean(ttft) == pytest.approx(mean, rel=0.01)
        assert PAPER_MIX.quantile(ttft, 0.9) == pytest.approx(p90, rel=0.01)
    far = dataclasses.replace(PAPER, rtt_s=0.1, window_bytes=1e8)
    mix = Mix.of(np.array([10_000.0]), 10)
    expected = prefill_s(PAPER.prfaas.prefill, 10_000) + PAPER.kv.bytes(10_000) / 1e9 + 0.05
    assert far.ttft(mix, 0)[0] == pytest.approx(expected)
    assert far.ttft(mix, 10_000)[0] == PAPER.ttft(mix, 10_000)[0]
    assert operate(far, PAPER_MIX, 19_400, 3) == operate(PAPER, PAPER_MIX, 19_400, 3)


@given(cases(), mixes(), st.floats(0, 110_000), st.floats(0, 1), st.data())
def test_exact_reading_is_the_sum_over_requests(case, mix, t, share, data):
    n_p = data.draw(st.integers(0, case.n_pd - 1))
    at = operate(case, mix, t, n_p, reading="exact", share=share)
    remote = np.where(mix.uncached > t, share, 0.0) * mix.weight
    local = mix.weight - remote
    far = sum(w * prefill_s(case.prfaas.prefill, n - c, c) for w, n, c in zip(remote, mix.tokens, mix.cached_prfaas, strict=True))
    near = sum(w * prefill_s(case.pd.prefill, n - c, c) for w, n, c in zip(local, mix.tokens, mix.cached_pd, strict=True))
    sent = float((remote * case.kv.bytes_of(mix.tokens, mix.cached_pd)).sum())
    n_d = case.n_pd - n_p
    link = min(case.b_out, case.n_prfaas * case.prfaas.nic_bytes_per_s, n_d * case.pd.nic_bytes_per_s)
    limits = [case.theta_pd_d(n_d, mix)]
    limits += [case.n_prfaas / far, link / sent] if far > 1e-12 else []
    limits += [n_p / near] if near > 1e-12 else []
    assert at["lambda_max"] == pytest.approx(min(limits), rel=1e-6, abs=1e-9)
    assert at["egress"] == pytest.approx(at["lambda_max"] * sent, rel=1e-6, abs=1e-6)


@given(cases(), mixes(), st.floats(0, 110_000), st.data())
def test_convex_times_make_the_mean_length_flatter(case, mix, t, data):
    n_p = data.draw(st.integers(0, case.n_pd - 1))
    fresh = Mix.of(mix.tokens, mix.output, mix.weight)  # nothing cached
    mean, exact = (operate(case, fresh, t, n_p, reading=reading) for reading in ("mean", "exact"))
    assert exact["lambda_max"] <= mean["lambda_max"] * (1 + 1e-9)


def test_length_blind():
    assert max(PAPER.length_blind(PAPER_MIX, n_p) for n_p in range(8)) == pytest.approx(3.16, rel=0.01)
    assert max(PAPER.length_blind(PAPER_MIX, n_p, "exact") for n_p in range(8)) == pytest.approx(3.125, rel=0.01)
    # Balanced: with its own share offloaded, both sides are as busy.
    at = PAPER.operate(PAPER_MIX, np.array([0.0, math.inf]), 3, "exact")
    remote, local = float(at.theta_prfaas[0]), float(at.theta_pd_p[1])
    shared = operate(PAPER, PAPER_MIX, 0.0, 3, reading="exact", share=remote / (remote + local))
    assert shared["lambda_max"] == pytest.approx(PAPER.length_blind(PAPER_MIX, 3, "exact"))


def test_decode_memory_binds_before_the_batch_does():
    """A request holds its prompt and whole output; 20 of them need 20 times that."""
    mix = Mix.of(np.array([30_000.0]), 1000)
    each = PAPER.kv.bytes(31_000)
    roomy = dataclasses.replace(PAPER.pd, kv_memory_bytes=20.5 * each)
    tight = dataclasses.replace(PAPER.pd, kv_memory_bytes=5 * each)
    assert decode_batch(roomy, PAPER.kv, mix) == 20 and decode_batch(tight, PAPER.kv, mix) == pytest.approx(5)
    assert dataclasses.replace(PAPER, pd=tight).theta_pd_d(2, mix) == pytest.approx(2 * 5 / (0.025 * 1000))
    # Those with long outputs are there longer: 2 of 3 slots have the long prompts.
    mixed = Mix.of(np.array([10_000.0, 40_000.0]), np.array([500.0, 1000.0]))
    held = (PAPER.kv.bytes(10_500) + 2 * PAPER.kv.bytes(41_000)) / 3
    assert decode_batch(tight, PAPER.kv, mixed) == pytest.approx(5 * each / held)


def test_decode_steps_read_the_cache_at_half_the_output():
    mix = Mix.of(np.array([30_000.0]), 1000)
    slow = dataclasses.replace(PAPER.pd, decode=FittedDecode(0.01, 0.001, 1e-7))
    assert decode_step_s(slow, 20, mix) == pytest.approx(0.01 + 0.02 + 1e-7 * 20 * 30_500)
    with pytest.raises(InvalidInput, match="decode"):
        decode_step_s(PAPER.prfaas, 1, mix)


def test_host_links_bind():
    """Of the PrfaaS instances and of the decode instances, whichever have less."""
    mix = Mix.of(np.array([50_000.0]), 100)
    for which, hosts in (("prfaas", 4), ("pd", 8)):
        capped = dataclasses.replace(PAPER, **{which: dataclasses.replace(getattr(PAPER, which), nic_bytes_per_s=1e8)})
        assert operate(capped, mix, 0, 0)["theta_prfaas_egress"] == pytest.approx(hosts * 1e8 / PAPER.kv.bytes(50_000))


def test_held_prefixes_send_less_and_never_the_state_less():
    """1,000 new tokens over a long prefix still ship the whole state."""
    mix = Mix.of(np.array([50_000.0]), 100, cached_pd=49_000, cached_prfaas=49_000)
    at = operate(PAPER, mix, 500, 0)
    sent = at["egress"] / at["lambda_max"]
    assert sent == pytest.approx(PAPER.kv.state_bytes + 1000 * PAPER.kv.bytes_per_token)
    assert sent / 2**20 == pytest.approx(190.4, abs=0.1)
    assert at["theta_prfaas_compute"] == pytest.approx(4 / prefill_s(PAPER.prfaas.prefill, 1000, 49_000))


@pytest.mark.parametrize(
    "change",
    [
        {"n_prfaas": -1},
        {"n_pd": 0},
        {"b_out": 0.0},
        {"b_out": math.nan},
        {"local_bytes_per_s": -1.0},
        {"rtt_s": -0.1},
        {"rtt_s": math.inf},
        {"window_bytes": 0.0},
    ],
)
def test_impossible_systems_are_refused(change):
    with pytest.raises(InvalidInput) as error:
        dataclasses.replace(PAPER, **change)
    assert error.value.field in change


def test_prompts_beyond_a_profile_are_refused():
    long = Mix.of(np.array([131_073.0]), 10)
    short = dataclasses.replace(PAPER.pd, prefill=dataclasses.replace(PAPER.pd.prefill, max_tokens=1000))
    with pytest.raises(InvalidInput, match="131072, where profile 8xH200 paper_1t ends"):
        PAPER.operate(long, 0, 0)
    near = dataclasses.replace(PAPER, pd=short)
    with pytest.raises(InvalidInput, match="1000, where profile 8xH20 paper_1t ends"):
        near.operate(PAPER_MIX, 0, 1)
    near.operate(PAPER_MIX, 0, 0)  # it only decodes
    with pytest.raises(InvalidInput, match="ends"):
        phi_kv(PAPER.kv, PAPER.prfaas, 200_000)

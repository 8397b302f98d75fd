import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from systems import PAPER_MIX, mixes

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix


def test_the_papers_mix():
    """Figures printed in the paper, but for the last: the mean length is "about 27K"."""
    assert float(PAPER_MIX.p(19_400)) == pytest.approx(0.4957, abs=1e-4)
    long = PAPER_MIX.tokens > 19_400
    assert np.average(PAPER_MIX.tokens[long], weights=PAPER_MIX.weight[long]) == pytest.approx(45_046, rel=1e-4)
    assert np.average(PAPER_MIX.tokens[~long], weights=PAPER_MIX.weight[~long]) == pytest.approx(10_224, rel=1e-4)
    assert PAPER_MIX.mean(PAPER_MIX.tokens) == pytest.approx(27_486, rel=1e-4)


def test_points_stand_for_the_distribution():
    lengths = LogNormalLengths(8.0, 0.5, 1, 10**6)  # hardly truncated
    mix = Mix.log_normal(lengths, 100)
    assert mix.mean(mix.tokens) == pytest.approx(math.exp(8.0 + 0.125), rel=1e-4)
    assert mix.quantile(mix.tokens, 0.5) == pytest.approx(math.exp(8.0), rel=1e-4)
    assert mix.quantile(mix.tokens, 0.9) == pytest.approx(math.exp(8.0 + 0.5 * 1.2815516), rel=1e-3)
    assert mix.quantile(mix.tokens, 0) == mix.tokens[0] and mix.quantile(mix.tokens, 1) == mix.tokens[-1]
    assert (lengths.quantiles(np.array([0.0, 1.0])) == [1, 10**6]).all()


@given(mixes(), st.floats(0, 120_000))
def test_running_sums_are_sums(mix, t):
    assert mix.weight.sum() == pytest.approx(1)
    assert (np.diff(mix.uncached) >= 0).all() and (mix.uncached >= 1).all()
    assert float(mix.p(t)) == pytest.approx(mix.weight[mix.tokens - mix.cached_pd > t].sum())
    assert mix.sums(mix.tokens)[mix.row(t)] == pytest.approx((mix.weight * mix.tokens)[mix.uncached <= t].sum())
    assert mix.mean(mix.tokens) == pytest.approx(np.average(mix.tokens, weights=mix.weight))


@given(mixes(rows=40), st.integers(1, 20))
def test_bins_keep_means(mix, bins):
    binned = mix.binned(bins)
    assert len(binned.tokens) <= max(bins, 1)
    for column in ("tokens", "output", "cached_pd", "cached_prfaas"):
        assert binned.mean(getattr(binned, column)) == pytest.approx(mix.mean(getattr(mix, column)))


def test_columns_are_broadcast_and_sorted_by_what_is_left_to_compute():
    mix = Mix.of(np.array([100, 50, 80]), 10, cached_pd=np.array([90, 0, 0]))
    assert mix.tokens.tolist() == [100, 50, 80] and mix.uncached.tolist() == [10, 50, 80]
    assert mix.output.tolist() == [10, 10, 10] and mix.weight.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Mix.of(np.array([]), 1), "mix.tokens"),
        (lambda: Mix.of(np.array([[1]]), 1), "mix.tokens"),
        (lambda: Mix.of(np.array([0]), 1), "mix.tokens"),
        (lambda: Mix.of(np.array([math.inf]), 1), "mix.tokens"),
        (lambda: Mix.of(np.array([9]), 0), "mix.output"),
        (lambda: Mix.of(np.array([9]), math.nan), "mix.output"),
        (lambda: Mix.of(np.array([9, 9]), 1, np.array([1, -1])), "mix.weight"),
        (lambda: Mix.of(np.array([9]), 1, np.array([0])), "mix.weight"),
        (lambda: Mix.of(np.array([9]), 1, cached_pd=9), "mix.cached_pd"),
        (lambda: Mix.of(np.array([9]), 1, cached_prfaas=-1), "mix.cached_prfaas"),
        (lambda: LogNormalLengths(mu=math.nan), "lengths.mu"),
        (lambda: LogNormalLengths(mu=100), "lengths.mu"),
        (lambda: LogNormalLengths(sigma=0), "lengths.sigma"),
        (lambda: LogNormalLengths(low=0), "lengths.low"),
        (lambda: LogNormalLengths(low=500, high=500), "lengths.low"),
    ],
)
def test_impossible_mixes_are_refused(make, field):
    with pytest.raises(InvalidInput) as error:
        make()
    assert error.value.field == field

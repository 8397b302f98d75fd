"""What controllers remember: mixes of requests, and links that change, flap, or are down."""

import numpy as np
import pytest
from systems import PAPER, idle_view

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.planner import topology_of
from prfaas_jax.scheduling.recent import FEWEST, WINDOW, LastingRates, RecentMix
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.scheduling.view import Request

TOPOLOGY = topology_of(PAPER, 3)
FAR, NEAR = TOPOLOGY.prefill[0].name, TOPOLOGY.regions[0].name


def test_the_recent_mix_is_of_the_last_requests_and_of_the_longest_prefixes():
    recent = RecentMix()
    for _ in range(FEWEST - 1):
        recent.add(Request(100, 10))
    assert recent.mix() is None
    recent.add(Request(200, 30, cached_prefill=np.array([5, 200, 0]), cached_decode=60))
    mix = recent.mix()
    assert mix.mean(mix.tokens) == pytest.approx((100 * (FEWEST - 1) + 200) / FEWEST)
    row = int(np.argmax(mix.tokens))
    assert (mix.output[row], mix.cached_prfaas[row], mix.cached_pd[row]) == (30, 199, 60)
    for _ in range(WINDOW):
        recent.add(Request(50, 1))
    assert set(recent.mix().tokens) == {50} and recent.count == WINDOW + FEWEST


@pytest.mark.parametrize("slower", [1, 2, 3])
def test_a_link_that_changes_or_is_down_counts_as_its_mean(slower):
    """Also where each half of the wave is longer than `steady_s`, once that has been seen."""
    view, lasting = idle_view(TOPOLOGY), LastingRates(300.0, 40.0)
    seen = []
    for i in range(1, 1 + 3600 // 5):
        view.links.bytes_per_s[:] = (100.0 if 5.0 * i % (60.0 * slower) < 30.0 * slower else 5.0) * GBPS
        lasting.add(view, 5.0 * i)
        seen.append(lasting.rates[FAR, NEAR])
    assert seen[0] == 100 * GBPS
    assert all(1 - 0.15 * slower < rate / (52.5 * GBPS) < 1 + 0.15 * slower for rate in seen[180:])
    view.links.bytes_per_s[:] = 0.0
    for i in range(721, 721 + 60):
        lasting.add(view, 5.0 * i)
    assert lasting.rates[FAR, NEAR] == pytest.approx(seen[-1] / np.e)


def test_a_link_that_keeps_another_rate_counts_as_that():
    """Measured rates of a link that does not change differ a little, and for a moment much; a change runs the time anew."""
    view, lasting = idle_view(TOPOLOGY), LastingRates(300.0, 40.0)
    now = 0.0

    def after(*gbps: float) -> float:
        nonlocal now
        for rate in gbps:
            now += 5.0
            view.links.bytes_per_s[:] = rate * GBPS
            lasting.add(view, now)
        return lasting.rates[FAR, NEAR] / GBPS

    noisy = (8.0, 7.0, 9.0, 8.0)
    assert after(*[100.0] * 10) == pytest.approx(100.0)
    assert after(*noisy * 2) > 80.0 and not lasting.kept, "for 35 s"
    assert after(8.0) == pytest.approx(8.0, rel=0.05) and lasting.kept == {(FAR, NEAR)}
    # Two in a row began it anew, for a hundred seconds: a cut that came then counted late, and roles followed minutes later.
    for outliers in ((50.0,), (5.0, 5.0), (50.0, 60.0, 50.0)):
        after(*outliers)
        assert (len(outliers) == 1) is bool(lasting.kept), "more than one may be the begin of a change"
        assert after(*noisy) == pytest.approx(8.0, rel=0.05) and lasting.kept
    assert after(*[100.0] * 4) > 60.0 and not lasting.kept, "it has changed"
    lasted = 5 * (9 + 18)  # seconds
    assert after(*[100.0] * (2 * lasted // 5 - 4)) < 95.0 and not lasting.kept, "for less than twice as long as it was before"
    assert after(100.0) == pytest.approx(100.0) and lasting.kept
    after(*[100.0] * 60)
    assert after(*noisy * 2, 8.0) == pytest.approx(8.0, rel=0.05), "what lasted for minutes was no wave"
    assert after(*[6.0] * 120) == pytest.approx(6.0, rel=0.05), "and it follows what changes little by little"


@pytest.mark.parametrize(("options", "field"), [((0.0, 40.0), "window_s"), ((300.0, 0.0), "steady_s")])
def test_bad_constants_are_refused(options, field):
    with pytest.raises(InvalidInput) as error:
        LastingRates(*options)
    assert error.value.field == field

import dataclasses

import numpy as np
import pytest
from systems import PAPER, PAPER_MIX

from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.planner import topology_of
from prfaas_jax.scheduling.predictive import Prices
from prfaas_jax.scheduling.prices import placement_optimum, placement_prices
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology

MIX = PAPER_MIX.binned(32)
AMPLE = 10**6


def system(gbps: float = 100.0, n_far: int = 4, n_p: int = 3, decode: int = AMPLE) -> Topology:
    base = topology_of(dataclasses.replace(PAPER, b_out=gbps * GBPS), 3)
    (far,), (near,) = base.prefill, base.regions
    return dataclasses.replace(
        base, prefill=(dataclasses.replace(far, instances=n_far),), regions=(dataclasses.replace(near, prefill=n_p, decode=decode),)
    )


BASE = system()
FAR, NEAR = BASE.prefill[0].name, BASE.regions[0].name


def most(topology: Topology) -> float:
    return optimum(topology, MIX, 32).lambda_max


@pytest.mark.parametrize("gbps", [100.0, 8.0])
def test_prices_are_what_a_little_more_buys(gbps):
    """An instance more or less on either side of a kink bounds the price; a link can be had in any size."""
    prices = placement_prices(system(gbps), MIX)
    here = most(system(gbps))
    for name, more, less in (
        (FAR, system(gbps, n_far=5), system(gbps, n_far=3)),
        (NEAR, system(gbps, n_p=4), system(gbps, n_p=2)),
    ):
        assert most(more) - here <= prices.prefill[name] * (1 + 1e-6) + 1e-9
        assert prices.prefill[name] <= (here - most(less)) * (1 + 1e-6) + 1e-9
    step = 0.001 * gbps
    difference = (most(system(gbps + step)) - most(system(gbps - step))) / (2 * step * GBPS)
    assert prices.links[FAR, NEAR] == pytest.approx(difference, rel=0.02, abs=1e-15)


def test_a_scarce_link_has_a_price_and_an_ample_one_none():
    assert placement_prices(system(100.0), MIX).links == {(FAR, NEAR): 0.0}
    scarce = placement_prices(system(5.0), MIX)
    assert scarce.links[FAR, NEAR] > 0 and scarce.prefill[FAR] == pytest.approx(0.0, abs=1e-9) and scarce.prefill[NEAR] > 0


def test_decode_never_binds():
    assert placement_prices(system(decode=1), MIX) == placement_prices(system(decode=100), MIX)
    found = placement_optimum(system(decode=1), MIX)
    assert found.lambda_max == pytest.approx(most(BASE)) and found.bottleneck.kind in ("prfaas_compute", "local_prefill")


@pytest.mark.parametrize("rate", [0.0, 0.5, 1e-300])
def test_a_link_that_is_down_has_no_price_and_no_use(rate):
    prices = placement_prices(BASE, MIX, {(FAR, NEAR): rate})
    assert prices.links == {} and prices.prefill[FAR] == 0.0 and prices.prefill[NEAR] > 0


def test_rates_of_the_view_replace_those_of_the_topology():
    assert placement_prices(BASE, MIX, {(FAR, NEAR): 5 * GBPS}) == placement_prices(system(5.0), MIX)
    assert placement_prices(BASE, MIX, {("moon", NEAR): 0.0}) == placement_prices(BASE, MIX)


def test_regions_that_nothing_reaches_are_left_out():
    near = BASE.regions[0].instance
    two = dataclasses.replace(
        BASE,
        prefill=(*BASE.prefill, PrefillCluster("b", BASE.prefill[0].instance, 2)),
        regions=(dataclasses.replace(BASE.regions[0], decode=5), Region("e", near, 0, 3)),
        links=(*BASE.links, Link("b", "e", 50 * GBPS)),
    )
    prices = placement_prices(two, MIX)
    assert prices.links.keys() == {(FAR, NEAR), ("b", "e")} and prices.prefill["b"] > 0 and "e" not in prices.prefill
    cut = placement_prices(two, MIX, {("b", "e"): 0.0})
    assert cut.links.keys() == {(FAR, NEAR)} and cut.prefill["b"] == 0.0
    none = dataclasses.replace(BASE, regions=(dataclasses.replace(BASE.regions[0], prefill=0, decode=8),))
    down = {(FAR, NEAR): 0.0}
    assert placement_prices(none, MIX, down) == Prices({}, {}) and placement_optimum(none, MIX, down) is None


def test_prices_pay_for_every_request():
    """At the optimum, what all resources are worth is what is sustained."""
    for gbps in (100.0, 8.0):
        prices, topology = placement_prices(system(gbps), MIX), system(gbps)
        worth = sum(prices.prefill[n] * c for n, c in ((FAR, 4), (NEAR, 3))) + prices.links[FAR, NEAR] * gbps * GBPS
        assert worth == pytest.approx(most(topology), rel=1e-6)
        assert np.isfinite(worth)

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from systems import PAPER, PAPER_MIX, cases, mixes

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.planner import grid, topology_of
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology


def resource(found, kind, name=None):
    return next(r for r in found.resources if r.kind == kind and name in (None, r.name))


@settings(max_examples=60)
@given(cases(), mixes(), st.data())
def test_no_static_rule_does_better(case, mix, data):
    """In the exact reading; mixes of few rows, so that none are merged."""
    n_p = data.draw(st.integers(0, case.n_pd - 1))
    best = optimum(topology_of(case, n_p), mix).lambda_max
    t = np.array([0.0, *np.unique(mix.uncached), math.inf])
    static = case.operate(mix, t, n_p, "exact").lambda_max.max()
    shared = max(float(case.operate(mix, t[1], n_p, "exact", share).lambda_max[0]) for share in (0.3, 0.7))
    assert best >= max(static, shared) * (1 - 1e-6)
    assert best >= case.length_blind(mix, n_p, "exact") * (1 - 1e-6)


@settings(max_examples=40)
@given(cases(), mixes(), st.integers(1, 5))
def test_the_optimum_is_a_placement(case, mix, n_p):
    """Rates are in the proportions of the mix and use no more than there is."""
    assume(n_p < case.n_pd)
    found = optimum(topology_of(case, n_p), mix)
    assert found.rates.sum() == pytest.approx(found.lambda_max)
    assert found.rates.sum(1) == pytest.approx(found.lambda_max * found.mix.weight, abs=1e-6 * found.lambda_max)
    assert (found.rates >= -1e-9).all() and all(-1e-6 <= r.used <= 1 + 1e-6 for r in found.resources)
    remote = found.rates[:, [i for i, (cluster, _) in enumerate(found.paths) if cluster]].sum(1)
    assert found.egress == pytest.approx(remote @ case.kv.bytes_of(found.mix.tokens, found.mix.cached_pd), rel=1e-6, abs=1)
    assert ((found.offloaded() >= -1e-9) & (found.offloaded() <= 1 + 1e-9)).all()


def test_the_case_study():
    found = optimum(topology_of(PAPER, 3), PAPER_MIX)
    plan = grid(PAPER, PAPER_MIX, "exact")
    assert plan.lambda_max <= found.lambda_max <= 1.002 * plan.lambda_max
    assert resource(found, "egress").used == pytest.approx(found.egress / (100 * GBPS))
    assert found.bottleneck.kind == "prfaas_compute"
    offloaded = found.offloaded()
    assert offloaded[0] == 0 and offloaded[-1] == 1  # short ones stay, long ones go


@pytest.mark.parametrize("gbps", [5, 9, 12, 100])
def test_prices_are_what_a_little_more_buys(gbps):
    """Duals against one more of a thousandfold system, where one is little."""
    mix, many = PAPER_MIX.binned(64), 1000
    small = optimum(topology_of(dataclasses.replace(PAPER, b_out=gbps * GBPS), 4), mix)
    case = dataclasses.replace(PAPER, b_out=gbps * GBPS * many, n_prfaas=4 * many, n_pd=8 * many)
    topology = topology_of(case, 4 * many)
    found = optimum(topology, mix)
    assert found.lambda_max == pytest.approx(many * small.lambda_max)
    (far,), (near,), (link,) = topology.prefill, topology.regions, topology.links
    for kind, more in {
        "prfaas_compute": {"prefill": (dataclasses.replace(far, instances=far.instances + 1),)},
        "local_prefill": {"regions": (dataclasses.replace(near, prefill=near.prefill + 1),)},
        "decode": {"regions": (dataclasses.replace(near, decode=near.decode + 1),)},
        "egress": {"links": (dataclasses.replace(link, bytes_per_s=link.bytes_per_s + GBPS),)},
    }.items():
        gain = optimum(dataclasses.replace(topology, **more), mix).lambda_max - found.lambda_max
        assert resource(small, kind).price == pytest.approx(gain, rel=0.02, abs=1e-3), kind
    # What is not in use whole has no price, and together the prices are worth Lambda_max: the program's dual.
    assert all(r.price < 1e-6 or r.used > 1 - 1e-6 for r in small.resources)
    assert sum(r.price * r.capacity for r in small.resources) == pytest.approx(small.lambda_max)


def test_several_clusters_and_regions():
    """Two halves, each with its own link, sustain twice what one does; a link between them can only help."""
    half = dataclasses.replace(PAPER, n_prfaas=2, n_pd=4, b_out=3 * GBPS)
    mix = PAPER_MIX.binned(32)
    one = optimum(topology_of(half, 2), mix).lambda_max
    clusters = tuple(PrefillCluster(f"c{i}", PAPER.prfaas, 2) for i in range(2))
    regions = tuple(Region(f"r{i}", PAPER.pd, 2, 2) for i in range(2))
    links = [Link(f"c{i}", f"r{i}", 3 * GBPS) for i in range(2)]
    two = optimum(Topology(PAPER.kv, clusters, regions, tuple(links)), mix)
    assert two.lambda_max == pytest.approx(2 * one, rel=1e-6)
    assert len(two.paths) == 4 and (None, "r0") in two.paths and ("c0", "r1") not in two.paths
    wider = optimum(Topology(PAPER.kv, clusters, regions, (*links, Link("c0", "r1", GBPS))), mix)
    assert two.lambda_max + 0.1 < wider.lambda_max < two.lambda_max + 0.4
    assert {r.name for r in wider.resources if r.price > 0} >= {"c0->r0", "c1->r1", "c0->r1"}


def test_decode_memory_sends_the_long_contexts_where_there_is_room():
    """A region of few slots and much memory, another of many slots and little: each gets what it can hold."""
    mix = Mix.of(np.array([1000.0, 100_000.0]), 1000)
    sizes = [PAPER.kv.bytes(n + 1000) for n in (1000, 100_000)]
    roomy = dataclasses.replace(PAPER.pd, max_batch=4, kv_memory_bytes=4 * sizes[1])
    tight = dataclasses.replace(PAPER.pd, max_batch=12, kv_memory_bytes=12 * sizes[0])
    cluster = PrefillCluster("far", PAPER.prfaas, 1000)
    regions = (Region("roomy", roomy, 0, 1), Region("tight", tight, 0, 1))
    links = tuple(Link("far", r.name, 1e15) for r in regions)
    found = optimum(Topology(PAPER.kv, (cluster,), regions, links), mix)
    long = found.rates[1]
    by_region = {region: rate for (_, region), rate in zip(found.paths, long, strict=True)}
    assert by_region["roomy"] > 3 * by_region["tight"]
    assert resource(found, "decode_memory", "tight").used == pytest.approx(1)
    alone = optimum(topology_of(dataclasses.replace(PAPER, pd=dataclasses.replace(PAPER.pd, kv_memory_bytes=sizes[1])), 0), mix)
    assert alone.bottleneck.kind == "decode_memory"


def test_host_links_bind():
    for side, name in (("prfaas", "prfaas"), ("pd", "pd ingress")):
        capped = dataclasses.replace(PAPER, **{side: dataclasses.replace(getattr(PAPER, side), nic_bytes_per_s=1e8)})
        found = optimum(topology_of(capped, 3), PAPER_MIX)
        assert resource(found, "egress", name).used == pytest.approx(1)
        assert resource(found, "egress", name).price > 0 and found.lambda_max < 3.1


def test_without_a_prfaas_cluster_it_is_the_pd_cluster():
    alone = dataclasses.replace(PAPER, n_prfaas=0, n_pd=12)
    found = optimum(topology_of(alone, 9), PAPER_MIX)
    assert found.lambda_max == pytest.approx(grid(alone, PAPER_MIX, "exact").lambda_max, rel=2e-3)
    assert found.egress == 0 and not found.offloaded().any()


def test_prompts_beyond_a_profile_are_refused():
    with pytest.raises(InvalidInput, match="ends"):
        optimum(topology_of(PAPER, 3), Mix.of(np.array([140_000.0]), 10))


TOPOLOGY = topology_of(PAPER, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill": TOPOLOGY.prefill * 2}, "topology names"),
        ({"prefill": (dataclasses.replace(TOPOLOGY.prefill[0], instances=0),)}, "prfaas.instances=0"),
        ({"prefill": (dataclasses.replace(TOPOLOGY.prefill[0], instances=1.5),)}, "prfaas.instances=1.5"),
        ({"regions": ()}, "topology.regions"),
        ({"regions": (dataclasses.replace(TOPOLOGY.regions[0], prefill=-1),)}, "pd.prefill=-1"),
        ({"regions": (dataclasses.replace(TOPOLOGY.regions[0], decode=0),)}, "pd.decode=0"),
        ({"regions": (dataclasses.replace(TOPOLOGY.regions[0], local_bytes_per_s=0),)}, "pd.local_bytes_per_s=0"),
        ({"regions": (dataclasses.replace(TOPOLOGY.regions[0], instance=PAPER.prfaas),)}, "pd.instance.decode=None"),
        ({"links": (Link("prfaas", "elsewhere", 1.0),)}, "topology.links=('prfaas', 'elsewhere')"),
        ({"links": (Link("prfaas", "pd", math.inf),)}, "link prfaas->pd.bytes_per_s=inf"),
        ({"links": (Link("prfaas", "pd", 1.0, rtt_s=-1),)}, "link prfaas->pd.rtt_s=-1"),
        ({"links": (Link("prfaas", "pd", 1.0, window_bytes=0),)}, "link prfaas->pd.window_bytes=0"),
        ({"links": TOPOLOGY.links * 2}, "at most one link"),
        ({"links": (), "regions": (dataclasses.replace(TOPOLOGY.regions[0], prefill=0),)}, "pd.prefill=0"),
    ],
)
def test_impossible_topologies_are_refused(change, message):
    with pytest.raises(InvalidInput) as error:
        dataclasses.replace(TOPOLOGY, **change)
    assert message in str(error.value)

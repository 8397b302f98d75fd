"""The paper's case study and small random systems, for the tests of the throughput model, the planner, the program and the policies."""

import numpy as np
from hypothesis import strategies as st

from configs.studies import case_study, mix_of
from configs.studies.paper_case import get_config
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill, Instance, MeasuredPrefill
from prfaas_jax.scheduling.throughput import CaseStudy
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology
from prfaas_jax.scheduling.view import ClusterView, Links, Load, Servers

PAPER = case_study(get_config())
PAPER_MIX = mix_of(get_config())

KV = KvFootprint(182_353_920, 17_280)
FAST = Instance("fast", FittedPrefill(0.48, 0.4, 0.01))
SLOW = Instance("slow", FittedPrefill(0.5, 1.3, 0.03), FittedDecode(0.025), max_batch=20)
TABLE = Instance("table", MeasuredPrefill((1000, 10_000, 131_072), (0.2, 1.0, 20.0)), FittedDecode(0.02), max_batch=10)
CHUNK = 8192
ONE = Topology(KV, (PrefillCluster("p", FAST, 4),), (Region("d", SLOW, 3, 5, 800 * GBPS),), (Link("p", "d", 100 * GBPS, 0.1),))
# Two clusters of two kinds, two regions of two kinds; no link from q to d; e has but a quarter of the rate for one transfer.
FOUR = Topology(
    KV,
    (PrefillCluster("p", FAST, 2), PrefillCluster("q", TABLE, 1)),
    (Region("d", SLOW, 1, 2, 400 * GBPS), Region("e", TABLE, 1, 2, 800 * GBPS)),
    (Link("p", "d", 40 * GBPS, 0.02), Link("p", "e", 40 * GBPS, 0.1, 0.1 * 10 * GBPS), Link("q", "e", 80 * GBPS)),
)


@st.composite
def mixes(draw: st.DrawFn, rows: int = 12, cached: bool = True) -> Mix:
    """At most as many rows as the linear program keeps, so that it is exact."""
    n = draw(st.integers(1, rows))

    def column(low: int, high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    tokens = column(64, 100_000)
    held = [(tokens * column(0, 90) // 100) if cached else 0 for _ in range(2)]
    return Mix.of(tokens, column(1, 2000), column(1, 9), *held)


@st.composite
def instances(draw: st.DrawFn, name: str) -> Instance:
    """Any hardware; memory and host links bind now and then."""
    prefill = FittedPrefill(draw(st.floats(0.01, 1)), draw(st.floats(0.1, 3)), draw(st.floats(0, 0.1)))
    decode = FittedDecode(draw(st.floats(0.005, 0.05)), draw(st.floats(0, 0.001)), draw(st.floats(0, 1e-7)))
    memory = draw(st.sampled_from([float("inf"), 2e10, 2e11]))
    nic = draw(st.sampled_from([float("inf"), 1e8, 1e9]))
    return Instance(name, prefill, decode, draw(st.integers(1, 64)), memory, nic)


@st.composite
def cases(draw: st.DrawFn) -> CaseStudy:
    """One PrfaaS cluster and one PD cluster."""
    kv = KvFootprint(draw(st.integers(0, 10**8)), draw(st.integers(1, 10**5)), ((128, draw(st.integers(0, 10**5))),))
    link = draw(st.floats(1e7, 1e10))
    return CaseStudy(kv, draw(instances("far")), draw(instances("near")), draw(st.integers(1, 5)), draw(st.integers(2, 6)), link, 1e11)


def idle_view(topology: Topology) -> ClusterView:
    """What a driver would show of the topology while nothing runs in it; its columns may be written into."""

    def servers(names: list[str], prefill: list[int], slots: list[int]) -> Servers:
        load = Load.idle(len(names))
        load.instances[:], load.slots[:] = prefill, slots
        return Servers(tuple(names), np.ones(len(names), bool), np.zeros(len(names), np.int64), load)

    far = servers([c.name for c in topology.prefill], [c.instances for c in topology.prefill], [0] * len(topology.prefill))
    slots = [r.decode * r.instance.max_batch for r in topology.regions]
    near = servers([r.name for r in topology.regions], [r.prefill for r in topology.regions], slots)
    links = Links.none(len(far.names), len(near.names))
    for x in topology.links:
        pair = far.names.index(x.prefill), near.names.index(x.decode)
        links.bytes_per_s[pair], links.transfer_bytes_per_s[pair], links.rtt_s[pair] = x.bytes_per_s, x.transfer_bytes_per_s, x.rtt_s
    return ClusterView(far, near, links)

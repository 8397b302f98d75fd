import dataclasses
import itertools
import time

import pytest
from systems import PAPER, PAPER_MIX

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.planner import best_roles, topology_of
from prfaas_jax.scheduling.sizing import cheapest, with_counts
from prfaas_jax.scheduling.topology import GBPS

MIX = PAPER_MIX.binned(16)
TOPOLOGY = topology_of(PAPER, 0)


def numbers(topology):
    return {c.name: c.instances for c in topology.clusters}


@pytest.mark.parametrize("memory", [float("inf"), 4e10], ids=["slots bind", "memory binds"])
def test_the_cheapest_system_for_a_rate(memory):
    topology = topology_of(dataclasses.replace(PAPER, pd=dataclasses.replace(PAPER.pd, kv_memory_bytes=memory)), 0)
    found = cheapest(topology, MIX, 1.5, {"prfaas": 3, "pd": 8})
    assert found is not None and found[1].lambda_max >= 1.5 and found[1].lambda_max == best_roles(found[0], MIX)[1].lambda_max
    for far, near in itertools.product(range(4), range(1, 9)):
        if 2 * far + near < found[0].cost_per_hour and far + near > 1:
            assert best_roles(with_counts(topology, {"prfaas": far, "pd": near}), MIX)[1].lambda_max < 1.5


def test_where_the_link_is_slow_or_the_cluster_dear_there_is_no_prefill_cluster():
    dear = dataclasses.replace(PAPER, prfaas=dataclasses.replace(PAPER.prfaas, cost_per_hour=20.0))
    for case in (dear, dataclasses.replace(PAPER, b_out=0.01 * GBPS)):
        found = cheapest(topology_of(case, 0), MIX, 1.0, {"prfaas": 2, "pd": 8})
        assert found is not None and numbers(found[0]) == {"pd": 7} and not found[0].links and found[0].regions[0].prefill > 0
    assert best_roles(with_counts(TOPOLOGY, {"prfaas": 0, "pd": 6}), MIX)[1].lambda_max < 1.0


def test_a_rate_beyond_all_of_them():
    assert cheapest(TOPOLOGY, MIX, 50.0, {"prfaas": 2, "pd": 2}) is None


def test_the_papers_case_takes_a_moment():
    started = time.process_time()
    found = cheapest(TOPOLOGY, PAPER_MIX, 3.0, {"prfaas": 8, "pd": 16})
    assert found is not None and found[0].cost_per_hour == 15.0
    assert time.process_time() - started < 5.0


def test_counts_of_zero_take_the_links_along():
    assert with_counts(TOPOLOGY, {}) == TOPOLOGY
    alone = with_counts(TOPOLOGY, {"prfaas": 0})
    assert (alone.prefill, alone.links) == ((), ()) and (alone.regions[0].prefill, alone.regions[0].decode) == (1, 7)
    with pytest.raises(InvalidInput, match=r"pd\.decode=0"):
        with_counts(TOPOLOGY, {"prfaas": 0, "pd": 1})


@pytest.mark.parametrize(
    ("most", "rate", "field"),
    [
        ({"prfaas": 2}, 1.0, "most"),
        ({"prfaas": 2, "pd": 0}, 1.0, "most"),
        ({"prfaas": 20, "pd": 20}, 1.0, "most"),
        ({"prfaas": 2, "pd": 2}, 0.0, "requests_per_s"),
        ({"prfaas": 2, "pd": 2}, float("nan"), "requests_per_s"),
    ],
)
def test_bad_input_names_the_field(most, rate, field):
    with pytest.raises(InvalidInput) as error:
        cheapest(TOPOLOGY, MIX, rate, most)
    assert error.value.field == field

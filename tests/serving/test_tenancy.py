"""Whose request it is: whatever the policy and the state of the servers, a resident tenant's KV stays, and a quota counts rightly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import Exhausted, InvalidInput
from prfaas_jax.scheduling.policies import make_policy
from prfaas_jax.scheduling.view import NoDecodeServer, Placement
from prfaas_jax.serving.breaker import Breaker
from prfaas_jax.serving.deployment import ClusterServers, Tenant
from prfaas_jax.serving.dispatcher import Dispatcher, Rollout
from prfaas_jax.serving.fleet import FleetOptions, Server
from prfaas_jax.serving.proto import common_pb2, generation_pb2, prefill_pb2
from prfaas_jax.serving.tenancy import Tenancy
from prfaas_jax.transfer.security import NONE

OPTIONS = FleetOptions()
REGIONS = ("east", "west")
CLUSTERS = (
    ClusterServers("far", "prefill", ("127.0.0.1:10", "127.0.0.1:11")),
    ClusterServers("farther", "prefill", ("127.0.0.1:12",)),
    ClusterServers("east", "region", ("127.0.0.1:20",), ("127.0.0.1:21", "127.0.0.1:22")),
    ClusterServers("west", "region", ("127.0.0.1:30",), ("127.0.0.1:31",)),
)
POLICIES = (
    ("always_remote", {}),
    ("always_local", {}),
    ("threshold", {"tokens": 100}),
    ("reverse", {"tokens": 100}),
    ("length_blind", {"share": 0.5}),
    ("paper_prefix", {"tokens": 100}),
    ("cache_hit_rule", {}),
)
TENANTS = {"bank": Tenant(None, ("east",)), "clinic": Tenant(None, ("west", "east"))}


def dispatcher(policy, state) -> Dispatcher:
    """Over servers that are up or not, with so many requests each."""
    made = Dispatcher(
        policy, None, CLUSTERS, None, OPTIONS, NONE, Tenancy(TENANTS), Rollout(), lambda action: None, lambda seconds, reason: None
    )
    for cluster in CLUSTERS:
        for role in ("prefill", "decode"):
            for address in getattr(cluster, role):
                up, queue = state[address]
                server = Server(cluster.name, role, address, None, Breaker(OPTIONS))
                made.fleet._servers[role, address] = server
                instance = common_pb2.EngineStatus.PrefillInstance(free_in_s=queue, jobs=queue)
                engine = common_pb2.EngineStatus(instances=[instance], running=queue, decode_slots=8)
                kind = prefill_pb2.PrefillStatus if role == "prefill" else generation_pb2.GenerationStatus
                made.fleet._heard(server, kind(engine=engine, draining=not up))
    return made


STATES = st.fixed_dictionaries(
    {a: st.tuples(st.booleans(), st.integers(0, 9)) for c in CLUSTERS for a in (*c.prefill, *c.decode)},
)


@settings(max_examples=300, deadline=None)
@given(policy=st.sampled_from(POLICIES), state=STATES, tenant=st.sampled_from([*TENANTS, "anybody", ""]), tokens=st.integers(1, 300))
def test_no_server_outside_its_regions_is_ever_named_for_a_resident_tenant(policy, state, tenant, tokens):
    request = generation_pb2.GenerateRequest(max_new_tokens=1, tenant=tenant)
    request.token_ids.ids[:] = [1] * tokens
    regions = TENANTS.get(tenant, Tenant()).regions
    there = {r: {a for c in CLUSTERS if c.name == r for a in (*c.prefill, *c.decode)} for r in REGIONS}
    try:
        made = dispatcher(make_policy(policy[0], **policy[1]), state).decide(request)
    except NoDecodeServer:
        takes = [c.name for c in CLUSTERS if any(state[a][0] for a in c.decode)]
        assert not set(takes) & set(regions or REGIONS)
        return
    assert state[made.decode.address][0]
    named = [request.placement.prefill_address, *request.placement.alternatives]
    if regions:
        assert made.decode.cluster in regions
        assert {a for a in named if a} <= there[made.decode.cluster]
        assert request.placement.prefill_cluster == request.placement.decode_cluster == made.decode.cluster
    assert all(state[a][0] for a in named if a), "and nobody is sent to a server that takes nothing"


def test_a_policy_that_does_not_look_is_stopped():
    class Blind:
        def place(self, request, view, now):
            return Placement("far", "east", "blind")

    request = generation_pb2.GenerateRequest(max_new_tokens=1, tenant="bank")
    request.token_ids.ids[:] = [1]
    state = {a: (True, 0) for c in CLUSTERS for a in (*c.prefill, *c.decode)}
    with pytest.raises(InvalidInput, match="tenant bank"):
        dispatcher(Blind(), state).decide(request)


def test_the_masked_view_follows_the_one_it_masks():
    tenancy = Tenancy(TENANTS)
    live = dispatcher(make_policy("always_local"), {a: (True, 0) for c in CLUSTERS for a in (*c.prefill, *c.decode)}).live
    view = live.at(live.now)
    masked = tenancy.view("bank", view)
    assert tenancy.view("anybody", view) is view and tenancy.view("bank", view) is masked
    assert masked.decode.healthy.tolist() == [True, False] and not masked.prefill.healthy.any()
    view.decode.healthy[0] = False
    view.decode.queue[0] = 5
    assert tenancy.view("bank", view).decode.healthy.tolist() == [False, False]
    assert masked.decode.queue[0] == 5 and np.shares_memory(masked.decode.load.table, view.decode.load.table)


@given(st.lists(st.booleans(), max_size=30))
def test_a_quota_counts_what_runs(steps):
    tenancy = Tenancy({"busy": Tenant(3)})
    running = []
    for begin in steps:
        if begin and len(running) < 3:
            context = tenancy.running("busy")
            context.__enter__()
            running.append(context)
        elif begin:
            with pytest.raises(Exhausted, match="max_running=3"), tenancy.running("busy"):
                raise AssertionError("let in")
        elif running:
            running.pop().__exit__(None, None, None)
    with tenancy.running("other"):
        pass


def test_a_request_that_comes_back_is_one_of_its_tenants_still():
    tenancy = Tenancy({"busy": Tenant(1)})
    with tenancy.running("busy", "mine"):
        # Or one id would be a way around the quota, as many calls as there are servers.
        third = pytest.raises(Exhausted, match="calls for request mine")
        with tenancy.running("busy", "mine"), third, tenancy.running("busy", "mine"):
            raise AssertionError("let in")
        with pytest.raises(Exhausted), tenancy.running("busy", "another"):
            raise AssertionError("let in")
    with tenancy.running("busy", "another"):
        pass

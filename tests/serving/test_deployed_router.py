"""A router of a whole deployment: who may do what, which clusters are linked, how far the policy is trusted."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from serving_fixtures import (
    SPEC,
    decode_engine,
    decode_server,
    error_of,
    eventually,
    generate,
    generation_status,
    greedy,
    of_clusters,
    prefill_server,
    prompt_of,
    request,
)

from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote
from prfaas_jax.scheduling.view import Placement
from prfaas_jax.serving.client import retry_after_s
from prfaas_jax.serving.deployment import ClusterServers, Deployment, Scale, Tenant
from prfaas_jax.testing.relay import Relay

NOBODY = "127.0.0.1:9"


def deployed(**fields) -> Deployment:
    """A deployment of which only who may do what matters."""
    from ml_collections import ConfigDict

    from configs.clusters import load_deployment

    cluster = {"far": {"kind": "prefill", "prefill": 1}, "home": {"kind": "region", "prefill": 1, "decode": 1}}
    system = {"checkpoint": "random:qwen3_toy", "clusters": cluster, "links": {"far->home": {"gbps": 1.0}}, "parameter": 100.0}
    return load_deployment(ConfigDict(system | fields))


class Noting(AlwaysLocal):
    """Remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def place(self, request, view, now):
        self.asked.append((request.tokens, request.output_tokens))
        return super().place(request, view, now)


def test_policies_and_controllers_see_the_outputs_of_the_model():
    """As live ones, where one stands for 64, decoding looked cheap: roles were exchanged for nothing."""
    policy = Noting()
    with decode_server() as decode:
        clusters = (ClusterServers("far", "prefill", (), ()), ClusterServers("home", "region", (), (decode.address,)))
        with of_clusters(policy, clusters, dataclasses.replace(deployed(), scale=Scale(tokens=64))) as front:
            generate(front.address, request(prompt_of(5), 17))
    assert policy.asked == [(5, 1025)]


def test_a_canary_share_of_what_would_be_offloaded_is():
    with prefill_server() as far, decode_server() as decode:
        clusters = (ClusterServers("far", "prefill", (far.address,)), ClusterServers("home", "region", (), (decode.address,)))
        with of_clusters(AlwaysRemote(), clusters, deployed(canary_share=0.3)) as front:
            usages = [generate(front.address, request(prompt_of(5), request_id=f"request {i}")).usage for i in range(40)]
            remote = sum(usage.placement == "remote" for usage in usages)
            assert 4 <= remote <= 22
            assert all(usage.reason.startswith("canary") for usage in usages if usage.placement == "local")
            decisions = generation_status(front.address).decisions
            assert decisions["local: canary"] == 40 - remote


def test_a_shadow_policy_is_asked_and_changes_nothing():
    with prefill_server() as far, decode_server() as decode:
        clusters = (ClusterServers("far", "prefill", (far.address,)), ClusterServers("home", "region", (), (decode.address,)))
        with of_clusters(AlwaysLocal(), clusters, deployed(shadow="threshold", shadow_parameter=100.0)) as front:
            assert {generate(front.address, request(prompt_of(n))).usage.placement for n in (50, 150, 250)} == {"local"}
            decisions = generation_status(front.address).decisions
            assert (decisions["shadow remote: threshold"], decisions["shadow local: threshold"]) == (2, 1)


def test_the_kv_of_a_resident_tenant_stays_and_a_quota_is_a_tenants_own():
    tenants = {"bank": {"max_running": 0, "regions": ("home",)}, "busy": {"max_running": 1, "regions": ()}}
    with (
        Relay(NOBODY) as lane,
        prefill_server(advertise_lane=lane.address) as far,
        decode_server(decode_engine(step_s=0.05)) as decode,
    ):
        lane.set_target(far.lane_addresses[0])
        clusters = (ClusterServers("far", "prefill", (far.address,)), ClusterServers("home", "region", (), (decode.address,)))
        deployment = deployed(tenants=tenants)
        assert deployment.tenants["bank"] == Tenant(None, ("home",))
        with of_clusters(AlwaysRemote(), clusters, deployment) as front, ThreadPoolExecutor(1) as pool:
            for length in (5, 50, 500):
                assert generate(front.address, request(prompt_of(length), tenant="bank")).usage.placement == "local"
            assert lane.passed() == 0, "not a byte of it has left"
            assert generate(front.address, request(prompt_of(50), tenant="other")).usage.placement == "remote"
            assert lane.passed() > SPEC.bytes(50)
            running = pool.submit(generate, front.address, request(prompt_of(50), 40, tenant="busy"))
            eventually(lambda: generation_status(decode.address).streams == 1)
            error = error_of(front.address, request(prompt_of(50), tenant="busy"))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "tenant busy" in error.details()
            assert retry_after_s(error) is not None
            assert generate(front.address, request(prompt_of(50), tenant="other")).tokens
            assert running.result(20).tokens == greedy(prompt_of(50), 40)


class Named:
    """A policy that always names the same clusters."""

    def __init__(self, prefill, decode):
        self._placement = Placement(prefill, decode, "named")

    def place(self, request, view, now):
        return self._placement


@pytest.mark.parametrize(("links", "used"), [({"linked->home": {"gbps": 1.0}}, "linked"), ({}, "home")])
def test_a_prefill_cluster_without_a_route_to_the_region_is_not_used_for_it(links, used):
    """A policy that knows only loads names it; another one that has a route takes the request, else it stays."""
    clusters = {name: {"kind": "prefill", "prefill": 1} for name in ("other", "linked")}
    clusters |= {name: {"kind": "region", "prefill": 1, "decode": 1} for name in ("home", "away")}
    deployment = deployed(clusters=clusters, links=links | {"other->away": {"gbps": 1.0}})
    with prefill_server() as other, prefill_server() as linked, decode_server() as decode:
        servers = (
            ClusterServers("other", "prefill", (other.address,)),
            ClusterServers("linked", "prefill", (linked.address,)),
            ClusterServers("home", "region", (), (decode.address,)),
            ClusterServers("away", "region", (), (NOBODY,)),
        )
        with of_clusters(Named("other", "home"), servers, deployment) as front:
            usage = generate(front.address, request(prompt_of(60))).usage
            assert usage.prefill_cluster == used and "no open way to other" in usage.reason

"""configs/clusters: what a live system's fields become, and which of them are refused; and the file with its servers' addresses."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import clusters
from configs.clusters import load_deployment
from configs.clusters.paper_profiled import get_config as paper_profiled
from configs.clusters.three_regions_cpu import get_config as three_regions
from configs.clusters.two_sites_cpu import get_config as two_sites
from configs.studies import runs_of
from configs.studies.paper_case import get_config as paper_case
from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import PriceController
from prfaas_jax.scheduling.policies import AlwaysLocal, LengthBlind, Threshold
from prfaas_jax.scheduling.predictive import ShadowPrice
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.serving.deployment import ClusterServers, Tenant, read_servers, servers_json
from prfaas_jax.testing.certificates import CertificateOptions, make_certificates

NAMES = sorted(p.stem for p in Path(clusters.__file__).parent.glob("*.py") if p.stem != "__init__")


def changed(make, fields):
    config = make()
    with config.unlocked():
        for path, value in fields.items():
            *parents, last = path.split("/")
            at = config
            for name in parents:
                at = at[name]
            at[last] = value
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_locked_and_again_from_json(name):
    config = importlib.import_module(f"configs.clusters.{name}").get_config().lock()
    deployment = load_deployment(config)
    assert {c.kind for c in deployment.clusters} == {"prefill", "region"} and deployment.links
    assert (deployment.workload is not None) == (deployment.rate > 0)
    # As a router reads it.
    again = load_deployment(ConfigDict(json.loads(json.dumps(deployment.config))))
    skipped = {"mix", "config", "workload"}
    for field in dataclasses.fields(deployment):
        if field.name not in skipped:
            assert getattr(again, field.name) == getattr(deployment, field.name), field.name
    assert again.build_policy(again.policy, again.parameter)[0] is not None


def test_the_papers_system_is_the_studys():
    deployment, run = load_deployment(paper_profiled()), runs_of(changed(paper_case, {"load": 0.7}), [0])[0]
    assert deployment.topology == run.ground.topology and deployment.sim == run.ground.options
    assert deployment.rate == pytest.approx(0.7 * 3.25, rel=2e-3)
    assert (deployment.mix.tokens == run.ground.mix.tokens).all() and (deployment.mix.output == run.ground.mix.output).all()
    planned = load_deployment(changed(paper_profiled, {"parameter": -1.0}))
    assert planned.parameter == run.parameter == 19_400.0
    assert deployment.workload.process.rate == deployment.rate


def test_scales_reach_the_link():
    deployment = load_deployment(
        changed(paper_profiled, {"time_scale": 3.0, "links/prfaas->pd/rtt_ms": 60.0, "links/prfaas->pd/window_mib": 16.0})
    )
    (link,) = deployment.links
    assert (link.bytes_per_s, link.rtt_s, link.window_bytes) == (100 * GBPS, pytest.approx(0.06), 2**24)
    assert (deployment.scale.link_gbps(link), deployment.scale.link_rtt_ms(link)) == (pytest.approx(0.3), pytest.approx(20.0))


def test_fields_reach_the_clusters():
    fields = {
        "clusters/far/prefill_engine": {"chunk": 128},
        "clusters/home/decode_server": {"lanes": 1},
        "clusters/home/environment": {"OMP_NUM_THREADS": 1},
        "tenants": {"clinic": {"max_running": 4, "regions": ("home",)}, "shop": {}},
        "canary_share": 0.25,
        "shadow": "always_remote",
    }
    deployment = load_deployment(changed(two_sites, fields))
    (far,), (home,) = deployment.prefill, deployment.regions
    assert (far.prefill_engine.chunk, home.prefill_engine.chunk, far.prefill_engine.checkpoint) == (128, 256, "random:qwen3_toy")
    assert (home.decode_server, home.environment) == ({"lanes": 1}, {"OMP_NUM_THREADS": "1"})
    assert deployment.tenants == {"clinic": Tenant(4, ("home",)), "shop": Tenant()}
    assert (deployment.canary_share, deployment.shadow, deployment.topology, deployment.ground) == (0.25, "always_remote", None, None)


def test_real_engines_with_profiles_can_be_predicted():
    profile = {"name": "toy", "prefill": {"start_s": 0.01, "linear_s": 0.5}, "decode": {"base_s": 0.01}, "max_batch": 8}
    fields = {f"clusters/{name}/profile": profile for name in ("far", "home")}
    deployment = load_deployment(changed(two_sites, fields | {"policy": "shadow_price"}))
    policy, controller = deployment.build_policy("shadow_price")
    assert isinstance(policy, ShadowPrice) and isinstance(controller, PriceController)
    assert deployment.topology.kv.bytes_per_token == 2048  # of float32, as the engines have it


def test_policies_that_need_no_profile():
    deployment = load_deployment(two_sites())
    assert deployment.build_policy("always_local") == (AlwaysLocal(), None)
    assert deployment.build_policy("threshold", 7.0) == (Threshold(7), None)
    assert deployment.build_policy("length_blind", 0.3)[0] == LengthBlind(0.3)
    with pytest.raises(InvalidInput, match="policy='best'"):
        deployment.build_policy("best")


def test_security_is_read_and_named(tmp_path):
    certificates = CertificateOptions(str(tmp_path / "certs"))
    make_certificates(certificates)
    security = {name: value for name, value in dataclasses.asdict(certificates.security("router")).items() if value}
    assert load_deployment(changed(two_sites, {"security": security})).security.tls
    for field, value in (("tls_key", security["tls_ca"]), ("tls_cert", "")):
        with pytest.raises(InvalidInput) as error:
            load_deployment(changed(two_sites, {"security": security | {field: value}}))
        assert error.value.field == f"config.security.{field}"


JAX = [
    ("engine", "torch"),
    ("checkpoint", ""),
    ("checkpoint", "random:gpt_toy"),
    ("model", "qwen3_toy"),
    ("time_scale", 2.0),
    ("byte_scale", 0.5),
    ("token_scale", 2),
    ("unknown", 1),
    ("requests", 0),
    ("requests", 1.5),
    ("rate", -1.0),
    ("load", 0.0),
    ("canary_share", 1.5),
    ("policy", "best"),
    ("policy", "shadow_price"),
    ("policy", "least_ttft"),
    ("shadow", "best"),
    ("shadow_parameter", -1.0, {"shadow": "threshold"}),
    ("parameter", -1.0),
    ("sim.control_s", 0.0),
    ("sim.unknown", 1),
    ("workload.sigma", 0.0),
    ("workload.output_tokens", 0),
    ("workload.arrivals", "steady"),
    ("workload.unknown", 1),
    ("engine_options.chunk", 100),
    ("engine_options.checkpoint", "random:qwen3_toy"),
    ("engine_options.unknown", 1),
    ("router.max_requests", 0),
    ("router.decode", "127.0.0.1:1"),
    ("router.unknown", 1),
    ("security.unknown", 1),
    ("security.token_file", "token"),
    ("clusters.far.kind", "far"),
    ("clusters.far.prefill", 0),
    ("clusters.far.prefill", "two"),
    ("clusters.far.decode", 1),
    ("clusters.far.unknown", 1),
    ("clusters.far.profile", "h300"),
    ("clusters.far.profile", 7),
    ("clusters.far.prefill_engine.page_size", 3),
    ("clusters.far.prefill_server.lease_s", 0.0),
    ("clusters.far.prefill_server.lease_s", "long"),
    ("clusters.far.prefill_server.pace_gbps", "fast"),
    ("clusters.far.prefill_engine.pages", 1.5),
    ("clusters.far.prefill_server.advertise_lane", "127.0.0.1:1"),
    ("clusters.far.convertible", True),
    ("clusters.home.convertible", True, {"clusters/home/prefill_engine": {"chunk": 64}}),
    ("clusters.home.decode", 0),
    ("clusters.home.local_gbps", math.inf),
    ("clusters.home.profile", "h200_paper_1t"),
    ("clusters.home.decode_server.site", "elsewhere"),
    ("tenants.shop.regions", ("far",)),
    ("tenants.shop.max_running", -1),
]


@pytest.mark.parametrize("case", JAX, ids=lambda case: f"{case[0]}={case[1]}")
def test_impossible_systems_are_refused_by_name(case):
    field, value, *more = case
    fields = {"tenants": {"shop": {}}} if field.startswith("tenants") else dict(*more)
    config = changed(two_sites, fields)
    with config.unlocked():
        *parents, last = field.split(".")
        at = config
        for name in parents:
            at[name] = at.get(name) or {}
            at = at[name]
        with at.ignore_type():
            at[last] = value
    with pytest.raises(InvalidInput) as error:
        load_deployment(config)
    assert error.value.field.startswith(f"config.{field}")


@pytest.mark.parametrize(
    ("make", "fields", "named"),
    [
        (paper_profiled, {"checkpoint": "random:qwen3_toy"}, "config.checkpoint"),
        (paper_profiled, {"model": "paper_2t"}, "config.model"),
        (paper_profiled, {"engine_options": {"chunk": 64}}, "config.engine_options"),
        (paper_profiled, {"byte_scale": 2.0}, "config.byte_scale"),
        (paper_profiled, {"time_scale": 0.0}, "config.time_scale"),
        (paper_profiled, {"token_scale": 0}, "config.token_scale"),
        (paper_profiled, {"clusters/prfaas/profile": ""}, "config.clusters.prfaas.profile"),
        (paper_profiled, {"clusters/pd/prefill_engine": {"chunk": 64}}, "config.clusters.pd.prefill_engine"),
        (paper_profiled, {"sim/prefill_chunk": 100}, "config.sim.prefill_chunk"),
        (paper_profiled, {"workload/high": 200_000}, "config."),
        (two_sites, {"clusters": {}}, "config.clusters"),
        (two_sites, {"clusters/router": {"kind": "region", "decode": 1}}, "config.clusters"),
        (two_sites, {"clusters/a-b": {"kind": "region", "decode": 1}}, "config.clusters"),
        (two_sites, {"links": {"home->far": {"gbps": 1.0}}}, "config.links"),
        (two_sites, {"links": {"far": {"gbps": 1.0}}}, "config.links"),
        (two_sites, {"links": {"far->home": {}}}, 'config.links["far->home"].gbps'),
        (two_sites, {"links": {"far->home": {"gbps": 1.0, "rtt_ms": -1.0}}}, 'config.links["far->home"].rtt_ms'),
        (three_regions, {"policy": "paper_controlled"}, "config.policy"),
    ],
)
def test_contradictions_are_refused_by_name(make, fields, named):
    with pytest.raises(InvalidInput) as error:
        load_deployment(changed(make, fields))
    assert error.value.field.startswith(named)


FAR = {"name": "far", "kind": "prefill", "prefill": ["127.0.0.1:1"], "via": {"home": {"127.0.0.1:1": "127.0.0.1:9"}}}
HOME = {"name": "home", "kind": "region", "prefill": ["127.0.0.1:2"], "decode": ["127.0.0.1:3"]}


def test_addresses_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "servers.json"
    path.write_text(json.dumps({"clusters": [FAR, HOME]}))
    far, home = found = read_servers(path)
    assert far == ClusterServers("far", "prefill", ("127.0.0.1:1",), (), {"home": {"127.0.0.1:1": "127.0.0.1:9"}})
    assert home == ClusterServers("home", "region", ("127.0.0.1:2",), ("127.0.0.1:3",))
    assert (far.seen_from("home", "127.0.0.1:1"), far.seen_from("other", "127.0.0.1:1")) == ("127.0.0.1:9", "127.0.0.1:1")
    path.write_text(servers_json(found))
    assert read_servers(path) == found


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "servers"),
        (["far"], "servers.clusters[0]"),
        ([FAR], "servers.clusters"),
        ([HOME, HOME], "servers.clusters"),
        ([HOME, {**HOME, "name": "other"}], "servers.clusters"),
        ([FAR, {**HOME, "port": 1}], "servers.clusters[1]"),
        ([FAR, {**HOME, "name": ""}], "servers.clusters[1].name"),
        ([FAR, {**HOME, "kind": "pd"}], "servers.clusters[1].kind"),
        ([FAR, {**HOME, "decode": []}], "servers.clusters[1].decode"),
        ([FAR, {**HOME, "decode": "127.0.0.1:3"}], "servers.clusters[1].decode"),
        ([FAR, {**HOME, "decode": ["nowhere"]}], "servers.clusters[1].decode"),
        ([{**FAR, "decode": ["127.0.0.1:4"]}, HOME], "servers.clusters[0].decode"),
        ([{**FAR, "prefill": []}, HOME], "servers.clusters[0].prefill"),
        ([{**FAR, "via": []}, HOME], "servers.clusters[0].via"),
        ([{**FAR, "via": {"away": {}}}, HOME], "servers.clusters[0].via"),
        ([{**FAR, "via": {"home": {"127.0.0.1:7": "127.0.0.1:9"}}}, HOME], "servers.clusters[0].via.home"),
        ([{**FAR, "via": {"home": {"127.0.0.1:1": 9}}}, HOME], "servers.clusters[0].via.home"),
    ],
)
def test_wrong_addresses_are_refused_by_name(tmp_path, rows, named):
    path = tmp_path / "servers.json"
    path.write_text(json.dumps({"clusters": rows}))
    with pytest.raises(InvalidInput) as error:
        read_servers(path)
    assert error.value.field == named


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_what_is_no_file_of_addresses_is_refused(tmp_path, text):
    path = tmp_path / "servers.json"
    if text:
        path.write_text(text)
    with pytest.raises(InvalidInput, match="servers="):
        read_servers(path)

"""One file per live system: `get_config()` returns the fields below; `load_deployment` makes a `serving.deployment.Deployment` of them.

Absent fields have the value given here; a flag can change those that the file has (`--config.clusters.far.prefill=2`, and, for the shell's
sake in quotes, `'--config.links["far->home"].gbps=0.5'`).

    engine           "jax": real engines; or "profiled": times from profiles, real KV bytes, a process per cluster
    checkpoint       of "jax": what an engine takes, such as random:qwen3_toy
    model            of "profiled": under configs/models, or a file
    tokenizer        directory or GGUF file for the router; empty: prompts are token ids
    platform         what JAX runs on, "cpu"; empty: it chooses
    compile_cache    of "jax": folder of compiled programs, which make the next start faster; empty: none
    engine_options   of "jax": fields of engine.options.EngineOptions
    time_scale       of "profiled": model seconds per wall second, 1.0
    byte_scale       of "profiled": bytes on the wire per byte of the model's KV, 1.0
    token_scale      of "profiled": output tokens of the model per live one, 1
    clusters         name -> kind             "prefill", or "region", which decodes
                             prefill, decode  how many servers ("jax") or instances ("profiled"); a prefill cluster has none that decode
                             profile          under configs/profiles, a file, or the fields of one; "jax" needs none but for prediction
                             local_gbps       between the prefill and decode instances of a region, 800.0; not emulated live
                             convertible      of "jax": servers of a region change their role when the policy's controller says so, false;
                                              they have the decode engine's options (profiled instances always change)
                             prefill_engine, decode_engine  of "jax": EngineOptions that differ from engine_options
                             prefill_server, decode_server  fields of PrefillServerOptions, DecodeServerOptions
                             environment      variables of its processes
    links            "from->to" -> gbps, rtt_ms 0.0, window_mib 0.0 (in flight per transfer, for predictions; 0: no limit)
                     from a prefill cluster to a region; pairs without a link do not work together
    policy           a name of simulation.contenders.CONTENDERS, "threshold"
    parameter        its threshold or share; -1: the planner's
    sim              fields of simulation.scenario.SimOptions: prefill_chunk, prefill_rows and convert_s of profiled engines; overlap and
                     slo_* of policies that predict; control_s of controllers; prefix caches and link_order of the simulation
    router           fields of RouterOptions
    metrics          every process has Prometheus metrics, on a free port, false
    security         fields of transfer.security.Security, the same for every process; "": not given
    tenants          name -> max_running (0: any number), regions (its prompts and their KV stay there; empty: anywhere)
    canary_share     of the requests that the policy would offload, the share that it may, 1.0; the others stay in their region
    shadow           a policy that is asked too and only counted, with its shadow_parameter; empty: none
    workload, trace, requests, load, rate  what benchmarks play, as in configs/studies: lengths, output tokens, arrivals; model units
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.fields import at_least, fields, options, positive, within
from configs.models import load_model_config
from configs.profiles import load_profile
from configs.studies import mix_of, workload_of
from configs.studies.paper_case import get_config as paper_case
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.source import read_config
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.planner import Plan, case_of, grid
from prfaas_jax.scheduling.profile_files import instance_from_dict
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology
from prfaas_jax.serving.decode_server import DecodeServerOptions
from prfaas_jax.serving.deployment import DeployedCluster, Deployment, EngineKind, Kind, Scale, Tenant
from prfaas_jax.serving.joining import JoinOptions
from prfaas_jax.serving.prefill_server import PrefillServerOptions
from prfaas_jax.serving.router import RouterOptions
from prfaas_jax.simulation.contenders import CONTENDERS
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.transfer.security import Security

MIB = 2**20

_CLUSTER: dict[str, Any] = {
    "kind": "",
    "prefill": 0,
    "decode": 0,
    "profile": None,  # text or fields
    "local_gbps": 800.0,
    "convertible": False,
    "prefill_engine": {},
    "decode_engine": {},
    "prefill_server": {},
    "decode_server": {},
    "environment": {},
}
_LINK: dict[str, Any] = {"gbps": 0.0, "rtt_ms": 0.0, "window_mib": 0.0}
_TENANT: dict[str, Any] = {"max_running": 0, "regions": ()}
_SYSTEM: dict[str, Any] = {
    "engine": "jax",
    "checkpoint": "",
    "model": "",
    "tokenizer": "",
    "platform": "cpu",
    "compile_cache": "",
    "engine_options": {},
    "time_scale": 1.0,
    "byte_scale": 1.0,
    "token_scale": 1,
    "clusters": {},
    "links": {},
    "policy": "threshold",
    "parameter": -1.0,
    "sim": {},
    "router": {},
    "metrics": False,
    "security": {},
    "tenants": {},
    "canary_share": 1.0,
    "shadow": "",
    "shadow_parameter": -1.0,
    "workload": {},
    "trace": "",
    "requests": 1000,
    "load": 0.7,
    "rate": 0.0,
}
# What whoever starts the servers fills in.
_SECURITY = tuple(field.name for field in dataclasses.fields(Security))
_JOIN = tuple(field.name for field in dataclasses.fields(JoinOptions))
_PREFILL_SERVER = ("address", "lane_address", "advertise_lane", *_JOIN, *_SECURITY)
_DECODE_SERVER = ("address", "site", *_JOIN, *_SECURITY)
_ROUTER = ("decode", "prefill", "servers", *_SECURITY)


def load_deployment(config: ConfigDict) -> Deployment:
    """The system of a config, checked as a whole.

    Raises:
        InvalidInput: a field that is unknown, of another type, out of range, or at odds with another one, by its name in the config.
    """
    c = fields("config", config.to_dict(), _SYSTEM)
    engine, scale = _engine(c), _scale(c)
    security = options("config.security", Security, {name: value for name, value in c["security"].items() if value != ""})
    clusters = tuple(_cluster(name, found, c, security) for name, found in c["clusters"].items())
    clusters = tuple(sorted(clusters, key=lambda cluster: cluster.kind == "region"))
    if not any(cluster.kind == "region" for cluster in clusters):
        raise InvalidInput("config.clusters", sorted(c["clusters"]), "at least one region, where requests are decoded")
    links = tuple(_link(name, found, clusters) for name, found in c["links"].items())
    sim = options("config.sim", SimOptions, c["sim"])
    played = _played(c, sim)
    with within("config.workload", strip="lengths."):
        mix = mix_of(played)
    with within("config"):
        topology = _topology(c, clusters, links)
        plan, most = _plan(topology, mix)
    requests = at_least("config.requests", c["requests"], 1)
    load = positive("config.load", c["load"])
    rate = positive("config.rate", c["rate"], or_zero=True) or load * most
    if not 0 <= c["canary_share"] <= 1:
        raise InvalidInput("config.canary_share", c["canary_share"], "a share of the requests, 0..1")
    options("config.router", RouterOptions, c["router"], _ROUTER, **_kept(security))
    deployment = Deployment(
        engine=engine,
        model=c["checkpoint"] if engine == "jax" else c["model"],
        clusters=clusters,
        links=links,
        policy=c["policy"],
        parameter=_parameter("policy", "parameter", c, plan, mix),
        sim=sim,
        mix=mix,
        scale=scale,
        topology=topology,
        rate=rate,
        workload=workload_of(played, rate) if rate else None,
        requests=requests,
        platform=c["platform"] or None,
        compile_cache=c["compile_cache"] or None,
        tokenizer=c["tokenizer"] or None,
        security=security,
        metrics=c["metrics"],
        router=c["router"],
        tenants={name: _tenant(name, found, clusters) for name, found in c["tenants"].items()},
        canary_share=c["canary_share"],
        shadow=c["shadow"],
        shadow_parameter=_parameter("shadow", "shadow_parameter", c, plan, mix) if c["shadow"] else 0.0,
        config=config.to_dict(),
    )
    with within("config"):
        deployment.build_policy(deployment.policy, deployment.parameter)
    if deployment.shadow:
        with within("config.shadow"):
            deployment.build_policy(deployment.shadow, deployment.shadow_parameter)
    return deployment


def _engine(c: Mapping[str, Any]) -> EngineKind:
    """Which engine, with the one field that says what it computes."""
    needs = {"jax": ("checkpoint", "model"), "profiled": ("model", "checkpoint")}
    engine: EngineKind = c["engine"]
    if engine not in needs:
        raise InvalidInput("config.engine", engine, "jax or profiled")
    needed, other = needs[engine]
    if not c[needed]:
        raise InvalidInput(f"config.{needed}", c[needed], f"what {engine} engines compute")
    if c[other]:
        raise InvalidInput(f"config.{other}", c[other], f"nothing: {engine} engines take config.{needed}")
    if engine == "profiled" and c["engine_options"]:
        raise InvalidInput("config.engine_options", c["engine_options"], "nothing: profiled engines work as config.sim says")
    return engine


def _scale(c: Mapping[str, Any]) -> Scale:
    if c["engine"] == "jax":
        for field in ("time_scale", "byte_scale", "token_scale"):
            if c[field] != 1:
                raise InvalidInput(f"config.{field}", c[field], "1: real engines have no scale")
    if c["byte_scale"] > 1:
        raise InvalidInput("config.byte_scale", c["byte_scale"], "at most 1")
    times, sizes = (positive(f"config.{field}", c[field]) for field in ("time_scale", "byte_scale"))
    return Scale(times, sizes, at_least("config.token_scale", c["token_scale"], 1))


def _cluster(name: str, found: object, c: Mapping[str, Any], security: Security) -> DeployedCluster:
    where = f"config.clusters.{name}"
    if not name.isidentifier() or name == "router":
        raise InvalidInput("config.clusters", name, "a name of letters, digits and _, other than router")
    f = fields(where, found, _CLUSTER)
    kind: Kind = f["kind"]
    if kind not in ("prefill", "region"):
        raise InvalidInput(f"{where}.kind", kind, "prefill or region")
    prefill = at_least(f"{where}.prefill", f["prefill"], 1 if kind == "prefill" else 0)
    decode = at_least(f"{where}.decode", f["decode"], 1 if kind == "region" else 0)
    if kind == "prefill" and decode:
        raise InvalidInput(f"{where}.decode", decode, "0: a prefill cluster does not decode")
    if f["convertible"] and (kind == "prefill" or c["engine"] == "profiled" or f["prefill_engine"]):
        expected = "false but for a region of jax engines without a prefill_engine: its servers have one set of options"
        raise InvalidInput(f"{where}.convertible", True, expected)
    options(f"{where}.prefill_server", PrefillServerOptions, f["prefill_server"], _PREFILL_SERVER, **_kept(security))
    options(f"{where}.decode_server", DecodeServerOptions, f["decode_server"], _DECODE_SERVER, **_kept(security))
    return DeployedCluster(
        name,
        kind,
        prefill,
        decode,
        f["profile"] or "",
        _instance(f"{where}.profile", f["profile"], kind, c["engine"]),
        positive(f"{where}.local_gbps", f["local_gbps"]) * GBPS,
        prefill_engine=_engine_options(f"{where}.prefill_engine", f["prefill_engine"], c),
        decode_engine=_engine_options(f"{where}.decode_engine", f["decode_engine"], c),
        prefill_server=f["prefill_server"],
        decode_server=f["decode_server"],
        convertible=f["convertible"],
        environment={key: str(value) for key, value in f["environment"].items()},
    )


def _kept(security: Security) -> dict[str, Any]:
    return {name: getattr(security, name) for name in _SECURITY}


def _engine_options(where: str, found: Mapping[str, Any], c: Mapping[str, Any]) -> EngineOptions | None:
    if c["engine"] == "profiled":
        if found:
            raise InvalidInput(where, found, "nothing: profiled engines work as config.sim says")
        return None
    base = options("config.engine_options", EngineOptions, c["engine_options"], ("checkpoint",), checkpoint=c["checkpoint"])
    shared = {name: value for name, value in c["engine_options"].items() if name not in found}
    return options(where, EngineOptions, found, ("checkpoint",), checkpoint=base.checkpoint, **shared)


def _instance(field: str, profile: Any, kind: Kind, engine: EngineKind) -> Instance | None:
    if not profile:
        if engine == "profiled":
            raise InvalidInput(field, profile, "a profile: profiled engines take their times from it")
        return None
    if not isinstance(profile, str | Mapping):
        raise InvalidInput(field, profile, "a name, a file, or the fields of a profile")
    with within(field):
        instance = load_profile(profile) if isinstance(profile, str) else instance_from_dict(profile)
    if kind == "region" and instance.decode is None:
        raise InvalidInput(field, instance.name, "a profile with decode times")
    return instance


def _link(name: str, found: object, clusters: tuple[DeployedCluster, ...]) -> Link:
    where = f'config.links["{name}"]'
    far, arrow, near = name.partition("->")
    froms, tos = ([cluster.name for cluster in clusters if cluster.kind == kind] for kind in ("prefill", "region"))
    if not arrow or far not in froms or near not in tos:
        raise InvalidInput("config.links", name, f'"from->to", from one of {froms} to one of {tos}')
    f = fields(where, found, _LINK)
    gbps = positive(f"{where}.gbps", f["gbps"])
    rtt_ms, window = (positive(f"{where}.{field}", f[field], or_zero=True) for field in ("rtt_ms", "window_mib"))
    return Link(far, near, gbps * GBPS, rtt_ms * 1e-3, window * MIB or math.inf)


def _tenant(name: str, found: object, clusters: tuple[DeployedCluster, ...]) -> Tenant:
    where = f"config.tenants.{name}"
    f = fields(where, found, _TENANT)
    regions = [cluster.name for cluster in clusters if cluster.kind == "region"]
    if strangers := sorted(set(f["regions"]) - set(regions)):
        raise InvalidInput(f"{where}.regions", strangers, f"regions: {', '.join(regions)}")
    return Tenant(at_least(f"{where}.max_running", f["max_running"], 0) or None, f["regions"])


def _played(c: Mapping[str, Any], sim: SimOptions) -> ConfigDict:
    """The fields that a study has for its workload."""
    workload = fields("config.workload", c["workload"], paper_case().workload.to_dict())
    caches = {"prefill_cache_bytes": sim.prefill_cache_bytes, "decode_cache_bytes": sim.decode_cache_bytes}
    return ConfigDict({"workload": workload, "trace": c["trace"], "requests": c["requests"], "sim": caches})


def _topology(c: Mapping[str, Any], clusters: tuple[DeployedCluster, ...], links: tuple[Link, ...]) -> Topology | None:
    """In the model's units; None where some cluster has no profile."""
    if c["engine"] == "jax":
        try:
            model = read_config(c["checkpoint"], c["engine_options"].get("dtype"), load_model_config)
        except InvalidInput as error:
            raise InvalidInput("config.checkpoint", c["checkpoint"], error.expected) from error
    else:
        model = load_model_config(c["model"])
    prefill, regions = [], []
    for cluster in clusters:
        if cluster.instance is None:
            return None
        if cluster.kind == "prefill":
            prefill.append(PrefillCluster(cluster.name, cluster.instance, cluster.prefill))
        else:
            regions.append(Region(cluster.name, cluster.instance, cluster.prefill, cluster.decode, cluster.local_bytes_per_s))
    return Topology(KvFootprint.of(cache_spec(model)), tuple(prefill), tuple(regions), links)


def _plan(topology: Topology | None, mix: Mix) -> tuple[Plan | None, float]:
    """The best threshold, where the planner finds one, and the requests/s that the system sustains; 0 where that is not known."""
    if topology is None:
        return None, 0.0
    if len(topology.prefill) == len(topology.regions) == len(topology.links) == 1:
        plan = grid(case_of(topology), mix, n_p=topology.regions[0].prefill)
        return plan, plan.lambda_max
    return None, optimum(topology, mix).lambda_max


def _parameter(policy: str, parameter: str, c: Mapping[str, Any], plan: Plan | None, mix: Mix) -> float:
    """The parameter of a policy, the planner's where the config leaves it open; 0 for a policy that has none."""
    if c[policy] not in CONTENDERS:
        raise InvalidInput(f"config.{policy}", c[policy], f"one of {', '.join(CONTENDERS)}")
    kind = CONTENDERS[c[policy]][0]
    if not kind:
        return 0.0
    if c[parameter] >= 0:
        return float(c[parameter])
    if plan is None:
        expected = f"the {kind} of {c[policy]}: the planner finds it for one prefill cluster and one region, both with a profile"
        raise InvalidInput(f"config.{parameter}", c[parameter], expected)
    return plan.p if kind == "share" else min(plan.t, float(mix.uncached.max()))

"""A live system as one value: its clusters and links, who decides and for whom. And the addresses of one that runs, as a file.

`configs.clusters.load_deployment` makes a `Deployment` of a config file. Rates, times and bytes are the model's throughout, so planner,
simulator and live system read the same numbers; `Scale` says what they are on the machine that plays them. No jax.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import to_json
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.policies import make_policy
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.scheduling.topology import GBPS, Link, Topology
from prfaas_jax.simulation.contenders import CONTENDERS, Built, Ground, build
from prfaas_jax.simulation.scenario import SimOptions
from prfaas_jax.simulation.workloads import Workload
from prfaas_jax.transfer.endpoint import parse_address
from prfaas_jax.transfer.security import NONE, Security

EngineKind = Literal["jax", "profiled"]
Kind = Literal["prefill", "region"]

# What these decide by are times and link rates, so every cluster needs a profile.
PREDICTIVE = frozenset({"paper_controlled", "least_ttft", "shadow_price", "shadow_price_roles"})


@dataclasses.dataclass(frozen=True)
class Scale:
    """How a model's figures become those of the machine that plays it; real engines have 1, 1, 1.

    Attributes:
        time: model seconds per wall second.
        bytes: bytes on the wire per byte of the model's KV.
        tokens: tokens of the model's output per token of the live one.
    """

    time: float = 1.0
    bytes: float = 1.0
    tokens: int = 1

    def output_tokens(self, live: int) -> int:
        """Of the model, where so many live ones are generated; the first, which the prefill draws, stands for itself."""
        return 1 + self.tokens * (live - 1)

    def link_gbps(self, link: Link) -> float:
        """Gbit/s of wall time that a live link has."""
        return link.bytes_per_s / GBPS * self.bytes * self.time

    def link_rtt_ms(self, link: Link) -> float:
        """Wall milliseconds of its round trip."""
        return link.rtt_s * 1e3 / self.time


@dataclasses.dataclass(frozen=True)
class DeployedCluster:
    """One cluster: servers with an engine each ("jax"), or instances that one process plays ("profiled").

    Attributes:
        name: an identifier, unique.
        kind: "prefill" only prefills; a "region" decodes, and prefills next to it (PD-P).
        prefill: its prefill servers or instances.
        decode: its decode servers or instances.
        profile: where `instance` comes from: a name under configs/profiles, a file, or its profile form; empty without one.
        instance: times of one of them; None where they are not known.
        local_bytes_per_s: the network between its prefill and decode instances, for planner and simulator: live it is not emulated.
        prefill_engine: of each prefill server; "jax" only.
        decode_engine: of each decode server; "jax" only.
        prefill_server: fields of PrefillServerOptions that differ from their defaults.
        decode_server: fields of DecodeServerOptions likewise.
        convertible: of a "jax" region: each server is both, works in one role and changes it when told; all have `decode_engine`.
        environment: variables of its processes.
    """

    name: str
    kind: Kind
    prefill: int
    decode: int
    profile: str | Mapping[str, Any] = ""
    instance: Instance | None = None
    local_bytes_per_s: float = 800 * GBPS
    prefill_engine: EngineOptions | None = None
    decode_engine: EngineOptions | None = None
    prefill_server: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decode_server: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    convertible: bool = False
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Attributes:
    max_running: requests of it that run at once; None for any number.
    regions: where its requests are prefilled and decoded, so that their KV does not leave them; empty: anywhere.
    """

    max_running: int | None = None
    regions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A live system, checked as a whole before any of it starts.

    Attributes:
        engine: what computes: real engines, or times from profiles with real bytes.
        model: a checkpoint ("jax"), or a model config by name or file ("profiled").
        clusters: prefill clusters, then regions.
        links: the pairs that work together; a pair without one has no route.
        policy: a name of `simulation.contenders.CONTENDERS`.
        parameter: its threshold or share; 0 where it has none.
        sim: how the clusters work beyond their profiles, for predictions, controllers (`control_s`) and profiled engines.
        scale: of times, bytes and tokens.
        topology: of the system; None where some cluster has no profile.
        mix: the request mix that a planner is shown.
        rate: requests per model second of `workload`; 0 where it is neither given nor can be planned.
        workload: what benchmarks play, in model seconds and tokens; None for a rate of 0.
        requests: so many of it.
        platform: what JAX runs on ("cpu", ..); None leaves the choice to JAX.
        compile_cache: folder of compiled programs, shared by processes and runs.
        tokenizer: directory or GGUF file for the router; None when prompts are token ids.
        security: of every process.
        metrics: every process has Prometheus metrics, on a free port where its options name none.
        router: fields of RouterOptions that differ from their defaults.
        tenants: limits by name; a tenant that is not named has none.
        canary_share: of the requests that `policy` would offload, the share that it may; the others stay in their region.
        shadow: another policy that is asked about every request and only counted; empty: none.
        shadow_parameter: its threshold or share.
        config: the plain fields that `configs.clusters.load_deployment` makes it of, for processes that are to read them.
    """

    engine: EngineKind
    model: str
    clusters: tuple[DeployedCluster, ...]
    links: tuple[Link, ...]
    policy: str
    parameter: float
    sim: SimOptions = dataclasses.field(default_factory=SimOptions)
    scale: Scale = Scale()
    topology: Topology | None = None
    mix: Mix | None = None
    rate: float = 0.0
    workload: Workload | None = None
    requests: int = 0
    platform: str | None = None
    compile_cache: str | None = None
    tokenizer: str | None = None
    security: Security = NONE
    metrics: bool = False
    router: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tenants: Mapping[str, Tenant] = dataclasses.field(default_factory=dict)
    canary_share: float = 1.0
    shadow: str = ""
    shadow_parameter: float = 0.0
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def prefill(self) -> tuple[DeployedCluster, ...]:
        """The prefill clusters."""
        return tuple(c for c in self.clusters if c.kind == "prefill")

    @property
    def regions(self) -> tuple[DeployedCluster, ...]:
        """The regions."""
        return tuple(c for c in self.clusters if c.kind == "region")

    @property
    def ground(self) -> Ground | None:
        """What contenders and simulations are built on; None without topology and mix."""
        return None if self.topology is None or self.mix is None else Ground(self.topology, self.mix, self.sim)

    def build_policy(self, name: str, parameter: float = 0.0) -> Built:
        """A policy of this system and its controller, such as `policy` or `shadow`.

        Raises:
            InvalidInput: an unknown name, a parameter out of range, or a predictive policy where clusters have no profile.
        """
        if (ground := self.ground) is not None:
            return build(name, ground, parameter)
        if name not in CONTENDERS:
            raise InvalidInput("policy", name, f"one of {', '.join(CONTENDERS)}")
        if name in PREDICTIVE:
            bare = [cluster.name for cluster in self.clusters if cluster.instance is None]
            known = ", ".join(sorted(set(CONTENDERS) - PREDICTIVE))
            raise InvalidInput("policy", name, f"one of {known}; it predicts, and {', '.join(bare)} have no profile to predict by")
        kind = CONTENDERS[name][0]
        values = {"share": parameter, "tokens": int(parameter)}
        return make_policy(name, **({kind: values[kind]} if kind else {})), None


# --- the addresses of a running one ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClusterServers:
    """Where the servers of a cluster are reached.

    Attributes:
        name: of the cluster.
        kind: its kind.
        prefill: host:port of its prefill servers.
        decode: host:port of its decode servers.
        via: region -> prefill server -> where the decode servers of that region reach it; absent: at its own address.
    """

    name: str
    kind: Kind
    prefill: tuple[str, ...]
    decode: tuple[str, ...] = ()
    via: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    def seen_from(self, region: str, server: str) -> str:
        """Where decode servers of `region` reach this cluster's prefill server `server`."""
        return self.via.get(region, {}).get(server, server)


def servers_json(clusters: Sequence[ClusterServers]) -> str:
    """What `read_servers` reads."""
    return to_json({"clusters": [dataclasses.asdict(cluster) for cluster in clusters]}, indent=2) + "\n"


def read_servers(path: str | os.PathLike[str]) -> tuple[ClusterServers, ...]:
    """The clusters of a JSON file: {"clusters": [{name, kind, prefill, decode, via}, ..]}; `decode` and `via` may be absent.

    Raises:
        InvalidInput: no such file, not JSON, unknown or missing fields, no region, names or addresses that are malformed or there twice,
            or a `via` that names what is not there.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput("servers", str(path), f"a readable JSON file ({error})") from error
    rows = found.get("clusters") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InvalidInput("servers", str(path), '{"clusters": [..]} with at least one cluster')
    clusters = tuple(_servers(f"servers.clusters[{i}]", row) for i, row in enumerate(rows))
    names = [c.name for c in clusters]
    if len(set(names)) != len(names):
        raise InvalidInput("servers.clusters", names, "unique names")
    addresses = [address for c in clusters for address in (*c.prefill, *c.decode)]
    if twice := sorted({address for address in addresses if addresses.count(address) > 1}):
        raise InvalidInput("servers.clusters", twice, "each server once")
    regions = [c.name for c in clusters if c.kind == "region"]
    if not regions:
        raise InvalidInput("servers.clusters", names, "at least one region, where requests are decoded")
    for i, cluster in enumerate(clusters):
        for region, servers in cluster.via.items():
            where = f"servers.clusters[{i}].via"
            if region not in regions:
                raise InvalidInput(where, region, f"regions: {', '.join(regions)}")
            if strangers := sorted(set(servers) - set(cluster.prefill)):
                raise InvalidInput(f"{where}.{region}", strangers, f"prefill servers of {cluster.name}")
    return clusters


def _servers(where: str, row: object) -> ClusterServers:
    if not isinstance(row, dict):
        raise InvalidInput(where, row, "a cluster's fields by name")
    fields = [field.name for field in dataclasses.fields(ClusterServers)]
    if unknown := sorted(set(row) - set(fields)):
        raise InvalidInput(where, unknown, f"only the fields {', '.join(fields)}")
    name, kind = row.get("name"), row.get("kind")
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"{where}.name", name, "a name")
    if kind not in ("prefill", "region"):
        raise InvalidInput(f"{where}.kind", kind, "prefill or region")
    lists = {role: tuple(_addresses(f"{where}.{role}", row.get(role, []))) for role in ("prefill", "decode")}
    if kind == "prefill" and lists["decode"]:
        raise InvalidInput(f"{where}.decode", lists["decode"], "none: a prefill cluster does not decode")
    if not lists["decode" if kind == "region" else "prefill"]:
        raise InvalidInput(f"{where}.{'decode' if kind == 'region' else 'prefill'}", (), "at least one server")
    via = row.get("via", {})
    if not isinstance(via, dict) or not all(isinstance(servers, dict) for servers in via.values()):
        raise InvalidInput(f"{where}.via", via, "addresses by region and prefill server")
    for region, servers in via.items():
        list(_addresses(f"{where}.via.{region}", list(servers.values())))
    return ClusterServers(name, kind, lists["prefill"], lists["decode"], via)


def _addresses(field: str, found: object) -> Iterator[str]:
    if not isinstance(found, list):
        raise InvalidInput(field, found, "a list of host:port")
    for address in found:
        if not isinstance(address, str):
            raise InvalidInput(field, address, "host:port")
        parse_address(field, address)
        yield address

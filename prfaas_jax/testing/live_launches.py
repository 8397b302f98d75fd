"""How the processes of a deployment are started: module, flags and environment of each, by name. Nothing is started here.

Prefill servers are told which lanes to advertise before they have a port: relays that stand before the servers do make that possible.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.results import to_json
from prfaas_jax.scheduling.topology import Link
from prfaas_jax.serving.deployment import ClusterServers, DeployedCluster, Deployment, servers_json
from prfaas_jax.serving.launcher import environment
from prfaas_jax.serving.pair import PATIENCE

Role = Literal["prefill", "decode", "router"]

# All compute on the same few cores: a peer that is late is busy.
_IDLE_S = 30.0
_ANY_PORT = "127.0.0.1:0"


@dataclasses.dataclass
class Launch:
    """One process to start, or to start again.

    Attributes:
        module: what is run.
        flags: of it; they gain its addresses once it has them, so that it comes back at the same ones.
        env: its environment.
        services: what it serves, and the name of each.
        starts: how often it was started.
    """

    module: str
    flags: dict[str, Any]
    env: Mapping[str, str]
    services: Mapping[Role, str]
    starts: int = 0

    def ready(self, said: Mapping[str, Any]) -> dict[Role, Mapping[str, Any]]:
        """What the process's READY says of each service."""
        return {role: said.get(role, said) for role in self.services}

    def keep(self, said: Mapping[str, Any]) -> None:
        """Takes the addresses in a READY into the flags."""
        for role, service in self.ready(said).items():
            # A process with two services has flags for each.
            prefix = "decode_" if role == "decode" and role in said else ""
            self.flags[f"{prefix}address"] = service["address"]
            if service.get("metrics_address"):
                self.flags[f"{prefix}metrics_address"] = service["metrics_address"]
            if role == "prefill":
                self.flags["lane_address"] = service["lane_addresses"][0]


def relay_keys(deployment: Deployment, link: Link) -> list[str]:
    """The names of a link's relays, one for each prefill server: "far->home", or with several "far->home/0", .."""
    cluster = next(c for c in deployment.prefill if c.name == link.prefill)
    count = 1 if deployment.engine == "profiled" else cluster.prefill
    return [f"{link.prefill}->{link.decode}"] if count == 1 else [f"{link.prefill}->{link.decode}/{i}" for i in range(count)]


def server_launches(deployment: Deployment, lanes: Mapping[str, str], workdir: Path) -> dict[str, Launch]:
    """Every process but the router; `lanes` has the address of each lane relay by its key. Files that they need go into `workdir`."""
    found: dict[str, Launch] = {}
    for cluster in deployment.clusters:
        if deployment.engine == "profiled":
            found[f"{cluster.name}/0"] = _profiled(deployment, cluster, lanes, workdir)
        else:
            found |= _jax(deployment, cluster, lanes)
    return found


def router_launch(deployment: Deployment, servers: Sequence[ClusterServers], workdir: Path) -> Launch:
    """The router; it reads the deployment and where its servers are from deployment.json and servers.json in `workdir`."""
    flags = _common(deployment, deployment.router)
    for flag, text in (("deployment", to_json(deployment.config, indent=2) + "\n"), ("servers", servers_json(servers))):
        path = workdir / f"{flag}.json"
        path.write_text(text)
        flags[flag] = os.fspath(path)
    return Launch("experiments.serve_router", flags, environment(moves_kv=False) | PATIENCE, {"router": "router"})


def _jax(deployment: Deployment, cluster: DeployedCluster, lanes: Mapping[str, str]) -> dict[str, Launch]:
    """A process for each server."""
    env = environment(deployment.platform, compile_cache=deployment.compile_cache) | PATIENCE | dict(cluster.environment)
    found = {}
    if cluster.convertible:
        for i in range(cluster.prefill + cluster.decode):
            flags = _engine_flags(cluster.decode_engine) | _prefill_flags(deployment, cluster, lanes, i)
            flags |= _prefixed({"idle_s": _IDLE_S} | _decode_flags(deployment, cluster))
            flags["role"] = "prefill" if i < cluster.prefill else "decode"
            services: dict[Role, str] = {role: _service(cluster, role, i) for role in ("prefill", "decode")}
            found[f"{cluster.name}/{i}"] = Launch("experiments.serve_pd", flags, env, services)
        return found
    for i in range(cluster.prefill):
        name = _service(cluster, "prefill", i)
        flags = _engine_flags(cluster.prefill_engine) | _prefill_flags(deployment, cluster, lanes, i)
        found[name] = Launch("experiments.serve_prefill", flags, env, {"prefill": name})
    for i in range(cluster.decode):
        name = _service(cluster, "decode", i)
        flags = _engine_flags(cluster.decode_engine) | {"idle_s": _IDLE_S} | _decode_flags(deployment, cluster)
        found[name] = Launch("experiments.serve_decode", flags, env, {"decode": name})
    return found


def _profiled(deployment: Deployment, cluster: DeployedCluster, lanes: Mapping[str, str], workdir: Path) -> Launch:
    """One process for all instances."""
    profile, sim, scale = cluster.profile, deployment.sim, deployment.scale
    if not isinstance(profile, str):
        path = workdir / f"profile_{cluster.name}.json"
        path.write_text(to_json(profile, indent=2) + "\n")
        profile = os.fspath(path)
    flags: dict[str, Any] = {
        "profile": profile,
        "model": f"random:{deployment.model}",
        "prefill": cluster.prefill,
        "decode": cluster.decode,
    }
    flags |= {"time_scale": scale.time, "byte_scale": scale.bytes, "token_scale": scale.tokens}
    flags |= {"chunk": sim.prefill_chunk, "rows": sim.prefill_rows, "convert_s": sim.convert_s}
    flags |= _prefill_flags(deployment, cluster, lanes, 0)
    services: dict[Role, str] = {"prefill": _service(cluster, "prefill", 0)}
    if cluster.kind == "region":
        flags |= _prefixed(_decode_flags(deployment, cluster))
        services["decode"] = _service(cluster, "decode", 0)
    return Launch("experiments.serve_profiled", flags, environment() | PATIENCE | dict(cluster.environment), services)


def _service(cluster: DeployedCluster, role: Role, number: int) -> str:
    return f"{cluster.name}/{number}" if cluster.kind == "prefill" else f"{cluster.name}/{role}/{number}"


def _engine_flags(engine: EngineOptions | None) -> dict[str, Any]:
    assert engine is not None  # a "jax" cluster has one
    return dataclasses.asdict(engine)


def _prefill_flags(deployment: Deployment, cluster: DeployedCluster, lanes: Mapping[str, str], server: int) -> dict[str, Any]:
    links = [link for link in deployment.links if link.prefill == cluster.name]
    told = [f"{link.decode}={lanes[relay_keys(deployment, link)[server]]}" for link in links]
    return _common(deployment, cluster.prefill_server) | {"advertise_lane": ",".join(told) or None}


def _decode_flags(deployment: Deployment, cluster: DeployedCluster) -> dict[str, Any]:
    return _common(deployment, cluster.decode_server) | {"site": cluster.name}


def _prefixed(flags: Mapping[str, Any]) -> dict[str, Any]:
    """As a process takes them that is a prefill server too."""
    return {f"decode_{name}": value for name, value in flags.items()}


def _common(deployment: Deployment, server: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of every server, and what the deployment says of this one."""
    return dataclasses.asdict(deployment.security) | {"metrics_address": _ANY_PORT if deployment.metrics else None} | dict(server)

"""The systems that the paper compares, as deployments of one config: what they sustain by the planner, and live.

prfaas        the config itself, with the planner's threshold
homogeneous   as many instances in all, every one the region's kind, with the planner's best roles, and no link
naive         every prompt is prefilled by the PrfaaS cluster, and every instance of the region decodes
length_blind  the config's instances with the best roles for a share of every length that loads both sides alike
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.planner import case_of, grid, homogeneous, length_blind
from prfaas_jax.scheduling.throughput import CaseStudy, Reading
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.serving.deployment import Deployment
from prfaas_jax.testing.replay_script import Recorded

SYSTEMS = ("prfaas", "homogeneous", "naive", "length_blind")

# Wall seconds without a byte after which a transfer counts as broken.
PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True)
class System:
    """One of them.

    Attributes:
        deployment: to start and to simulate.
        case: its instances, for the planner.
        n_p: of the region's, those that prefill.
        t: threshold above which prompts are offloaded.
        share: of these, those that are.
    """

    deployment: Deployment
    case: CaseStudy
    n_p: int
    t: float
    share: float

    @property
    def planned_rps(self) -> float:
        """Requests/s of the planner for the deployment's own mix, in the reading that the paper prints."""
        assert self.deployment.mix is not None  # systems
        return self.lambda_max(self.deployment.mix, "mean")

    def lambda_max(self, mix: Mix, reading: Reading) -> float:
        """Requests/s of the planner."""
        return float(self.case.operate(mix, self.t, self.n_p, reading, self.share).lambda_max[0])


def systems(deployment: Deployment, names: tuple[str, ...] = SYSTEMS) -> dict[str, System]:
    """Of a deployment of one prefill cluster and one region, with profiles.

    Raises:
        InvalidInput: another system, or an unknown name.
    """
    topology, mix = deployment.topology, deployment.mix
    if topology is None or mix is None:
        raise InvalidInput("config.clusters", [c.name for c in deployment.clusters if c.instance is None], "a profile for each")
    if unknown := sorted(set(names) - set(SYSTEMS)):
        raise InvalidInput("systems", unknown, f"some of {', '.join(SYSTEMS)}")
    case = case_of(topology)
    return {name: _system(name, deployment, case, topology, mix) for name in names}


def _system(name: str, deployment: Deployment, case: CaseStudy, topology: Topology, mix: Mix) -> System:
    match name:
        case "prfaas":
            n_p = topology.regions[0].prefill
            t = min(grid(case, mix, n_p=n_p).t, float(mix.uncached.max()))
            return System(with_policy(deployment, "threshold", t), case, n_p, t, 1.0)
        case "homogeneous":
            plan = homogeneous(case, mix, case.n_prfaas + case.n_pd)
            alone = dataclasses.replace(case, n_prfaas=0, n_pd=case.n_prfaas + case.n_pd)
            local = with_policy(with_roles(deployment, plan.n_p, plan.n_d, alone=True), "always_local")
            return System(local, alone, plan.n_p, math.inf, 1.0)
        case "naive":
            return System(with_policy(with_roles(deployment, 0, case.n_pd), "always_remote"), case, 0, 0.0, 1.0)
        case _:
            n_p = length_blind(case, mix)[1]
            remote = case.operate(mix, 0.0, n_p).theta_prfaas[0]
            share = float(remote / (remote + case.operate(mix, math.inf, n_p).theta_pd_p[0]))
            return System(with_policy(with_roles(deployment, n_p, case.n_pd - n_p), "length_blind", share), case, n_p, 0.0, share)


def with_policy(deployment: Deployment, policy: str, parameter: float = 0.0) -> Deployment:
    """The same clusters under another policy; raises InvalidInput as `Deployment.build_policy`."""
    deployment.build_policy(policy, parameter)
    config = {**deployment.config, "policy": policy, "parameter": float(parameter)}
    return dataclasses.replace(deployment, policy=policy, parameter=float(parameter), config=config)


def with_room(deployment: Deployment, requests: int) -> Deployment:
    """Every server takes so many requests at once, unless the config says how many: an open loop queues what a simulation would queue.

    And a transfer may stand still behind the others of a full link for longer than servers that serve would wait.
    """
    config: dict[str, Any] = copy.deepcopy(dict(deployment.config))
    room: dict[str, dict[str, float]] = {
        "prefill_server": {"max_requests": requests, "max_streams": requests},
        "decode_server": {"max_requests": requests, "idle_s": PATIENCE_S},
    }
    clusters = []
    for cluster in deployment.clusters:
        options: dict[str, Any] = {server: {**limits, **getattr(cluster, server)} for server, limits in room.items()}
        clusters.append(dataclasses.replace(cluster, **options))
        config["clusters"][cluster.name] |= options
    router = config["router"] = {"max_requests": requests, **deployment.router}
    return dataclasses.replace(deployment, clusters=tuple(clusters), router=router, config=config)


def with_roles(deployment: Deployment, n_p: int, n_d: int, alone: bool = False) -> Deployment:
    """The region of a case study with these roles; `alone`: without its prefill cluster and link."""
    topology, region = deployment.topology, deployment.regions[0]
    assert topology is not None  # systems
    config: dict[str, Any] = copy.deepcopy(dict(deployment.config))
    config["clusters"][region.name] |= {"prefill": n_p, "decode": n_d}
    clusters = (dataclasses.replace(region, prefill=n_p, decode=n_d),)
    regions = (dataclasses.replace(topology.regions[0], prefill=n_p, decode=n_d),)
    if alone:
        config["clusters"], config["links"] = {region.name: config["clusters"][region.name]}, {}
        return dataclasses.replace(deployment, clusters=clusters, links=(), topology=Topology(topology.kv, (), regions, ()), config=config)
    return dataclasses.replace(
        deployment, clusters=(*deployment.prefill, *clusters), topology=dataclasses.replace(topology, regions=regions), config=config
    )


def drawn_mix(recorded: Recorded) -> Mix:
    """The very requests that are played."""
    rows = recorded.recorded
    return Mix.of(np.array([a.tokens for a in rows]), np.array([a.output_tokens for a in rows]))


def ratios(lambdas: Mapping[str, float], base: str = "prfaas") -> dict[str, float]:
    """What `base` sustains over what each other one does."""
    return {name: lambdas[base] / value for name, value in lambdas.items() if name != base}

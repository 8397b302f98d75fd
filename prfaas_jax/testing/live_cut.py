"""A link that loses most of its rate while requests come: what is sustained before and after, and what the planner says is possible."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import CONTROL_PERIOD_S
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.planner import best_roles
from prfaas_jax.scheduling.topology import GBPS, Topology
from prfaas_jax.serving.deployment import Deployment
from prfaas_jax.simulation.scenario import Steps
from prfaas_jax.testing.live_bench import byte_scale
from prfaas_jax.testing.live_cluster import LiveCluster


@dataclasses.dataclass(frozen=True)
class Cut:
    """Every link has `gbps` of the model from `at_s` on, model seconds; a system has `periods` of its controllers to adapt."""

    at_s: float
    gbps: float
    control_s: float = CONTROL_PERIOD_S
    periods: int = 3

    def __post_init__(self) -> None:
        for field in ("at_s", "gbps", "control_s"):
            if not 0 < getattr(self, field) < math.inf:
                raise InvalidInput(f"cut.{field}", getattr(self, field), "a finite number above zero")

    def check(self, until_s: float) -> None:
        """Raises InvalidInput unless there is a control period between when a system must have adapted and the last arrival."""
        if until_s < self.settled_s + self.control_s:
            what = f"arrivals for {self.settled_s + self.control_s:.0f} s of the model: more of them, or fewer --cut_periods"
            raise InvalidInput("config.requests", f"{until_s:.0f} s of arrivals", what)

    @property
    def settled_s(self) -> float:
        """From when on a system must have adapted."""
        return self.at_s + self.periods * self.control_s

    def steps(self, deployment: Deployment) -> dict[tuple[str, str], Steps]:
        """For the simulator."""
        return {(link.prefill, link.decode): Steps(((self.at_s, self.gbps * GBPS),)) for link in deployment.links}

    def arm(self, live: LiveCluster, began: float) -> None:
        """Has the relays change when it is time; `began` is the monotonic second of the first arrival."""
        scale = live.deployment.scale.time
        after_s = max(0.0, began + self.at_s / scale - time.monotonic())
        for relay in (*live.lanes.values(), *live.controls.values()):
            relay.set_rate(self.gbps * byte_scale(live) * scale, after_s=after_s)

    def undo(self, live: LiveCluster) -> None:
        """Gives the links back what the deployment says."""
        scale = dataclasses.replace(live.deployment.scale, bytes=byte_scale(live))
        for link in live.deployment.links:
            for relays in (live.lanes, live.controls):
                relays[f"{link.prefill}->{link.decode}"].set_rate(scale.link_gbps(link))

    def topology(self, topology: Topology) -> Topology:
        """As the planner is to see it afterwards."""
        return dataclasses.replace(topology, links=tuple(dataclasses.replace(x, bytes_per_s=self.gbps * GBPS) for x in topology.links))


def optima(topology: Topology, mix: Mix, cut: Cut) -> dict[str, float]:
    """Requests/s that any placement could sustain: before, and after the cut with the roles as they are and with the best ones."""
    after = cut.topology(topology)
    return {
        "before_rps": optimum(topology, mix).lambda_max,
        "after_rps": optimum(after, mix).lambda_max,
        "after_best_roles_rps": best_roles(after, mix)[1].lambda_max,
    }


def reached(first_s: Sequence[float], since_s: float, until_s: float) -> float:
    """First tokens per second between two moments."""
    return sum(since_s < at <= until_s for at in first_s) / (until_s - since_s)


def sustained(first_s: Sequence[float], since_s: float) -> float:
    """Requests per second whose first tokens came after a moment, over the time until the last of them.

    All of them, those that were late then too: a system pays for its backlog, and one path that goes on does not hide another that lags.
    """
    after = [at for at in first_s if at > since_s]
    return len(after) / (max(after) - since_s) if after else 0.0


def by_period(first_s: Sequence[float], arrived_s: Sequence[float], cut: Cut) -> list[dict[str, Any]]:
    """First tokens and arrivals per second, per control period; period 0 begins with the cut."""
    end = max(*first_s, *arrived_s)
    low, high = -math.ceil(cut.at_s / cut.control_s), math.ceil((end - cut.at_s) / cut.control_s)
    edges = cut.at_s + cut.control_s * np.arange(low, high + 1)
    firsts, arrivals = (np.histogram(values, edges)[0] / cut.control_s for values in (first_s, arrived_s))
    return [
        {"period": low + i, "time_s": float(edges[i]), "first_tokens_rps": float(f), "arrivals_rps": float(a)}
        for i, (f, a) in enumerate(zip(firsts, arrivals, strict=True))
    ]

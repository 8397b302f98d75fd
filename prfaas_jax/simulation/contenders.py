"""Every policy by name, ready to run on a topology: the baselines with their one parameter, and ours with its controller."""

import dataclasses
from collections.abc import Callable, Mapping

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import Both, Controller, PriceController, RoleController, ThresholdController
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.planner import case_of
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote, CacheHitRule, LengthBlind, PaperPrefix, Reverse, Threshold
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft, ShadowPrice
from prfaas_jax.scheduling.prices import placement_prices
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import Policy
from prfaas_jax.simulation.scenario import SimOptions


@dataclasses.dataclass(frozen=True)
class Ground:
    """What a contender is built on: the system, the mix that its planner was shown, how the simulation works."""

    topology: Topology
    mix: Mix
    options: SimOptions

    @property
    def predictor(self) -> Predictor:
        """With this system's profiles."""
        return Predictor(self.topology, self.options.prefill_chunk, self.options.overlap)

    @property
    def shadow_price(self) -> ShadowPrice:
        """Ours, at the prices of the mix."""
        prices = placement_prices(self.topology, self.mix)
        return ShadowPrice(self.predictor, prices, slo_scale=self.options.slo_scale, slo_base_s=self.options.slo_base_s)


Built = tuple[Policy, Controller | None]


def _controlled_threshold(ground: Ground, t: float) -> Built:
    """The paper's short timescale; it is defined for one cluster and one region."""
    n_p = ground.topology.regions[0].prefill
    return Threshold(int(t)), ThresholdController(case_of(ground.topology), n_p, int(t))


def _ours(ground: Ground, parameter: float) -> Built:
    policy = ground.shadow_price
    return policy, PriceController(ground.topology, policy)


def _ours_with_roles(ground: Ground, parameter: float) -> Built:
    policy, controller = _ours(ground, parameter)
    assert controller is not None  # _ours
    return policy, Both(controller, RoleController(ground.topology))


# Name -> (what its parameter is, or "" for none; how to build it).
CONTENDERS: Mapping[str, tuple[str, Callable[[Ground, float], Built]]] = {
    "always_local": ("", lambda ground, x: (AlwaysLocal(), None)),
    "always_remote": ("", lambda ground, x: (AlwaysRemote(), None)),
    "length_blind": ("share", lambda ground, x: (LengthBlind(x), None)),
    "reverse": ("tokens", lambda ground, x: (Reverse(int(x)), None)),
    "threshold": ("tokens", lambda ground, x: (Threshold(int(x)), None)),
    "paper_prefix": ("tokens", lambda ground, x: (PaperPrefix(int(x)), None)),
    "paper_controlled": ("tokens", _controlled_threshold),
    "cache_hit_rule": ("", lambda ground, x: (CacheHitRule(), None)),
    "least_ttft": ("", lambda ground, x: (LeastTtft(ground.predictor), None)),
    "shadow_price": ("", _ours),
    "shadow_price_roles": ("", _ours_with_roles),
}


def build(name: str, ground: Ground, parameter: float = 0.0) -> Built:
    """The policy and its controller. Raises InvalidInput for an unknown name or a parameter out of range."""
    if name not in CONTENDERS:
        raise InvalidInput("policy", name, f"one of {', '.join(CONTENDERS)}")
    return CONTENDERS[name][1](ground, parameter)

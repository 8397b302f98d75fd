"""Two timescales of control: thresholds and prices from what links and requests do, roles of instances from where the load goes.

A driver calls `observe` for every request that it places and `update` every few seconds, and carries out the actions. Clock and view are
arguments, so the same object runs live, in the simulator and under a test's virtual clock.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.policies import Threshold
from prfaas_jax.scheduling.predictive import ShadowPrice
from prfaas_jax.scheduling.prices import placement_prices
from prfaas_jax.scheduling.recent import WINDOW, LastingRates, RecentMix
from prfaas_jax.scheduling.throughput import CaseStudy
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import ClusterView, Placement, Policy, Request

# Requests that have to be seen before instances are moved: the mix has to be known better than for prices.
FEWEST_FOR_ROLES = 256
# How often prices are solved: the control period.
CONTROL_PERIOD_S = 30.0
# The long run of a link: the mean over so much time, or a rate that it has kept for so long.
_WINDOW_S, _STEADY_S = 300.0, 40.0
# So many times the looks before an instance is moved while a link has no rate that it keeps.
_UNSURE = 6


@dataclasses.dataclass(frozen=True)
class UsePolicy:
    """From now on `policy` decides."""

    policy: Policy
    reason: str


@dataclasses.dataclass(frozen=True)
class Convert:
    """One instance of a region drains and takes the other role."""

    region: str
    to: Literal["prefill", "decode"]
    reason: str


Action = UsePolicy | Convert


class Controller(Protocol):
    """Watches and acts; deterministic in its arguments and its own state."""

    def observe(self, request: Request, placement: Placement, now: float) -> None:
        """A request was placed."""
        ...

    def update(self, view: ClusterView, now: float) -> Sequence[Action]:
        """What to change now; nothing most of the time."""
        ...


class PriceController:
    """Short timescale, for `ShadowPrice`: every `period_s`, prices of the mix of the last requests at what the links move in the long run.

    Not now (see LastingRates): a link that is slow for a while delays what is sent, which the policy's predictions see, but drains it
    later. Priced as if it stayed slow, it would be left idle when it recovers.
    """

    def __init__(
        self,
        topology: Topology,
        policy: ShadowPrice,
        period_s: float = CONTROL_PERIOD_S,
        window_s: float = _WINDOW_S,
        steady_s: float = _STEADY_S,
    ):
        if not period_s > 0:
            raise InvalidInput("prices.period_s", period_s, "seconds above zero")
        self._topology, self._policy, self._period_s = topology, policy, period_s
        self._recent, self._lasting = RecentMix(), LastingRates(window_s, steady_s)
        self._solved_at = -math.inf

    def observe(self, request: Request, placement: Placement, now: float) -> None:
        """See Controller."""
        self._recent.add(request)

    def update(self, view: ClusterView, now: float) -> Sequence[Action]:
        """See Controller."""
        self._lasting.add(view, now)
        if now - self._solved_at < self._period_s or (mix := self._recent.mix()) is None:
            return ()
        self._solved_at = now
        prices = placement_prices(present(self._topology, view), mix, self._lasting.rates)
        self._policy = dataclasses.replace(self._policy, prices=prices)
        return (UsePolicy(self._policy, f"prices of the last {min(self._recent.count, WINDOW)} requests"),)


class ThresholdController:
    """Short timescale, as the paper has it: t searched again on the last requests' incremental lengths when the egress or a queue is full.

    The paper gives no triggers. Here: the link's capacity changed by more than a twentieth, or N_p did, or the work placed on the link, or
    waiting in a prefill queue, would take longer than `backlog_s`; at most every `period_s`. A new t is taken only if the model expects
    `gain` of it: that is the hysteresis. N_p is the region's present one, so that t follows when instances change their roles.
    """

    def __init__(self, case: CaseStudy, n_p: int, t: int, period_s: float = 15.0, backlog_s: float = 5.0, gain: float = 0.02):
        for field, value in (("period_s", period_s), ("backlog_s", backlog_s), ("gain", gain)):
            if not value >= 0:
                raise InvalidInput(f"threshold.{field}", value, "a number >= 0")
        self._case, self._n_p, self.t = case, n_p, t
        self._period_s, self._backlog_s, self._gain = period_s, backlog_s, gain
        self._recent = RecentMix()
        self._searched_at = -math.inf
        self._rate = case.b_out

    def observe(self, request: Request, placement: Placement, now: float) -> None:
        """See Controller."""
        self._recent.add(request)

    def update(self, view: ClusterView, now: float) -> Sequence[Action]:
        """See Controller."""
        if view.links is None or view.prefill.load is None or view.decode.load is None:
            raise InvalidInput("view", view, "loads and links")
        if view.links.bytes_per_s.shape != (1, 1):
            raise InvalidInput("view.links", view.links.bytes_per_s.shape, "(1, 1): one prefill cluster and one region")
        rate = float(view.links.bytes_per_s[0, 0])
        full = [load.drained_at_s.max() - now > self._backlog_s for load in (view.prefill.load, view.decode.load)]
        full.append(rate > 0 and view.links.pending_bytes[0, 0] / rate > self._backlog_s)
        n_p = min(int(view.decode.load.instances[0]), self._case.n_pd - 1)
        changed = abs(rate - self._rate) > 0.05 * self._rate or n_p != self._n_p
        if rate <= 0 or now - self._searched_at < self._period_s or not (changed or any(full)) or (mix := self._recent.mix()) is None:
            return ()
        self._searched_at, self._rate, self._n_p = now, rate, n_p
        case = dataclasses.replace(self._case, b_out=rate)
        thresholds = np.append(np.arange(0.0, float(mix.uncached.max()) + 1, 250.0), self.t)
        found = case.operate(mix, thresholds, n_p, "exact").lambda_max
        best = int(np.argmax(found))
        if found[best] < found[-1] * (1 + self._gain):
            return ()
        self.t = int(thresholds[best])
        return (UsePolicy(Threshold(self.t), f"t searched again at {rate:.3g} bytes/s, N_p {n_p}"),)


class RoleController:
    """Long timescale: instances of a region change between prefill and decode when another split sustains more of what comes.

    Links count as in the long run (see LastingRates), so that one that goes up and down does not drag instances with it. A split is changed
    only if enough requests were seen, and if in `confirm` looks in a row, one every `period_s`, the program expects at least `gain` of it,
    many more while a link counts as its mean: what it does now may be over before an instance has changed. Then one instance at a time, at
    least `cooldown_s` apart. What draining costs (an instance is away for about an output's time and the change itself) is part of
    `gain`.
    """

    def __init__(
        self,
        topology: Topology,
        period_s: float = 10.0,
        window_s: float = _WINDOW_S,
        steady_s: float = _STEADY_S,
        gain: float = 0.05,
        confirm: int = 4,
        cooldown_s: float = 120.0,
    ):
        for field, value in (("period_s", period_s), ("cooldown_s", cooldown_s)):
            if not value > 0:
                raise InvalidInput(f"roles.{field}", value, "seconds above zero")
        for field, value, least in (("gain", gain, 0), ("confirm", confirm, 1)):
            if not value >= least:
                raise InvalidInput(f"roles.{field}", value, f"a number >= {least}")
        self._topology, self._period_s = topology, period_s
        self._gain, self._confirm, self._cooldown_s = gain, confirm, cooldown_s
        self._recent, self._lasting = RecentMix(), LastingRates(window_s, steady_s)
        self._looked_at = self._converted_at = -math.inf
        self._votes: dict[tuple[str, str], int] = {}

    def observe(self, request: Request, placement: Placement, now: float) -> None:
        """See Controller."""
        self._recent.add(request)

    def update(self, view: ClusterView, now: float) -> Sequence[Action]:
        """See Controller."""
        self._lasting.add(view, now)
        if now - self._looked_at < self._period_s or now - self._converted_at < self._cooldown_s:
            return ()
        if (mix := self._recent.mix(FEWEST_FOR_ROLES)) is None:
            return ()
        self._looked_at = now
        now_there = present(self._topology, view)
        links = tuple(dataclasses.replace(x, bytes_per_s=max(1.0, self._lasting.rates[x.prefill, x.decode])) for x in now_there.links)
        current = dataclasses.replace(now_there, links=links)
        best, expected = None, optimum(current, mix, 32).lambda_max * (1 + self._gain)
        for region in current.regions:
            for to, change in (("prefill", 1), ("decode", -1)):
                split = dataclasses.replace(region, prefill=region.prefill + change, decode=region.decode - change)
                if split.prefill < (0 if any(x.decode == region.name for x in links) else 1) or split.decode < 1:
                    continue
                regions = tuple(split if r is region else r for r in current.regions)
                found = optimum(dataclasses.replace(current, regions=regions), mix, 32).lambda_max
                if found > expected:
                    best, expected = (region.name, to), found
        votes = self._votes.get(best, 0) + 1 if best else 0
        self._votes = {best: votes} if best else {}
        sure = all((x.prefill, x.decode) in self._lasting.kept for x in links)
        if best is None or votes < self._confirm * (1 if sure else _UNSURE):
            return ()
        self._votes, self._converted_at = {}, now
        to_role: Literal["prefill", "decode"] = "prefill" if best[1] == "prefill" else "decode"
        return (Convert(best[0], to_role, f"expects {expected:.3g} requests/s of it"),)


class Both:
    """Controllers side by side; each sees everything, actions come in their order."""

    def __init__(self, *controllers: Controller):
        self._controllers = controllers

    def observe(self, request: Request, placement: Placement, now: float) -> None:
        """See Controller."""
        for controller in self._controllers:
            controller.observe(request, placement, now)

    def update(self, view: ClusterView, now: float) -> Sequence[Action]:
        """See Controller."""
        return [action for controller in self._controllers for action in controller.update(view, now)]


def present(topology: Topology, view: ClusterView) -> Topology:
    """The topology as it is now, by the view's counts of prefill instances and of decode slots.

    Both, so that an instance that failed, or is on its way between roles, counts for neither. A prefill cluster without instances is gone,
    with its links.
    """
    load, far = view.decode.load, view.prefill.load
    if load is None or far is None:
        raise InvalidInput("view", (load, far), "loads: this controller counts instances")
    rows = {name: i for i, name in enumerate(view.decode.names)}
    regions = []
    for region in topology.regions:
        if (row := rows.get(region.name)) is not None:
            # Slots first: decode servers with none to prefill for them count as instances that prefill, too.
            n_d = min(max(1, round(float(load.slots[row]) / region.instance.max_batch)), region.instances)
            n_p = min(int(load.instances[row]), region.instances - n_d)
            region = dataclasses.replace(region, prefill=n_p, decode=n_d)
        regions.append(region)
    counts = {name: int(n) for name, n in zip(view.prefill.names, far.instances, strict=True)}
    up = [dataclasses.replace(c, instances=n) for c in topology.prefill if (n := counts.get(c.name, c.instances)) > 0]
    names = {c.name for c in up}
    links = tuple(link for link in topology.links if link.prefill in names)
    linked = {link.decode for link in links}
    kept = tuple(r if r.prefill or r.name in linked else dataclasses.replace(r, prefill=1) for r in regions)
    return dataclasses.replace(topology, prefill=tuple(up), regions=kept, links=links)

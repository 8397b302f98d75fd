"""Policies that predict: the fastest path, or ours, which also counts what a request costs everybody else."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.prediction import Copy, Predictor, Scene
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Placement, Request


@dataclasses.dataclass(frozen=True)
class LeastTtft:
    """The path of least predicted TTFT, whatever that does to others."""

    predictor: Predictor

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """The fastest path, local at a tie."""
        scene = self.predictor.scene(view, now)
        ttft = self.predictor.paths_in(scene, request).ttft_s
        copies = _copies(self.predictor, scene, request, ttft)
        for path, copy in copies.items():
            ttft.flat[path] -= copy.gain_s
        return _choose(view, ttft, ttft, copies, "least_ttft")


@dataclasses.dataclass(frozen=True)
class Prices:
    """What resources are worth: requests/s that one more second per second of prefill, or byte per second of link, would buy.

    `prices.placement_prices` gives them. Only their ratios matter, and only among the paths of a request.
    """

    prefill: Mapping[str, float]
    links: Mapping[tuple[str, str], float]


class _Table(NamedTuple):
    """Prices as a scene orders rows and paths: of rows, of a second of work that waits at each, of paths if any link has one."""

    scene: Scene
    rows: np.ndarray
    queue: np.ndarray
    links: np.ndarray | None


# Beyond every cost; where and putmask of numpy take several times as long as adding it.
NEVER = 1e300


@dataclasses.dataclass(frozen=True)
class ShadowPrice:
    """Ours: of the paths that keep the SLO, the one that takes least of what is scarce.

    Paths that are predicted to meet the request's budget (its SLO, with a `margin` for what predictions miss) come first. Among them, the
    busier the system, the more it counts what a path takes, and the less how fast it is. What it takes: its prefill seconds and link
    bytes, at the shadow prices of the throughput program; prices say what is scarce in the long run. A second on instances for which work
    waits costs `queue_price` more per second of that work: it says what is scarce now. What waits for a link is not priced, since the link
    may be slow for the moment only: predictions see it. Where no path meets the budget the request is late in any case. It goes where it
    takes least from others, and a prefill cluster looks the cheaper the more work waits there, as does a region that is further behind
    than any cluster and its link together (an outage is over): late requests gather where others are late already, and the rest stays in
    time. A prefix that only the other side holds is copied where that is faster than to compute it, and the path counts as what it is
    then. So long prompts drift to the fast cluster and short ones stay, as with a threshold, but nobody misses the SLO for the sake of the
    rule, and there is no threshold to tune.

    Attributes:
        predictor: of TTFT.
        prices: see `controllers.PriceController`, which keeps them up to date.
        busy_s: with this much work waiting per instance, or on a link, only prices count; with none, only speed.
        queue_price: of a second of waiting work, as a share of the mean price, per second.
        margin: share of the SLO that a prediction may use.
        slo_scale: the SLO is slo_scale * T + slo_base_s, with T the prefill time of the whole prompt on the fastest instance.
        slo_base_s: see there.
        gather_s: to a late request every so many seconds of work waiting where late requests gather divide its cost by e.
    """

    predictor: Predictor
    prices: Prices
    busy_s: float = 0.3
    queue_price: float = 0.03
    margin: float = 0.9
    slo_scale: float = 3.0
    slo_base_s: float = 0.5
    gather_s: float = 30.0

    def __post_init__(self) -> None:
        for field in ("queue_price", "slo_base_s"):
            if not getattr(self, field) >= 0:
                raise InvalidInput(f"shadow_price.{field}", getattr(self, field), "a number >= 0")
        for field in ("busy_s", "margin", "slo_scale", "gather_s"):
            if not getattr(self, field) > 0:
                raise InvalidInput(f"shadow_price.{field}", getattr(self, field), "a number above zero")
        object.__setattr__(self, "_tables", {})

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """The cheapest of the paths that keep the SLO; the cheapest of all where none does."""
        scene = self.predictor.scene(view, now)
        paths = self.predictor.paths_in(scene, request)
        table, ttft, work = self._table(scene), paths.ttft_s, paths.work_s
        slo = self.slo_scale * paths.alone_s + self.slo_base_s

        longest = _most_of(scene.waiting_s)
        prices = table.rows
        if longest > 0:
            prices = scene.waiting_s * table.queue
            prices += table.rows
        if longest < self.busy_s:
            # Links that are down are no path; their queue counts for nobody.
            longest = max(longest, _most_of(scene.pending_bytes * scene.link_s))
        busy = longest / self.busy_s

        cost = scene.over_paths(work * prices)
        if table.links is not None:
            cost += scene.sent * table.links
        copies = _copies(self.predictor, scene, request, cost)
        for path, copy in list(copies.items()):
            row, d = divmod(path, scene.regions)
            more = copy.sent * table.links.item(copy.link, d) if table.links is not None else 0.0
            more -= copy.saved_s * prices.item(scene.regions + row - 1 if row else d)
            if more > 0:
                del copies[path]  # the link has better use
            else:
                cost[row, d] += more
                ttft[row, d] -= copy.gain_s
        if busy < 1:
            cost *= busy
            cost += ttft * ((1 - busy) / slo)
        budget = self.margin * slo
        if cost.size and ttft.item(cost.argmin()) > budget:
            if _least_of(ttft) <= budget:
                cost += (ttft > budget) * NEVER
            else:
                cost *= np.exp(_late(scene) / -self.gather_s)
                cost[scene.closed > 0] = math.inf
        return _choose(view, ttft, cost, copies, "shadow_price")

    def _table(self, scene: Scene) -> _Table:
        known: dict[str, _Table] = self._tables  # type: ignore[attr-defined]
        table = known.get("last")
        if table is None or table.scene is not scene:
            far, near = scene.view.prefill.names, scene.view.decode.names
            rows = np.array([self.prices.prefill.get(name, 0.0) for name in (*near, *far)])
            links = np.array([[self.prices.links.get((p, d), 0.0) for d in near] for p in far]).reshape(len(far), len(near))
            mean = sum(rows.tolist()) / len(rows) if len(rows) else 0.0
            queue = self.queue_price * (mean or 1.0) / scene.instances
            table = known["last"] = _Table(scene, rows, queue, np.vstack([np.zeros(len(near)), links]) if links.any() else None)
        return table


def _most_of(values: np.ndarray) -> float:
    # argmax and argmin take numpy a quarter of what max and min do.
    return float(values.item(values.argmax())) if values.size else 0.0


def _least_of(values: np.ndarray) -> float:
    return float(values.item(values.argmin())) if values.size else math.inf


def _late(scene: Scene) -> np.ndarray:
    """Seconds of waiting work that make a path one where late requests gather: a cluster's, a region's beyond a cluster and its link's.

    A region that no cluster can reach has nobody to be further behind than: late requests of several such regions spread.
    """
    late = scene.over_paths(scene.waiting_s).copy()
    way = scene.closed[1:] == 0
    far = np.where(way, late[1:] + scene.pending_bytes * scene.link_s, 0.0)
    late[0] = np.maximum(late[0] - far.max(axis=0, initial=0.0), 0.0) * way.any(axis=0)
    return late


def _copies(predictor: Predictor, scene: Scene, request: Request, cost: np.ndarray) -> dict[int, Copy]:
    """Copies worth their time for the cheapest open path of either side: looking at every path would cost more than it finds."""
    far, near = request.cached_prefill, request.cached_decode
    one_sided = not scene.regions or len(cost) == 1  # the table's row 0 is local
    if one_sided or (isinstance(far, int) and isinstance(near, int) and far == near):
        return {}
    open_cost = cost + scene.closed
    found = {}
    for path in (int(open_cost[0].argmin()), scene.regions + int(open_cost[1:].argmin())):
        copy = predictor.copy(scene, request, path)
        if copy is not None:
            found[path] = copy
    return found


def _choose(view: ClusterView, ttft: np.ndarray, cost: np.ndarray, copies: Mapping[int, Copy], name: str) -> Placement:
    """The cheapest path, local at a tie; raises NoDecodeServer where none is open. The reason has its TTFT."""
    best = int(cost.argmin()) if cost.size else 0
    if not cost.size or cost.item(best) == math.inf:
        raise NoDecodeServer(f"no open path to any of {len(view.decode.names)} decode servers")
    row, d = divmod(best, len(view.decode.names))
    prefill = view.prefill.names[row - 1] if row else None
    where = f"on {prefill}" if row else "locally"
    reason = f"{name}: predicted {ttft.item(best):.2f} s {where}"
    if best not in copies:
        return Placement(prefill, view.decode.names[d], reason)
    return Placement(prefill, view.decode.names[d], f"{reason}, {copies[best].tokens} tokens copied", copies[best].tokens)

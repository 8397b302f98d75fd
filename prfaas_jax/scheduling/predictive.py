"""Policies that predict: the fastest path, or ours, which also counts what a request costs everybody else."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.path_kernels import cheapest, fastest
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Placement, Request


@dataclasses.dataclass(frozen=True)
class LeastTtft:
    """The path of least predicted TTFT, whatever that does to others."""

    predictor: Predictor

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """The fastest path, local at a tie."""
        return _placement("least_ttft", view, *fastest(self.predictor.asked(request, view, now)))


@dataclasses.dataclass(frozen=True)
class Prices:
    """What resources are worth: requests/s that one more second per second of prefill, or byte per second of link, would buy.

    `prices.placement_prices` gives them. Only their ratios matter, and only among the paths of a request.
    """

    prefill: Mapping[str, float]
    links: Mapping[tuple[str, str], float]


class _Table(NamedTuple):
    """Prices in the order of a view's rows and links; `queue` is that of a second of waiting work, per second of it per instance."""

    view: ClusterView
    rows: Float64[np.ndarray, " rows"]
    links: Float64[np.ndarray, "prefill decode"]
    queue: float


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
    busy_s: float = 0.1
    queue_price: float = 0.01
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
        asked, table = self.predictor.asked(request, view, now), self._table(view)
        constants = self.busy_s, self.margin, self.slo_scale, self.slo_base_s, self.gather_s
        return _placement("shadow_price", view, *cheapest(asked, table.rows, table.links, table.queue, *constants))

    def _table(self, view: ClusterView) -> _Table:
        known: dict[str, _Table] = self._tables  # type: ignore[attr-defined]
        table = known.get("last")
        if table is None or table.view is not view:
            far, near = view.prefill.names, view.decode.names
            rows = np.array([self.prices.prefill.get(name, 0.0) for name in (*near, *far)], np.float64)
            links = np.array([self.prices.links.get((p, d), 0.0) for p in far for d in near], np.float64).reshape(len(far), len(near))
            mean = sum(rows.tolist()) / len(rows) if len(rows) else 0.0
            table = known["last"] = _Table(view, rows, links, self.queue_price * (mean or 1.0))
        return table


def _placement(name: str, view: ClusterView, path: int, ttft_s: float, copied: int) -> Placement:
    """The path, with its TTFT as the reason; raises NoDecodeServer where it is none (-1)."""
    if path < 0:
        raise NoDecodeServer(f"no open path to any of {len(view.decode.names)} decode servers")
    row, d = divmod(path, len(view.decode.names))
    prefill = view.prefill.names[row - 1] if row else None
    reason = f"{name}: predicted {ttft_s:.2f} s {f'on {prefill}' if row else 'locally'}"
    return Placement(prefill, view.decode.names[d], f"{reason}, {copied} tokens copied" if copied else reason, copied)

"""Policies that predict: the TTFT of every path that a request could take, and what taking it costs everybody else.

A path is a region's own prefill instances, or a prefill cluster and its link. Predictions use what the view tells (work queued, bytes
placed on links, slots) and the profiles; all paths are evaluated at once, as arrays over `view.prefill` x `view.decode`.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64, Int64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profiles import Instance, PrefillTime
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Placement, Request, Servers


@dataclasses.dataclass(frozen=True, eq=False)
class Paths:
    """Predictions for one request: local paths per decode row, remote ones per (prefill row, decode row); infinite where there is none.

    `ttft_s` from now; `work_s` prefill seconds that the path takes from one instance; `sent` bytes that it puts on the link.
    """

    local_ttft_s: Float64[np.ndarray, " decode"]
    local_work_s: Float64[np.ndarray, " decode"]
    remote_ttft_s: Float64[np.ndarray, "prefill decode"]
    remote_work_s: Float64[np.ndarray, " prefill"]
    sent: Float64[np.ndarray, " decode"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """What the predictor knows of the servers of one role: their different profiles with their rows, seconds per chunk, local network."""

    profiles: tuple[tuple[PrefillTime, Int64[np.ndarray, " rows"]], ...]
    chunk_s: Float64[np.ndarray, " servers"]
    local_bytes_per_s: Float64[np.ndarray, " servers"]


class Predictor:
    """Predicts every path of a request from the view, with the profiles of a topology whose names the view uses.

    Waiting: prompts on an instance take turns chunk by chunk, and new ones go first (`batching.choose_prefill`). So a prompt waits for the
    chunk under way, for the first chunks of other new prompts, and in every further turn for one chunk of each prompt there; never for
    more than all the work that is there. Transfer: overlapped, the last chunk and the states follow the end of the prefill; a link shared
    fairly takes as long as its other transfers delay this one.
    """

    def __init__(self, topology: Topology, chunk: int, overlap: bool = True):
        self.kv, self._chunk, self._overlap = topology.kv, chunk, overlap
        self._instances: dict[str, Instance] = {c.name: c.instance for c in topology.clusters}
        self._local_rates = {r.name: r.local_bytes_per_s for r in topology.regions}
        self._known: dict[tuple[str, ...], _Rows] = {}

    def paths(self, request: Request, view: ClusterView, now: float) -> Paths:
        """All paths. Raises InvalidInput for a view without loads or links, or with names that the topology does not have."""
        far, near, links = view.prefill, view.decode, view.links
        if far.load is None or near.load is None or links is None:
            raise InvalidInput("view", (far.load, near.load, links), "loads and links: this policy predicts from them")
        tokens, held = request.tokens, request.cached_decode
        near_rows, far_rows = self._rows(near.names), self._rows(far.names)
        near_work = _work(near_rows, tokens, held)
        far_work = _work(far_rows, tokens, request.cached_prefill)
        sent = self._bytes(tokens, held, len(near.names))
        tail = sent
        if self._overlap:
            before = tokens - (tokens % self._chunk or min(tokens, self._chunk))
            if isinstance(held, int):
                tail = self._bytes(tokens, max(held, before), len(near.names))
            else:
                tail = self._bytes(tokens, np.maximum(held, before), len(near.names))

        turns = math.ceil((tokens - _least(held)) / self._chunk)
        local = _wait(near, near_rows, turns, now) + near_work + tail / near_rows.local_bytes_per_s
        local[(near.load.instances == 0) | ~near.healthy] = math.inf
        turns = math.ceil((tokens - _least(request.cached_prefill)) / self._chunk)
        computed = _wait(far, far_rows, turns, now) + far_work
        with np.errstate(divide="ignore", invalid="ignore"):
            ahead = np.minimum(links.pending_bytes, links.pending * sent)
            crossed = (ahead + sent) / links.bytes_per_s
            remote = np.maximum(computed[:, None] + tail / links.transfer_bytes_per_s, crossed) + links.rtt_s / 2
        remote[(links.bytes_per_s == 0) | ~near.healthy | (~far.healthy | (far.load.instances == 0))[:, None]] = math.inf
        # Every path of a region waits for its decode slots; it only tells regions apart.
        queue = near.load.waiting / np.maximum(near.load.slots, 1.0)
        return Paths(local + queue, near_work, remote + queue, far_work, sent)

    def _bytes(self, tokens: int, held: int | Int64[np.ndarray, " decode"], rows: int) -> Float64[np.ndarray, " decode"]:
        if isinstance(held, int):
            return np.full(rows, self.kv.bytes(tokens, held))
        return self.kv.bytes_of(np.full(rows, float(tokens)), held.astype(np.float64))

    def _rows(self, names: tuple[str, ...]) -> _Rows:
        if names not in self._known:
            unknown = [name for name in names if name not in self._instances]
            if unknown:
                raise InvalidInput("view names", unknown, f"clusters with a profile: {sorted(self._instances)}")
            times = [self._instances[name].prefill for name in names]
            profiles = tuple((t, np.array([i for i, x in enumerate(times) if x == t])) for t in dict.fromkeys(times))
            chunk_s = np.array([t.growth(min(self._chunk, t.max_tokens)) for t in times])
            self._known[names] = _Rows(profiles, chunk_s, np.array([self._local_rates.get(name, math.inf) for name in names]))
        return self._known[names]


def _least(cached: int | Int64[np.ndarray, " rows"]) -> int:
    return cached if isinstance(cached, int) else int(cached.min(initial=0))


def _work(rows: _Rows, tokens: int, cached: int | Int64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """T_prefill(cached, tokens - cached) on one instance of every row."""
    work = np.empty(len(rows.chunk_s))
    for time, where in rows.profiles:
        whole = time.start_s + time.growth(tokens)
        work[where] = whole - (time.growth(cached) if isinstance(cached, int) else time.growth_of(cached[where].astype(np.float64)))
    return work


def _wait(servers: Servers, rows: _Rows, turns: int, now: float) -> Float64[np.ndarray, " rows"]:
    """See Predictor: seconds, besides its own work, until a prompt of that many chunks is computed."""
    load = servers.load
    assert load is not None  # paths() checked
    chunks = 0.5 * (load.jobs > 0) + load.fresh + (turns - 1) * load.jobs
    return np.minimum(np.maximum(load.free_at_s - now, 0.0), chunks * rows.chunk_s)


@dataclasses.dataclass(frozen=True)
class LeastTtft:
    """The path of least predicted TTFT, whatever that does to others."""

    predictor: Predictor

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """The fastest path, local at a tie."""
        paths = self.predictor.paths(request, view, now)
        return _choose(view, paths, paths.local_ttft_s, paths.remote_ttft_s, "least_ttft")


@dataclasses.dataclass(frozen=True)
class Prices:
    """What resources are worth: requests/s that one more second per second of prefill, or byte per second of link, would buy.

    `optimum.placement_prices` gives them. Only their ratios matter, and only among the paths of a request.
    """

    prefill: Mapping[str, float]
    links: Mapping[tuple[str, str], float]


@dataclasses.dataclass(frozen=True)
class ShadowPrice:
    """Ours: of the paths that keep the SLO, the one that takes least of what is scarce.

    Paths that are predicted to meet the request's budget (its SLO, with a `margin` for what predictions miss) come first. Among them, the
    busier the system, the more it counts what a path takes, and the less how fast it is. What it takes: its prefill seconds and link bytes,
    at the shadow prices of the throughput program; prices say what is scarce in the long run. A second on instances for which work waits
    costs `queue_price` more per second of that work: it says what is scarce now. What waits for a link is not priced, since the link may
    be slow for the moment only: predictions see it. Where no path meets the budget the request is late in any case. It goes where it takes
    least from others, and a prefill cluster looks the cheaper the more work waits there: late requests gather where others are late
    already, and the rest of the system stays in time. So long prompts drift to the fast cluster and short ones stay, as with a threshold,
    but nobody misses the SLO for the sake of the rule, and there is no threshold to tune.

    Attributes:
        predictor: of TTFT.
        prices: see `controllers.PriceController`, which keeps them up to date.
        busy_s: with this much work waiting per instance, or on a link, only prices count; with none, only speed.
        queue_price: of a second of waiting work, as a share of the mean price, per second.
        margin: share of the SLO that a prediction may use.
        slo_scale: the SLO is slo_scale * T + slo_base_s, with T the prefill time on the fastest path.
        slo_base_s: see there.
        gather_s: to a late request every so many seconds of work waiting on a prefill cluster divide its cost by e.
    """

    predictor: Predictor
    prices: Prices
    busy_s: float = 1.0
    queue_price: float = 0.1
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
        paths = self.predictor.paths(request, view, now)
        far, near, links = view.prefill.load, view.decode.load, view.links
        assert far is not None and near is not None and links is not None  # paths() checked
        near_price, far_price, link_price, scale = self._table(view)
        fastest = min(paths.local_work_s.min(initial=math.inf), paths.remote_work_s.min(initial=math.inf))
        slo = self.slo_scale * fastest + self.slo_base_s

        near_queue = np.maximum(near.drained_at_s - now, 0.0)
        far_queue = np.maximum(far.drained_at_s - now, 0.0)
        # Links that are down are no path; their queue counts for nobody.
        crossing = np.divide(links.pending_bytes, links.bytes_per_s, out=np.zeros_like(links.pending_bytes), where=links.bytes_per_s > 0)
        longest = max(near_queue.max(initial=0.0), far_queue.max(initial=0.0), crossing.max(initial=0.0))
        busy = min(1.0, longest / self.busy_s)

        with np.errstate(divide="ignore", invalid="ignore"):
            local = busy * paths.local_work_s * (near_price + scale * near_queue / np.maximum(near.instances, 1.0))
            remote = (paths.remote_work_s * (far_price + scale * far_queue / np.maximum(far.instances, 1.0)))[:, None]
            remote = busy * (remote + paths.sent * link_price)
            local += (1 - busy) * paths.local_ttft_s / slo
            remote += (1 - busy) * paths.remote_ttft_s / slo
        # Late paths only where there is no other: no price is ever as high.
        local = np.where(paths.local_ttft_s <= self.margin * slo, local, 1e9 + local)
        late = 1e9 + remote * np.exp(-far_queue / self.gather_s)[:, None]
        remote = np.where(paths.remote_ttft_s <= self.margin * slo, remote, late)
        local[np.isinf(paths.local_ttft_s)] = math.inf
        remote[np.isinf(paths.remote_ttft_s)] = math.inf
        return _choose(view, paths, local, remote, "shadow_price")

    def _table(self, view: ClusterView) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Prices of rows and pairs, and that of a second of queue."""
        tables: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[np.ndarray, np.ndarray, np.ndarray, float]] = self._tables  # type: ignore[attr-defined]
        key = view.prefill.names, view.decode.names
        if key not in tables:
            near = np.array([self.prices.prefill.get(name, 0.0) for name in view.decode.names])
            far = np.array([self.prices.prefill.get(name, 0.0) for name in view.prefill.names])
            link = np.array([[self.prices.links.get((p, d), 0.0) for d in view.decode.names] for p in view.prefill.names])
            prices = [*near, *far]
            mean = sum(prices) / len(prices) if prices else 0.0
            tables[key] = near, far, link.reshape(len(far), len(near)), self.queue_price * (mean or 1.0)
        return tables[key]


def _choose(view: ClusterView, paths: Paths, local: np.ndarray, remote: np.ndarray, name: str) -> Placement:
    """The cheapest path, local at a tie; raises NoDecodeServer where none is open."""
    d = int(np.argmin(local))
    least = local[d]
    if remote.size:
        i, j = divmod(int(np.argmin(remote)), remote.shape[1])
        if remote[i, j] < least:
            other = f", {paths.local_ttft_s[d]:.2f} s locally" if least < math.inf else ""
            reason = f"{name}: predicted {paths.remote_ttft_s[i, j]:.2f} s on {view.prefill.names[i]}{other}"
            return Placement(view.prefill.names[i], view.decode.names[j], reason)
    if least == math.inf:
        raise NoDecodeServer(f"no open path to any of {len(view.decode.names)} decode servers")
    other = f", {float(paths.remote_ttft_s.min()):.2f} s remotely" if remote.size else ""
    return Placement(None, view.decode.names[d], f"{name}: predicted {paths.local_ttft_s[d]:.2f} s locally{other}")

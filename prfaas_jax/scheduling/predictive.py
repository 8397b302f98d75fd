"""Policies that predict: the TTFT of every path that a request could take, and what taking it costs everybody else.

A path is a region's own prefill instances, or a prefill cluster and its link. Predictions use what the view tells (work queued, bytes
placed on links, slots) and the profiles. All paths are evaluated at once: a decision is some forty calls of numpy, whose number is what it
costs, so the two roles are rows of the same columns (regions first), and local paths are row 0 of the same table as remote ones.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profiles import Instance, PrefillTime
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Placement, Request


@dataclasses.dataclass(frozen=True, eq=False)
class Paths:
    """Predictions for one request.

    Attributes:
        ttft_s: from now; row 0 of local paths per decode row, then a row per prefill row; infinite where there is no path.
        work_s: prefill seconds that a path takes from one instance; decode rows, then prefill rows.
        sent: bytes that a remote path puts on the link.
    """

    ttft_s: Float64[np.ndarray, "paths decode"]
    work_s: Float64[np.ndarray, " rows"]
    sent: Float64[np.ndarray, " decode"]

    @property
    def local_ttft_s(self) -> Float64[np.ndarray, " decode"]:
        """Of local paths."""
        return self.ttft_s[0]

    @property
    def remote_ttft_s(self) -> Float64[np.ndarray, "prefill decode"]:
        """Of remote paths."""
        return self.ttft_s[1:]

    @property
    def local_work_s(self) -> Float64[np.ndarray, " decode"]:
        """Of local paths."""
        return self.work_s[: len(self.sent)]

    @property
    def remote_work_s(self) -> Float64[np.ndarray, " prefill"]:
        """Of remote paths."""
        return self.work_s[len(self.sent) :]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """What the predictor knows of the servers of one role: their different profiles with their rows, seconds per chunk, local network."""

    profiles: tuple[tuple[PrefillTime, slice | Int64[np.ndarray, " rows"]], ...]
    chunk_s: Float64[np.ndarray, " servers"]
    local_bytes_per_s: Float64[np.ndarray, " servers"]


class _Scene:
    """A view in the order of `Paths`: what follows from columns that seldom change, and room to copy the others to at each call."""

    def __init__(self, view: ClusterView, of: tuple[bytes, ...], near: _Rows, far: _Rows):
        decode, prefill, links = view.decode, view.prefill, view.links
        assert decode.load is not None and prefill.load is not None and links is not None  # Predictor.scene checked
        self.names, self.of, self.near, self.far = (prefill.names, decode.names), of, near, far
        n, m = len(decode.names), len(prefill.names)
        self.regions = n
        shut = (decode.load.instances == 0) | ~decode.healthy
        no_way = (links.bytes_per_s == 0) | (links.transfer_bytes_per_s == 0) | ~decode.healthy
        no_way |= (~prefill.healthy | (prefill.load.instances == 0))[:, None]
        self.closed = np.where(np.vstack([shut, no_way]), math.inf, 0.0)
        self.delay_s = np.vstack([np.zeros(n), links.rtt_s / 2]) + self.closed
        # Closed paths are infinite by their delay; a rate of zero would only warn.
        self.bytes_per_s = np.vstack([np.full(n, math.inf), np.where(links.bytes_per_s > 0, links.bytes_per_s, math.inf)])
        self.transfer_bytes_per_s = np.vstack([near.local_bytes_per_s, links.transfer_bytes_per_s])
        self.transfer_bytes_per_s[self.transfer_bytes_per_s == 0] = math.inf
        self.slots = np.maximum(decode.load.slots, 1.0)
        self.chunk_s = np.concatenate([near.chunk_s, far.chunk_s])
        self.instances = np.maximum(np.concatenate([decode.load.instances, prefill.load.instances]), 1.0)
        # Path -> row, for columns of rows.
        self.row = np.vstack([np.arange(n), np.repeat(n + np.arange(m), n).reshape(m, n)])
        self.half, self.zero, self.now = np.full(n + m, 0.5), np.zeros(n + m), np.empty(n + m)
        self.jobs, self.fresh, self.free_at_s, self.drained_at_s, self.turns = (np.empty(n + m) for _ in range(5))
        self.pending, self.pending_bytes, self.sent, self.tail = (np.zeros((m + 1, n)) for _ in range(4))

    def read(self, view: ClusterView, now: float) -> None:
        """Copies what changes."""
        decode, prefill, links, n = view.decode.load, view.prefill.load, view.links, self.regions
        assert decode is not None and prefill is not None and links is not None  # Predictor.scene checked
        self.jobs[:n], self.jobs[n:] = decode.jobs, prefill.jobs
        self.fresh[:n], self.fresh[n:] = decode.fresh, prefill.fresh
        self.free_at_s[:n], self.free_at_s[n:] = decode.free_at_s, prefill.free_at_s
        self.drained_at_s[:n], self.drained_at_s[n:] = decode.drained_at_s, prefill.drained_at_s
        self.pending[1:], self.pending_bytes[1:] = links.pending, links.pending_bytes
        self.now.fill(now)


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
        self._scene: _Scene | None = None

    def paths(self, request: Request, view: ClusterView, now: float) -> Paths:
        """All paths. Raises InvalidInput for a view without loads or links, or with names that the topology does not have."""
        return self.paths_in(self.scene(view, now), request, view)

    def paths_in(self, scene: _Scene, request: Request, view: ClusterView) -> Paths:
        """`paths` of a scene that has just been read from the view."""
        near = view.decode.load
        assert near is not None  # scene() checked
        tokens, chunk, n = request.tokens, self._chunk, scene.regions
        held, far_held = _or_zero(request.cached_decode), _or_zero(request.cached_prefill)
        sent = tail = self._bytes(tokens, held)
        if self._overlap:
            before = tokens - (tokens % chunk or min(tokens, chunk))
            tail = self._bytes(tokens, max(held, before) if isinstance(held, int) else np.maximum(held, before))
        scene.sent[...], scene.tail[...] = sent, tail

        work = np.empty(len(scene.now))
        _work(scene.near, tokens, held, work[:n])
        _work(scene.far, tokens, far_held, work[n:])
        # Seconds, besides its own work, until a prompt of that many chunks is computed.
        chunks = np.minimum(scene.jobs, scene.half)
        chunks += scene.fresh
        turns, far_turns = (tokens - _least(held) - 1) // chunk, (tokens - _least(far_held) - 1) // chunk  # after the first
        if turns or far_turns:
            scene.turns[:n], scene.turns[n:] = turns, far_turns
            chunks += scene.turns * scene.jobs
        chunks *= scene.chunk_s
        computed = scene.free_at_s - scene.now
        np.maximum(computed, scene.zero, out=computed)
        np.minimum(computed, chunks, out=computed)
        computed += work

        crossed = scene.pending * scene.sent
        np.minimum(scene.pending_bytes, crossed, out=crossed)
        crossed += scene.sent
        crossed /= scene.bytes_per_s
        ttft = scene.tail / scene.transfer_bytes_per_s
        ttft += computed.take(scene.row)
        np.maximum(ttft, crossed, out=ttft)
        ttft += scene.delay_s
        if np.count_nonzero(near.waiting):
            # Every path of a region waits for its decode slots; it only tells regions apart.
            ttft += near.waiting / scene.slots
        return Paths(ttft, work, scene.sent[0].copy())

    def _bytes(self, tokens: int, held: int | Int64[np.ndarray, " decode"]) -> float | Float64[np.ndarray, " decode"]:
        return self.kv.bytes(tokens, held) if isinstance(held, int) else self.kv.bytes_of(np.array(float(tokens)), held)

    def scene(self, view: ClusterView, now: float) -> _Scene:
        """Read anew, and made anew when a column that seldom changes has changed. InvalidInput as `paths`."""
        far, near, links, scene = view.prefill.load, view.decode.load, view.links, self._scene
        if far is None or near is None or links is None:
            raise InvalidInput("view", (far, near, links), "loads and links: this policy predicts from them")
        columns = (links.bytes_per_s, links.transfer_bytes_per_s, links.rtt_s, far.instances, near.instances, near.slots)
        of = tuple([c.tobytes() for c in (*columns, view.prefill.healthy, view.decode.healthy)])
        if scene is None or of != scene.of or scene.names[0] is not view.prefill.names or scene.names[1] is not view.decode.names:
            scene = self._scene = _Scene(view, of, self._rows(view.decode.names), self._rows(view.prefill.names))
        scene.read(view, now)
        return scene

    def _rows(self, names: tuple[str, ...]) -> _Rows:
        if names not in self._known:
            unknown = [name for name in names if name not in self._instances]
            if unknown:
                raise InvalidInput("view names", unknown, f"clusters with a profile: {sorted(self._instances)}")
            times = [self._instances[name].prefill for name in names]
            groups = {t: [i for i, x in enumerate(times) if x == t] for t in times}
            profiles = tuple((t, slice(None) if len(groups) == 1 else np.array(rows)) for t, rows in groups.items())
            chunk_s = np.array([t.growth(min(self._chunk, t.max_tokens)) for t in times])
            self._known[names] = _Rows(profiles, chunk_s, np.array([self._local_rates.get(name, math.inf) for name in names]))
        return self._known[names]


def _or_zero(cached: int | Int64[np.ndarray, " rows"]) -> int | Int64[np.ndarray, " rows"]:
    return cached if isinstance(cached, int) or np.count_nonzero(cached) else 0


def _least(cached: int | Int64[np.ndarray, " rows"]) -> int:
    return cached if isinstance(cached, int) else int(cached.item(cached.argmin()))


def _work(rows: _Rows, tokens: int, cached: int | Int64[np.ndarray, " rows"], work: Float64[np.ndarray, " rows"]) -> None:
    """Writes T_prefill(cached, tokens - cached) on one instance of every row."""
    for time, where in rows.profiles:
        whole = time.start_s + time.growth(tokens)
        work[where] = whole - (time.growth(cached) if isinstance(cached, int) else time.growth_of(cached[where]))


@dataclasses.dataclass(frozen=True)
class LeastTtft:
    """The path of least predicted TTFT, whatever that does to others."""

    predictor: Predictor

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """The fastest path, local at a tie."""
        paths = self.predictor.paths(request, view, now)
        return _choose(view, paths, paths.ttft_s, "least_ttft")


@dataclasses.dataclass(frozen=True)
class Prices:
    """What resources are worth: requests/s that one more second per second of prefill, or byte per second of link, would buy.

    `prices.placement_prices` gives them. Only their ratios matter, and only among the paths of a request.
    """

    prefill: Mapping[str, float]
    links: Mapping[tuple[str, str], float]


class _Table(NamedTuple):
    """Prices as `Paths` orders rows and paths, a second of queue's price for every row, and whether links have one at all."""

    names: tuple[tuple[str, ...], tuple[str, ...]]
    rows: np.ndarray
    queue: np.ndarray
    links: np.ndarray
    links_cost: bool


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
        scene = self.predictor.scene(view, now)
        paths = self.predictor.paths_in(scene, request, view)
        table, ttft = self._table(view), paths.ttft_s
        slo = self.slo_scale * _least_of(paths.work_s) + self.slo_base_s

        queue = scene.drained_at_s - scene.now
        longest = max(0.0, _most_of(queue))
        prices = table.rows
        if longest > 0:
            np.maximum(queue, scene.zero, out=queue)
            queue *= table.queue
            queue /= scene.instances
            queue += prices
            prices = queue
        if longest < self.busy_s:
            # Links that are down are no path; their queue counts for nobody.
            longest = max(longest, _most_of(scene.pending_bytes / scene.bytes_per_s))
        busy = min(1.0, longest / self.busy_s)

        cost = (paths.work_s * prices).take(scene.row)
        if table.links_cost:
            cost += scene.sent * table.links
        if busy < 1:
            cost *= busy
            speed = (1 - busy) * ttft
            speed /= slo
            cost += speed
        budget, best = self.margin * slo, cost + scene.closed
        if cost.size and ttft.item(best.argmin()) > budget:
            in_time = np.where(ttft <= budget, best, math.inf)
            if in_time.item(in_time.argmin()) < math.inf:
                best = in_time
            else:
                waiting = np.maximum(scene.drained_at_s - scene.now, scene.zero)
                waiting[: scene.regions] = 0.0
                best = cost * np.exp(waiting / -self.gather_s).take(scene.row) + scene.closed
        return _choose(view, paths, best, "shadow_price")

    def _table(self, view: ClusterView) -> _Table:
        known: dict[str, _Table] = self._tables  # type: ignore[attr-defined]
        table, near, far = known.get("last"), view.decode.names, view.prefill.names
        if table is None or table.names[0] is not far or table.names[1] is not near:
            rows = np.array([self.prices.prefill.get(name, 0.0) for name in (*near, *far)])
            links = np.array([[self.prices.links.get((p, d), 0.0) for d in near] for p in far]).reshape(len(far), len(near))
            mean = sum(rows.tolist()) / len(rows) if len(rows) else 0.0
            queue = np.full(len(rows), self.queue_price * (mean or 1.0))
            table = known["last"] = _Table((far, near), rows, queue, np.vstack([np.zeros(len(near)), links]), bool(links.any()))
        return table


def _most_of(values: np.ndarray) -> float:
    # argmax and argmin take numpy a quarter of what max and min do.
    return float(values.item(values.argmax())) if values.size else 0.0


def _least_of(values: np.ndarray) -> float:
    return float(values.item(values.argmin())) if values.size else math.inf


def _choose(view: ClusterView, paths: Paths, cost: np.ndarray, name: str) -> Placement:
    """The cheapest path, local at a tie; raises NoDecodeServer where none is open. The reason names the fastest on the other side."""
    best = int(cost.argmin()) if cost.size else 0
    if not cost.size or cost.item(best) == math.inf:
        raise NoDecodeServer(f"no open path to any of {len(view.decode.names)} decode servers")
    row, d = divmod(best, len(view.decode.names))
    took, other = paths.ttft_s.item(best), _least_of(paths.ttft_s[1:] if row == 0 else paths.ttft_s[0])
    if row == 0:
        rest = f", {other:.2f} s remotely" if view.prefill.names else ""
        return Placement(None, view.decode.names[d], f"{name}: predicted {took:.2f} s locally{rest}")
    rest = f", {other:.2f} s locally" if other < math.inf else ""
    far = view.prefill.names[row - 1]
    return Placement(far, view.decode.names[d], f"{name}: predicted {took:.2f} s on {far}{rest}")

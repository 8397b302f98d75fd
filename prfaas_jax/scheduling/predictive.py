"""Policies that predict: the TTFT of every path that a request could take, and what taking it costs everybody else.

A path is a region's own prefill instances, or a prefill cluster and its link. Predictions use what the view tells (work queued, bytes
placed on links, slots) and the profiles. All paths are evaluated at once: the number of calls of numpy is what a decision costs, so the two
roles are rows of the same columns (regions first), and local paths are row 0 of the same table as remote ones.
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


class Paths(NamedTuple):
    """Predictions for one request.

    Attributes:
        ttft_s: from now; row 0 of local paths per decode row, then a row per prefill row; infinite where there is no path.
        work_s: prefill seconds that a path takes from one instance; decode rows, then prefill rows.
        sent: bytes that a remote path puts on the link; one number where every region lacks the same.
    """

    ttft_s: Float64[np.ndarray, "paths decode"]
    work_s: Float64[np.ndarray, " rows"]
    sent: float | Float64[np.ndarray, " decode"]

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
        return self.work_s[: self.ttft_s.shape[1]]

    @property
    def remote_work_s(self) -> Float64[np.ndarray, " prefill"]:
        """Of remote paths."""
        return self.work_s[self.ttft_s.shape[1] :]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """What the predictor knows of the servers of one role: their different profiles with their rows, seconds per chunk, local network."""

    profiles: tuple[tuple[PrefillTime, slice | Int64[np.ndarray, " rows"]], ...]
    chunk_s: Float64[np.ndarray, " servers"]
    local_bytes_per_s: Float64[np.ndarray, " servers"]


class _Scene:
    """A view in the order of `Paths`: what follows from columns that seldom change, and what changes, copied at each call."""

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
        # Seconds per byte; closed paths are infinite by their delay.
        self.link_s = np.vstack([np.zeros(n), _inverse(links.bytes_per_s)])
        self.transfer_s = np.vstack([_inverse(near.local_bytes_per_s), _inverse(links.transfer_bytes_per_s)])
        self.slots = np.maximum(decode.load.slots, 1.0)
        self.chunk_s = np.concatenate([near.chunk_s, far.chunk_s])
        self.instances = np.maximum(np.concatenate([decode.load.instances, prefill.load.instances]), 1.0)
        self._row = np.vstack([np.arange(n), np.repeat(n + np.arange(m), n).reshape(m, n)])
        self.half, self._zeros, self.turns = np.full(n + m, 0.5), np.zeros((2, n + m)), np.empty(n + m)
        self._queues, self._placed = np.empty((4, n + m)), np.zeros((2, m + 1, n))
        # A table costs less to fill and multiply than a number costs to multiply by, and far less than a row to broadcast.
        self.sent, self.tail = np.empty((2, m + 1, n))
        self._times = self._queues[:2]
        self.free_s, self.waiting_s, self.jobs, self.fresh = self._queues  # from now, not below 0
        self.pending, self.pending_bytes = self._placed

    def read(self, view: ClusterView, now: float) -> None:
        """Copies what changes."""
        decode, prefill, links, n = view.decode.load, view.prefill.load, view.links, self.regions
        assert decode is not None and prefill is not None and links is not None  # Predictor.scene checked
        self._queues[:, :n], self._queues[:, n:] = decode.table[decode.QUEUES], prefill.table[prefill.QUEUES]
        self._placed[:, 1:] = links.table[links.PLACED]
        self._times -= now
        np.maximum(self._times, self._zeros, out=self._times)

    def over_paths(self, rows: Float64[np.ndarray, " rows"]) -> Float64[np.ndarray, "paths decode"]:
        """A column of rows as a table of paths: a view of it where there is one region."""
        return rows.reshape(-1, 1) if self.regions == 1 else rows[self._row]


def _inverse(rates: np.ndarray) -> np.ndarray:
    return 1.0 / np.where(rates > 0, rates, math.inf)


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
        held, far_held = _plain(request.cached_decode), _plain(request.cached_prefill)
        sent = tail = self._bytes(tokens, held)
        if self._overlap:
            before = tokens - (tokens % chunk or min(tokens, chunk))
            if _most(held) <= before:
                tail = self._bytes(tokens, before)
            elif not isinstance(held, int):
                tail = self._bytes(tokens, np.maximum(held, before))

        work = np.empty(len(scene.jobs))
        _work(scene.near, tokens, held, work[:n])
        _work(scene.far, tokens, far_held, work[n:])
        # Seconds, besides its own work, until a prompt of that many chunks is computed.
        chunks = np.minimum(scene.jobs, scene.half)
        chunks += scene.fresh
        if tokens > chunk:
            scene.turns[:n] = (tokens - _least(held) - 1) // chunk  # after the first
            scene.turns[n:] = (tokens - _least(far_held) - 1) // chunk
            chunks += scene.turns * scene.jobs
        chunks *= scene.chunk_s
        np.minimum(chunks, scene.free_s, out=chunks)
        chunks += work

        scene.sent[...], scene.tail[...] = sent, tail
        crossed = scene.pending * scene.sent
        np.minimum(crossed, scene.pending_bytes, out=crossed)
        crossed += scene.sent
        crossed *= scene.link_s
        ttft = scene.tail * scene.transfer_s
        ttft += scene.over_paths(chunks)
        np.maximum(ttft, crossed, out=ttft)
        ttft += scene.delay_s
        if _most_of(near.waiting) > 0:
            # Every path of a region waits for its decode slots; it only tells regions apart.
            ttft += near.waiting / scene.slots
        return Paths(ttft, work, sent)

    def _bytes(self, tokens: int, held: int | Int64[np.ndarray, " decode"]) -> float | Float64[np.ndarray, " decode"]:
        return float(self.kv.bytes(tokens, held)) if isinstance(held, int) else self.kv.bytes_of(tokens, held)

    def scene(self, view: ClusterView, now: float) -> _Scene:
        """Read anew, and made anew when a column that seldom changes has changed. InvalidInput as `paths`."""
        far, near, links, scene = view.prefill.load, view.decode.load, view.links, self._scene
        if far is None or near is None or links is None:
            raise InvalidInput("view", (far, near, links), "loads and links: this policy predicts from them")
        seldom = far.table[far.SELDOM], near.table[near.SELDOM], links.table[links.SELDOM], view.prefill.healthy, view.decode.healthy
        of = tuple([columns.tobytes() for columns in seldom])
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


def _plain(cached: int | Int64[np.ndarray, " rows"]) -> int | Int64[np.ndarray, " rows"]:
    """One number where all rows have the same."""
    if isinstance(cached, int):
        return cached
    return cached if len(cached) > 1 and _most(cached) else int(cached.max(initial=0))


def _least(cached: int | Int64[np.ndarray, " rows"]) -> int:
    return cached if isinstance(cached, int) else int(cached.item(cached.argmin()))


def _most(cached: int | Int64[np.ndarray, " rows"]) -> int:
    return cached if isinstance(cached, int) else int(cached.item(cached.argmax()))


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
        return _choose(view, paths.ttft_s, paths.ttft_s, "least_ttft")


@dataclasses.dataclass(frozen=True)
class Prices:
    """What resources are worth: requests/s that one more second per second of prefill, or byte per second of link, would buy.

    `prices.placement_prices` gives them. Only their ratios matter, and only among the paths of a request.
    """

    prefill: Mapping[str, float]
    links: Mapping[tuple[str, str], float]


class _Table(NamedTuple):
    """Prices as a scene orders rows and paths: of rows, of a second of work that waits at each, of paths if any link has one."""

    scene: _Scene
    rows: np.ndarray
    queue: np.ndarray
    links: np.ndarray | None


# Beyond every cost; where and putmask of numpy take several times as long as adding it.
NEVER = 1e300


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
        table, ttft, work = self._table(scene), paths.ttft_s, paths.work_s
        slo = self.slo_scale * _least_of(work) + self.slo_base_s

        longest = _most_of(scene.waiting_s)
        if longest > 0:
            taken = scene.waiting_s * table.queue
            taken += table.rows
            taken *= work
        else:
            taken = work * table.rows
        if longest < self.busy_s:
            # Links that are down are no path; their queue counts for nobody.
            longest = max(longest, _most_of(scene.pending_bytes * scene.link_s))
        busy = min(1.0, longest / self.busy_s)

        cost = scene.over_paths(taken)
        if table.links is not None:
            cost += scene.sent * table.links
        if busy < 1:
            cost *= busy
            cost += ttft * ((1 - busy) / slo)
        budget = self.margin * slo
        if cost.size and ttft.item(cost.argmin()) > budget:
            if _least_of(ttft) <= budget:
                cost += (ttft > budget) * NEVER
            else:
                waiting = scene.waiting_s / -self.gather_s
                waiting[: scene.regions] = 0.0
                cost *= scene.over_paths(np.exp(waiting))
                cost += scene.closed
        return _choose(view, ttft, cost, "shadow_price")

    def _table(self, scene: _Scene) -> _Table:
        known: dict[str, _Table] = self._tables  # type: ignore[attr-defined]
        table = known.get("last")
        if table is None or table.scene is not scene:
            far, near = scene.names
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


def _choose(view: ClusterView, ttft: np.ndarray, cost: np.ndarray, name: str) -> Placement:
    """The cheapest path, local at a tie; raises NoDecodeServer where none is open. The reason has its TTFT."""
    best = int(cost.argmin()) if cost.size else 0
    if not cost.size or cost.item(best) == math.inf:
        raise NoDecodeServer(f"no open path to any of {len(view.decode.names)} decode servers")
    row, d = divmod(best, len(view.decode.names))
    prefill = view.prefill.names[row - 1] if row else None
    where = f"on {prefill}" if row else "locally"
    return Placement(prefill, view.decode.names[d], f"{name}: predicted {ttft.item(best):.2f} s {where}")

"""Predictions from a view: the TTFT of every path that a request could take, and the prefill seconds that it would take there.

A path is a region's own prefill instances, or a prefill cluster and its link. Predictions use what the view tells (work queued, bytes
placed on links, slots) and the profiles. All paths are evaluated at once: the number of calls of numpy is what a decision costs, so the two
roles are rows of the same columns (regions first), and local paths are row 0 of the same table as remote ones.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profiles import Instance, PrefillTime
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import ClusterView, Links, Load, Request


class Paths(NamedTuple):
    """Predictions for one request.

    Attributes:
        ttft_s: from now; row 0 of local paths per decode row, then a row per prefill row; infinite where there is no path.
        work_s: prefill seconds that a path takes from one instance; decode rows, then prefill rows.
        sent: bytes that a remote path puts on the link; one number where every region lacks the same.
        alone_s: prefill seconds of the whole prompt, nothing cached, on the fastest instance: the yardstick of its SLO.
    """

    ttft_s: Float64[np.ndarray, "paths decode"]
    work_s: Float64[np.ndarray, " rows"]
    sent: float | Float64[np.ndarray, " decode"]
    alone_s: float

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


class Copy(NamedTuple):
    """A prefix that is worth moving to the side that computes before it does.

    Attributes:
        tokens: that the other side holds beyond this one.
        saved_s: prefill seconds that they save.
        gain_s: the same, less the seconds that the copy takes.
        sent: bytes that it puts on the link towards the region; 0 on the way back, which has no other traffic.
        link: row of the paths whose link it takes.
    """

    tokens: int
    saved_s: float
    gain_s: float
    sent: float
    link: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """What the predictor knows of the servers of one role: profiles, the different ones with rows, seconds per chunk, local rates."""

    times: tuple[PrefillTime, ...]
    profiles: tuple[tuple[PrefillTime, slice | Int64[np.ndarray, " rows"]], ...]
    chunk_s: Float64[np.ndarray, " servers"]
    local_bytes_per_s: Float64[np.ndarray, " servers"]


class Scene:
    """A view in the order of `Paths`: what follows from columns that seldom change, and what changes, read at each call.

    Raises InvalidInput for a view without loads or links.
    """

    def __init__(self, view: ClusterView, near: _Rows, far: _Rows):
        decode, prefill, links = view.decode, view.prefill, view.links
        if prefill.load is None or decode.load is None or links is None:
            raise InvalidInput("view", (prefill.load, decode.load, links), "loads and links: this policy predicts from them")
        self.view, self.near, self.far = view, near, far
        n, m = len(decode.names), len(prefill.names)
        self.regions, self.rows = n, n + m
        shut = (decode.load.instances == 0) | ~decode.healthy
        no_way = (links.bytes_per_s == 0) | (links.transfer_bytes_per_s == 0) | ~decode.healthy
        no_way |= (~prefill.healthy | (prefill.load.instances == 0))[:, None]
        self.closed = np.where(np.vstack([shut, no_way]), math.inf, 0.0)
        self.delay_s = np.vstack([np.zeros(n), links.rtt_s / 2]) + self.closed
        # Seconds per byte; closed paths are infinite by their delay.
        self.link_s = _inverse(links.bytes_per_s)
        self.transfer_s = np.vstack([_inverse(near.local_bytes_per_s), _inverse(links.transfer_bytes_per_s)])
        self.slots = np.maximum(decode.load.slots, 1.0)
        self.chunk_s = np.concatenate([near.chunk_s, far.chunk_s])
        self.instances = np.maximum(np.concatenate([decode.load.instances, prefill.load.instances]), 1.0)
        self._row = np.vstack([np.arange(n), np.repeat(n + np.arange(m), n).reshape(m, n)])
        self.half, self._zeros, self.turns = np.full(n + m, 0.5), np.zeros((2, n + m)), np.empty(n + m)
        # A table costs less to fill and multiply than a number costs to multiply by, and far less than a row to broadcast.
        self.sent, self.tail = np.empty((2, m + 1, n))
        self.crossed = np.zeros((m + 1, n))
        self._sent, self._crossed = self.sent[1:], self.crossed[1:]
        # Those of the view, which its driver writes into.
        self._pending, self.pending_bytes, self.waiting = links.pending, links.pending_bytes, decode.load.waiting
        self._near_queues, self._far_queues = decode.load.table[Load.QUEUES], prefill.load.table[Load.QUEUES]
        queues = np.empty((4, n + m))
        self._near, self._far, self._times = queues[:, :n], queues[:, n:], queues[:2]
        self.free_s, self.waiting_s, self.jobs, self.fresh = queues  # from now, not below 0
        tables = prefill.load.table[Load.SELDOM], decode.load.table[Load.SELDOM], links.table[Links.SELDOM]
        self._seldom = *tables, prefill.healthy, decode.healthy
        self._made_of = list(map(np.ndarray.tobytes, self._seldom))

    def read(self, now: float) -> bool:
        """Copies the queues; False where a column that seldom changes has changed, and another scene must be made."""
        self._near[...], self._far[...] = self._near_queues, self._far_queues
        self._times -= now
        np.maximum(self._times, self._zeros, out=self._times)
        return list(map(np.ndarray.tobytes, self._seldom)) == self._made_of

    def cross(self, sent: float | Float64[np.ndarray, " decode"], tail: float | Float64[np.ndarray, " decode"]) -> None:
        """Fills the tables of a request that sends so many bytes, the last `tail` of them after its prefill.

        `crossed` is then the seconds until all have crossed links that others use too.
        """
        self.sent[...], self.tail[...] = sent, tail
        crossed = self._crossed
        np.multiply(self._pending, self._sent, out=crossed)
        np.minimum(crossed, self.pending_bytes, out=crossed)
        crossed += self._sent
        crossed *= self.link_s

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
    fairly takes as long as its other transfers delay this one. Paths compute what their own side does not hold; `copy` says what else.
    """

    def __init__(self, topology: Topology, chunk: int, overlap: bool = True):
        self.kv, self._chunk, self._overlap = topology.kv, chunk, overlap
        self._instances: dict[str, Instance] = {c.name: c.instance for c in topology.clusters}
        self._local_rates = {r.name: r.local_bytes_per_s for r in topology.regions}
        self._known: dict[tuple[str, ...], _Rows] = {}
        self._scene: Scene | None = None

    def paths(self, request: Request, view: ClusterView, now: float) -> Paths:
        """All paths. Raises InvalidInput for a view without loads or links, or with names that the topology does not have."""
        return self.paths_in(self.scene(view, now), request)

    def paths_in(self, scene: Scene, request: Request) -> Paths:
        """`paths` of a scene that has just been read."""
        tokens, chunk, n = request.tokens, self._chunk, scene.regions
        held, far_held = _plain(request.cached_decode), _plain(request.cached_prefill)
        sent = tail = self.kv.bytes(tokens, held) if isinstance(held, int) else self.kv.bytes_of(tokens, held)
        if self._overlap:
            before = tokens - (tokens % chunk or min(tokens, chunk))
            if _most(held) <= before:
                tail = self.kv.bytes(tokens, before)
            elif not isinstance(held, int):
                tail = self.kv.bytes_of(tokens, np.maximum(held, before))

        work = np.empty(scene.rows)
        alone_s = min(_work(scene.near, tokens, held, work[:n]), _work(scene.far, tokens, far_held, work[n:]))
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

        scene.cross(sent, tail)
        ttft = scene.tail * scene.transfer_s
        ttft += scene.over_paths(chunks)
        np.maximum(ttft, scene.crossed, out=ttft)
        ttft += scene.delay_s
        if any(scene.waiting.tolist()):
            # Every path of a region waits for its decode slots; it only tells regions apart.
            ttft += scene.waiting / scene.slots
        return Paths(ttft, work, sent, alone_s)

    def copy(self, scene: Scene, request: Request, path: int) -> Copy | None:
        """What to copy for `path`, an index into the flat table; None where that side computes as fast as the other could send.

        A remote path may copy what its region holds, a local one what the prefill cluster holds that holds most.
        """
        row, d = divmod(path, scene.regions)
        far, near = request.cached_prefill, request.cached_decode
        link = row or (1 if isinstance(far, int) else 1 + int(far.argmax()))
        own = far if isinstance(far, int) else far.item(link - 1)
        other = near if isinstance(near, int) else near.item(d)
        time = scene.far.times[row - 1]
        if not row:
            own, other, time = other, own, scene.near.times[d]
        if other <= own:
            return None
        saved, size = time.growth(other) - time.growth(own), self.kv.bytes(other, own)
        gain = saved - size * scene.transfer_s.item(link, d) - scene.delay_s.item(link, d)
        return Copy(other - own, saved, gain, 0.0 if row else size, link) if gain > 0 else None

    def scene(self, view: ClusterView, now: float) -> Scene:
        """Read anew, and made anew for another view or when a column that seldom changes has changed. InvalidInput as `paths`."""
        scene = self._scene
        if scene is None or scene.view is not view or not scene.read(now):
            scene = self._scene = Scene(view, self._rows(view.decode.names), self._rows(view.prefill.names))
            scene.read(now)
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
            self._known[names] = _Rows(tuple(times), profiles, chunk_s, np.array([self._local_rates.get(name, math.inf) for name in names]))
        return self._known[names]


def _plain(cached: int | Int64[np.ndarray, " rows"]) -> int | Int64[np.ndarray, " rows"]:
    """One number where all rows have the same."""
    if isinstance(cached, int):
        return cached
    if len(cached) == 1:
        return int(cached.item())
    return cached if len(cached) and _most(cached) else 0


def _least(cached: int | Int64[np.ndarray, " rows"]) -> int:
    return cached if isinstance(cached, int) else int(cached.item(cached.argmin()))


def _most(cached: int | Int64[np.ndarray, " rows"]) -> int:
    return cached if isinstance(cached, int) else int(cached.item(cached.argmax()))


def _work(rows: _Rows, tokens: int, cached: int | Int64[np.ndarray, " rows"], work: Float64[np.ndarray, " rows"]) -> float:
    """Writes T_prefill(cached, tokens - cached) on one instance of every row; the least T_prefill(0, tokens) of them."""
    alone_s = math.inf
    for time, where in rows.profiles:
        whole = time.start_s + time.growth(tokens)
        if whole < alone_s:
            alone_s = whole
        if not isinstance(cached, int):
            work[where] = whole - time.growth_of(cached[where])
        else:
            work[where] = whole - time.growth(cached) if cached else whole
    return alone_s

"""Policies that predict: the TTFT of every path a request could take, and what taking it costs everybody else.

A path is a region's own prefill instances, or a prefill cluster and its link. Predictions use what the view tells (work queued, bytes
placed on links, slots) and the profiles; all paths are evaluated at once, as arrays over `view.prefill` x `view.decode`.
"""

import dataclasses
import math

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


class Predictor:
    """Predicts every path of a request from the view, with the profiles of a topology whose names the view uses.

    Waiting: an instance gives its prompts turns, so a prompt waits for at most its own work per prompt that is there, and at most for all
    the work that is there. Transfer: overlapped, the last chunk and the states follow the end of the prefill; what is already placed on the
    link goes first.
    """

    def __init__(self, topology: Topology, chunk: int, overlap: bool = True):
        self.kv, self._chunk, self._overlap = topology.kv, chunk, overlap
        self._instances: dict[str, Instance] = {c.name: c.instance for c in topology.clusters}
        self._local_rates = {r.name: r.local_bytes_per_s for r in topology.regions}
        self._groups: dict[tuple[str, ...], list[tuple[PrefillTime, Int64[np.ndarray, " rows"]]]] = {}
        self._rates: dict[tuple[str, ...], Float64[np.ndarray, " decode"]] = {}

    def paths(self, request: Request, view: ClusterView, now: float) -> Paths:
        """All paths. Raises InvalidInput for a view without loads or links."""
        far, near, links = view.prefill, view.decode, view.links
        if far.load is None or near.load is None or links is None:
            raise InvalidInput("view", (far.load, near.load, links), "loads and links: this policy predicts from them")
        tokens = request.tokens
        near_work = self._work(near, tokens, request.cached_decode)
        far_work = self._work(far, tokens, request.cached_prefill)
        held = request.cached_decode
        sent = self._bytes(tokens, held, len(near.names))
        tail = self._bytes(tokens, np.maximum(held, self._last_chunk(tokens)), len(near.names)) if self._overlap else sent

        local = _wait(near, near_work, now) + near_work + tail / self._local_rate(near.names)
        local[(near.load.instances == 0) | ~near.healthy] = math.inf
        computed = _wait(far, far_work, now) + far_work
        with np.errstate(divide="ignore", invalid="ignore"):
            # The link first drains what is placed on it; of ours, the tail cannot start before the prefill ends.
            queue = (links.pending_bytes + sent) / links.bytes_per_s
            remote = np.maximum(computed[:, None] + tail / links.transfer_bytes_per_s, queue) + links.rtt_s / 2
        remote[(links.bytes_per_s == 0) | ~near.healthy | ~far.healthy[:, None] | (far.load.instances == 0)[:, None]] = math.inf
        decode_wait = self._decode_wait(near)
        return Paths(local + decode_wait, near_work, remote + decode_wait, far_work, sent)

    def _last_chunk(self, tokens: int) -> int:
        return tokens - (tokens % self._chunk or min(tokens, self._chunk))

    def _bytes(self, tokens: int, held: int | np.ndarray, rows: int) -> Float64[np.ndarray, " decode"]:
        if isinstance(held, int | np.integer):
            return np.full(rows, self.kv.bytes(tokens, int(held)))
        return self.kv.bytes_of(np.full(rows, float(tokens)), held.astype(np.float64))

    def _work(self, servers: Servers, tokens: int, cached: int | Int64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
        """T_prefill(cached, tokens - cached) on one instance of every row."""
        work = np.empty(len(servers.names))
        for time, rows in self._profiles(servers.names):
            if isinstance(cached, int):
                work[rows] = time.start_s + time.growth(tokens) - time.growth(cached)
            else:
                work[rows] = time.start_s + time.growth(tokens) - time.growth_of(cached[rows].astype(np.float64))
        return work

    def _profiles(self, names: tuple[str, ...]) -> list[tuple[PrefillTime, Int64[np.ndarray, " rows"]]]:
        """The different profiles among the rows, each with its rows."""
        if names not in self._groups:
            unknown = [name for name in names if name not in self._instances]
            if unknown:
                raise InvalidInput("view names", unknown, f"clusters with a profile: {sorted(self._instances)}")
            times = [self._instances[name].prefill for name in names]
            self._groups[names] = [(t, np.array([i for i, x in enumerate(times) if x == t])) for t in dict.fromkeys(times)]
        return self._groups[names]

    def _local_rate(self, names: tuple[str, ...]) -> Float64[np.ndarray, " decode"]:
        if names not in self._rates:
            self._rates[names] = np.array([self._local_rates[name] for name in names])
        return self._rates[names]

    @staticmethod
    def _decode_wait(near: Servers) -> Float64[np.ndarray, " decode"]:
        """Grows with the requests that wait for decode; it only tells regions apart, since every path of a region has it."""
        assert near.load is not None  # paths() checked
        return near.load.waiting / np.maximum(near.load.slots, 1.0)


def _wait(servers: Servers, work: Float64[np.ndarray, " rows"], now: float) -> Float64[np.ndarray, " rows"]:
    load = servers.load
    assert load is not None  # paths() checked
    return np.minimum(np.maximum(load.free_at_s - now, 0.0), load.jobs * work)


@dataclasses.dataclass(frozen=True)
class LeastTtft:
    """The path of least predicted TTFT, whatever that does to others."""

    predictor: Predictor

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """The first of the fastest; local at a tie."""
        paths = self.predictor.paths(request, view, now)
        return _choose(view, paths, paths.local_ttft_s, paths.remote_ttft_s, "least_ttft")


@dataclasses.dataclass(frozen=True)
class DriftPenalty:
    """Ours: the path whose delay to this request, plus the delay that it puts on others, is least.

    Each request has a budget, its SLO: `slo_scale` times its TTFT on the best path of an idle system, plus `slo_base_s`. A path costs
    the share of the budget that it uses, and `price` per second of work times the seconds of work that already wait there, for each
    resource that it takes: prefill instances and link. That is the greedy step of a drift-plus-penalty scheme: queues are prices, so the
    scarce side is kept for those for whom it matters, with no threshold to tune and no rate to know.
    """

    predictor: Predictor
    price: float = 0.15
    link_price: float = 0.15
    late: float = 4.0
    slo_scale: float = 3.0
    slo_base_s: float = 0.5

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Evaluates every path."""
        paths = self.predictor.paths(request, view, now)
        far, near, links = view.prefill.load, view.decode.load, view.links
        assert far is not None and near is not None and links is not None  # paths() checked
        fastest = min(paths.local_work_s.min(initial=math.inf), paths.remote_work_s.min(initial=math.inf))
        budget = self.slo_scale * fastest + self.slo_base_s
        local_queue = np.maximum(near.drained_at_s - now, 0.0)
        far_queue = np.maximum(far.drained_at_s - now, 0.0)
        local = self._penalty(paths.local_ttft_s / budget) + self.price * local_queue * paths.local_work_s / np.maximum(near.instances, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            drain = links.pending_bytes / links.bytes_per_s
            sending = paths.sent / links.bytes_per_s
            remote = self._penalty(paths.remote_ttft_s / budget)
            remote = remote + (self.price * far_queue * paths.remote_work_s / np.maximum(far.instances, 1))[:, None]
            remote = remote + self.link_price * drain * sending
        remote[np.isnan(remote)] = math.inf
        return _choose(view, paths, local, remote, "drift_penalty")

    def _penalty(self, used: np.ndarray) -> np.ndarray:
        """The share of the budget used; beyond it every further share counts `late` times."""
        return used + (self.late - 1) * np.maximum(used - 1, 0.0)


def _choose(view: ClusterView, paths: Paths, local: np.ndarray, remote: np.ndarray, name: str) -> Placement:
    """The cheapest path, local at a tie; raises NoDecodeServer where none is open."""
    d = int(np.argmin(local)) if local.size else -1
    least = local[d] if d >= 0 else math.inf
    if remote.size:
        i, j = divmod(int(np.argmin(remote)), remote.shape[1])
        if remote[i, j] < least:
            other = f", local {paths.local_ttft_s[d]:.2f} s" if least < math.inf else ""
            reason = f"{name}: predicted {paths.remote_ttft_s[i, j]:.2f} s on {view.prefill.names[i]}{other}"
            return Placement(view.prefill.names[i], view.decode.names[j], reason)
    if least == math.inf:
        raise NoDecodeServer(f"no open path to any of {len(view.decode.names)} decode servers")
    other = f", remote {float(paths.remote_ttft_s.min()):.2f} s" if remote.size else ""
    return Placement(None, view.decode.names[d], f"{name}: predicted {paths.local_ttft_s[d]:.2f} s locally{other}")

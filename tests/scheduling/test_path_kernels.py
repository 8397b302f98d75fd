"""The compiled functions against the same rules in plain Python, one path at a time."""

import math
from typing import NamedTuple

import numpy as np
import pytest
from systems import CHUNK, FAST, FOUR, KV, ONE, SLOW, TABLE, idle_view

from prfaas_jax.scheduling import path_kernels
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.path_kernels import growth, kv_bytes
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft, Prices, ShadowPrice
from prfaas_jax.scheduling.profiles import PrefillTime, prefill_s
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import ClusterView, Load, NoDecodeServer, Request


@pytest.mark.parametrize("time", [FAST.prefill, SLOW.prefill, TABLE.prefill])
def test_growth_is_that_of_the_profile(time):
    pieces = np.stack([np.full_like(time.pieces, math.inf), time.pieces])
    pieces[0, 0] = 0.0, 0.0, 3.0, 0.0
    lengths = [*range(0, time.max_tokens + 1, 997), *(int(x) for x in time.pieces[:, 0])]
    assert [growth(pieces, 1, n) for n in lengths] == pytest.approx([time.growth(n) for n in lengths], rel=1e-12, abs=1e-15)
    assert growth(pieces, 0, 50_000) == 15.0


@pytest.mark.parametrize("kv", [KV, KvFootprint(0, 3, ((128, 40), (512, 8))), KvFootprint(7, 0)])
def test_bytes_are_those_of_the_footprint(kv):
    pairs = [(tokens, held) for tokens in (1, 127, 128, 600, 90_000) for held in (0, 1, 127, 128, 600, 90_000) if held <= tokens]
    assert [kv_bytes(kv.packed, *pair) for pair in pairs] == [kv.bytes(*pair) for pair in pairs]


def test_without_a_folder_for_the_cache_it_compiles_in_every_process_and_says_so():
    functions: dict = {}
    exec("def more(x): return x + 1", functions)  # no file, so no folder
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        compiled = path_kernels._compiled("i8(i8)")(functions["more"])
    assert compiled(1) == 2


class Path(NamedTuple):
    """A cluster (None: local) and a region; what the request takes there; a copy is (tokens, seconds saved, seconds gained, bytes)."""

    prefill: str | None
    decode: str
    ttft_s: float
    work_s: float
    sent: float
    copy: tuple[int, float, float, float]


class Reference:
    """What `path_kernels` computes, by names instead of arrays."""

    def __init__(self, topology: Topology, request: Request, view: ClusterView, now: float, overlap: bool):
        self.topology, self.view, self.now, self.tokens = topology, view, now, request.tokens
        self.times: dict[str, PrefillTime] = {c.name: c.instance.prefill for c in topology.clusters}
        self.row = {name: i for servers in (view.prefill, view.decode) for i, name in enumerate(servers.names)}
        self.held = {d: request.held_by_decode(i) for i, d in enumerate(view.decode.names)}
        self.held |= {p: request.held_by_prefill(i) for i, p in enumerate(view.prefill.names)}
        self.before = (self.tokens - 1) // CHUNK * CHUNK if overlap else 0
        self.alone_s = min(prefill_s(time, self.tokens) for time in self.times.values())
        self.paths = [self.path(p, d) for p in (None, *view.prefill.names) for d in view.decode.names if self.is_open(p, d)]

    def load(self, name: str) -> Load:
        return (self.view.decode if name in self.view.decode.names else self.view.prefill).load

    def link(self, p: str, d: str) -> tuple[float, float, float, float, float]:
        return tuple(float(column[self.row[p], self.row[d]]) for column in self.view.links.table)

    def is_open(self, p: str | None, d: str) -> bool:
        if not self.view.decode.healthy[self.row[d]]:
            return False
        if p is None:
            return self.load(d).instances[self.row[d]] > 0
        return bool(self.view.prefill.healthy[self.row[p]] and self.load(p).instances[self.row[p]] and all(self.link(p, d)[:2]))

    def waiting_s(self, name: str) -> float:
        return max(0.0, self.load(name).drained_at_s[self.row[name]] - self.now)

    def path(self, p: str | None, d: str) -> Path:
        on, near, row = p or d, self.load(d), self.row[p or d]
        time, load, fresh = self.times[on], self.load(on), self.tokens - self.held[on]
        work = prefill_s(time, fresh, self.held[on])
        chunks = min(0.5, load.jobs[row]) + load.fresh[row] + max(0, math.ceil(fresh / CHUNK) - 1) * load.jobs[row]
        ready = work + min(chunks * time.growth(CHUNK), max(0.0, load.free_at_s[row] - self.now))
        sent, tail = (self.topology.kv.bytes(self.tokens, held) for held in (self.held[d], max(self.held[d], self.before)))
        if p is None:
            ttft = ready + tail / next(r.local_bytes_per_s for r in self.topology.regions if r.name == d)
        else:
            rate, transfer_rate, rtt, pending, pending_bytes = self.link(p, d)
            ttft = max(ready + tail / transfer_rate, (sent + min(pending * sent, pending_bytes)) / rate) + rtt / 2
        slots = max(1.0, near.slots[self.row[d]])
        return Path(p, d, ttft + near.waiting[self.row[d]] / slots, work, sent, self.copy(p, d))

    def copy(self, p: str | None, d: str) -> tuple[int, float, float, float]:
        deepest = max(self.view.prefill.names, key=lambda name: self.held[name])
        source, target, way = (d, p, p) if p else (deepest, d, deepest)
        if self.held[source] <= self.held[target] or not self.is_open(way, d):
            return 0, 0.0, 0.0, 0.0
        _, rate, rtt, _, _ = self.link(way, d)
        saved = self.times[target].growth(self.held[source]) - self.times[target].growth(self.held[target])
        size = self.topology.kv.bytes(self.held[source], self.held[target])
        gain = saved - size / rate - rtt / 2
        return (self.held[source] - self.held[target], saved, gain, 0.0 if p else size) if gain > 0 else (0, 0.0, 0.0, 0.0)

    def sides(self, key) -> list[Path]:
        """The best of either side."""
        found = [[x for x in self.paths if (x.prefill is None) == local] for local in (True, False)]
        return [min(side, key=key) for side in found if side]

    def fastest(self) -> tuple[Path, int]:
        best = min(self.sides(lambda x: x.ttft_s), key=lambda x: x.ttft_s - x.copy[2])
        return best, best.copy[0]

    def cheapest(self, policy: ShadowPrice) -> tuple[Path, int]:
        names, prices = (*self.view.decode.names, *self.view.prefill.names), policy.prices
        known = [prices.prefill.get(name, 0.0) for name in names]
        queue = policy.queue_price * (sum(known) / len(known) or 1.0)
        price = {n: k + queue * self.waiting_s(n) / max(1, self.load(n).instances[self.row[n]]) for n, k in zip(names, known, strict=True)}
        links = {(p, d): self.link(p, d) for p in self.view.prefill.names for d in self.view.decode.names}
        queues = [pending_bytes / rate for rate, _, _, _, pending_bytes in links.values() if rate]
        busy = max(*(self.waiting_s(name) for name in names), *queues, 0.0) / policy.busy_s

        def taken(x: Path) -> float:
            return x.work_s * price[x.prefill or x.decode] + x.sent * prices.links.get((x.prefill, x.decode), 0.0)

        copied = {}
        for x in self.sides(taken):
            tokens, saved, _, size = x.copy
            way = x.prefill or max(self.view.prefill.names, key=lambda name: self.held[name])
            more = size * prices.links.get((way, x.decode), 0.0) - saved * price[x.prefill or x.decode]
            if tokens and more <= 0:
                copied[x] = tokens, more
        slo = policy.slo_scale * self.alone_s + policy.slo_base_s
        ttft = {x: x.ttft_s - (x.copy[2] if x in copied else 0.0) for x in self.paths}
        cost = {x: taken(x) + (copied[x][1] if x in copied else 0.0) for x in self.paths}
        if busy < 1:
            cost = {x: busy * cost[x] + (1 - busy) * ttft[x] / slo for x in self.paths}
        timely = [x for x in self.paths if ttft[x] <= policy.margin * slo]
        if not timely:
            cost = {x: cost[x] * math.exp(-self.late_s(x) / policy.gather_s) for x in self.paths}
        best = min(timely or self.paths, key=cost.__getitem__)
        return best, copied.get(best, (0,))[0]

    def late_s(self, x: Path) -> float:
        if x.prefill is not None:
            return self.waiting_s(x.prefill)
        ways = [(p, self.link(p, x.decode)) for p in self.view.prefill.names if self.is_open(p, x.decode)]
        far = [self.waiting_s(p) + pending_bytes / rate for p, (rate, _, _, _, pending_bytes) in ways]
        return max(0.0, self.waiting_s(x.decode) - max(far)) if far else 0.0


def any_view(rng: np.random.Generator, topology: Topology) -> ClusterView:
    view, busy = idle_view(topology), rng.choice([0.0, 0.5, 20.0])
    for servers in (view.prefill, view.decode):
        n, load = len(servers.names), servers.load
        servers.healthy[:] = rng.random(n) < 0.9
        load.jobs[:], load.fresh[:], load.waiting[:] = rng.integers(0, 4, n), rng.integers(0, 2, n), rng.integers(0, 3, n)
        load.instances[:] *= rng.random(n) < 0.9
        load.slots[:] *= rng.random(n) < 0.9
        load.free_at_s[:] = rng.random(n) * busy
        load.drained_at_s[:] = load.free_at_s + rng.random(n) * busy
    shape = view.links.pending.shape
    view.links.bytes_per_s[:] *= (rng.random(shape) < 0.9) * rng.choice([1.0, 0.05])
    view.links.transfer_bytes_per_s[:] = np.minimum(view.links.transfer_bytes_per_s, view.links.bytes_per_s) * (rng.random(shape) < 0.9)
    view.links.pending[:] = rng.integers(0, 3, shape)
    view.links.pending_bytes[:] = view.links.pending * rng.choice([1e7, 1e9, 1e10])
    return view


@pytest.mark.parametrize("topology", [ONE, FOUR], ids=["one", "four"])
@pytest.mark.parametrize("overlap", [True, False])
def test_policies_place_as_the_rules_say(topology, overlap):
    rng, predictor = np.random.default_rng(5), Predictor(topology, CHUNK, overlap)
    copies = late = nowhere = 0
    for _ in range(1500):
        view, now = any_view(rng, topology), float(rng.choice([0.0, 5.0]))
        tokens = int(10 ** rng.uniform(1, 5)) if rng.random() < 0.8 else CHUNK * int(rng.integers(1, 9))
        far, near = (rng.integers(0, tokens + 1, len(s.names)) * (rng.random() < 0.7) for s in (view.prefill, view.decode))
        request = Request(tokens, 9, *(far, near) if rng.random() < 0.8 else (0, 0))
        links = {(p, d): 1e-9 * rng.random() for p in view.prefill.names for d in view.decode.names} if rng.random() < 0.5 else {}
        prices = Prices({name: rng.random() for name in (*view.prefill.names, *view.decode.names)}, links)
        ours = ShadowPrice(predictor, prices, busy_s=float(rng.choice([0.3, 50.0])), gather_s=float(rng.choice([0.001, 30.0])))
        reference = Reference(topology, request, view, now, overlap)
        for policy in (LeastTtft(predictor), ours):
            if not reference.paths:
                with pytest.raises(NoDecodeServer):
                    policy.place(request, view, now)
                nowhere += 1
                continue
            path, copied = reference.cheapest(ours) if policy is ours else reference.fastest()
            assert policy.place(request, view, now)[:2] == (path.prefill, path.decode)
            assert policy.place(request, view, now).copied_tokens == copied
            copies += copied > 0
        late += all(x.ttft_s > 0.9 * (3 * reference.alone_s + 0.5) for x in reference.paths)
    assert min(copies, late, nowhere) > 20

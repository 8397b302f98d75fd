"""What a decision computes for every path, compiled: predicted TTFT, copies of prefixes, what a path takes from others, the choice.

A path is a cell of a table: row 0 has the regions' own prefill instances, a row per prefill cluster follows; a column per region. "Rows"
are the servers of both roles, regions first.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from jaxtyping import Bool, Float64, Int64
from numba import types

from prfaas_jax.scheduling.view import Links, Load, columns_of

_INSTANCES, _SLOTS, _FREE_AT, _DRAINED_AT, _JOBS, _FRESH, _WAITING = range(7)
_RATE, _TRANSFER_RATE, _RTT, _PENDING, _PENDING_BYTES = range(5)
_CHUNK_S, _START_S, _LOCAL_RATE = range(3)

# Checked and not looked up: what is compiled is kept until this file changes, and would not see that columns have moved.
if (*columns_of(Load), *columns_of(Links)) != (
    *("instances", "slots", "free_at_s", "drained_at_s", "jobs", "fresh", "waiting"),
    *("bytes_per_s", "transfer_bytes_per_s", "rtt_s", "pending", "pending_bytes"),
):
    raise ImportError(f"columns of view.py have moved: number them here too; {columns_of(Load)}, {columns_of(Links)}")

_Load = Float64[np.ndarray, "7 servers"]
_LinkTable = Float64[np.ndarray, "5 prefill decode"]
_Pieces = Float64[np.ndarray, "rows pieces 4"]
_Rows = Float64[np.ndarray, " rows"]
_PathTable = Float64[np.ndarray, "paths decode"]


class Asked(NamedTuple):
    """A request and a view, with what is known of the view's servers.

    Attributes:
        near: load of the regions, `Load.table`.
        near_up: whether they take requests.
        far: load of the prefill clusters.
        far_up: whether they take requests.
        links: between them, `Links.table`.
        known: seconds of a whole chunk, seconds that every prompt costs, bytes/s inside the server; of every row.
        pieces: growth of the prefill time, `PrefillTime.pieces`, filled up with pieces that begin at infinity; of every row.
        kv: `KvFootprint.packed`.
        near_held: prefix tokens that each region holds.
        far_held: prefix tokens that each cluster holds.
        tokens: of the prompt.
        chunk: tokens that an instance computes at a time.
        overlap: whether KV travels while later chunks are computed.
        now: on the clock of the view.
    """

    near: _Load
    near_up: Bool[np.ndarray, " decode"]
    far: _Load
    far_up: Bool[np.ndarray, " prefill"]
    links: _LinkTable
    known: Float64[np.ndarray, "3 rows"]
    pieces: _Pieces
    kv: Float64[np.ndarray, " packed"]
    near_held: Int64[np.ndarray, " decode"]
    far_held: Int64[np.ndarray, " prefill"]
    tokens: int
    chunk: int
    overlap: bool
    now: float


# Types as compiled code has them.
_TABLE, _CUBE, _COLUMN = types.float64[:, ::1], types.float64[:, :, ::1], types.float64[::1]
_FLAGS, _COUNTS, _F, _I = types.boolean[::1], types.int64[::1], types.float64, types.int64
_VIEW = (_TABLE, _FLAGS, _TABLE, _FLAGS, _CUBE, _TABLE, _CUBE, _COLUMN)
_ASKED = types.NamedTuple((*_VIEW, _COUNTS, _COUNTS, _I, _I, types.boolean, _F), Asked)
_CHOICE = types.Tuple((_I, _F, _I))


def _compiled(signature: Any) -> Callable[[Any], Any]:
    """Compiles at import: no decision waits for a compiler. Division by zero is numpy's, infinite.

    What is compiled is kept beside this file, or in numba's cache folder of the user, or in $NUMBA_CACHE_DIR.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, cache=True, error_model="numpy")(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            warnings.warn(f"compiled anew in every process: {error}; NUMBA_CACHE_DIR may name a folder", stacklevel=2)
            return numba.njit(signature, error_model="numpy")(function)

    return compiled


@_compiled(_F(_CUBE, _I, _I))
def growth(pieces: _Pieces, row: int, tokens: int) -> float:
    """`PrefillTime.growth` of a row's instances."""
    piece = 0
    while piece + 1 < pieces.shape[1] and pieces[row, piece + 1, 0] <= tokens:
        piece += 1
    x = (tokens - pieces[row, piece, 0]) * 1e-4
    return (pieces[row, piece, 2] + pieces[row, piece, 3] * x) * x + pieces[row, piece, 1]


@_compiled(_F(_COLUMN, _I, _I))
def kv_bytes(kv: Float64[np.ndarray, " packed"], tokens: int, held: int) -> float:
    """`KvFootprint.bytes`."""
    size = kv[0] + kv[1] * (tokens - held)
    for i in range(2, len(kv), 2):
        size += kv[i + 1] * min(kv[i], tokens - held)
    return size


@_compiled(_F(_TABLE, _I, _F))
def _waiting_s(load: _Load, row: int, now: float) -> float:
    """Prefill seconds that wait at each instance of a server."""
    return max(load[_DRAINED_AT, row] - now, 0.0)


@_compiled(_F(_TABLE, _I, _F, _F, _I, _I))
def _turns_s(load: _Load, row: int, now: float, chunk_s: float, uncached: int, chunk: int) -> float:
    """Seconds for which others are served until a new prompt's uncached tokens are computed; see `Predictor`."""
    chunks = min(load[_JOBS, row], 0.5) + load[_FRESH, row] + max(0, (uncached - 1) // chunk) * load[_JOBS, row]
    return min(chunks * chunk_s, max(load[_FREE_AT, row] - now, 0.0))


@_compiled(types.Tuple((_TABLE, _COLUMN, _COLUMN, _F))(_ASKED))
def paths_of(asked: Asked) -> tuple[_PathTable, _Rows, Float64[np.ndarray, " decode"], float]:
    """The fields of `Paths`."""
    near, far, links, known, pieces, kv = asked.near, asked.far, asked.links, asked.known, asked.pieces, asked.kv
    tokens, chunk, now, clusters, regions = asked.tokens, asked.chunk, asked.now, far.shape[1], near.shape[1]
    rows = regions + clusters
    work, computed = np.empty(rows), np.empty(rows)
    alone_s = math.inf
    for row in range(rows):
        load, i, held = (near, row, asked.near_held[row]) if row < regions else (far, row - regions, asked.far_held[row - regions])
        whole = known[_START_S, row] + growth(pieces, row, tokens)
        alone_s = min(alone_s, whole)
        work[row] = whole - growth(pieces, row, held)
        computed[row] = _turns_s(load, i, now, known[_CHUNK_S, row], tokens - held, chunk) + work[row]
    before = (tokens - 1) // chunk * chunk if asked.overlap else 0  # tokens that leave while the last chunk is computed
    sent, ttft = np.empty(regions), np.full((clusters + 1, regions), math.inf)
    for d in range(regions):
        sent[d] = kv_bytes(kv, tokens, asked.near_held[d])
        if not asked.near_up[d]:
            continue
        tail = kv_bytes(kv, tokens, max(asked.near_held[d], before))
        # Every path of a region waits for its decode slots; it only tells regions apart.
        slots_s = near[_WAITING, d] / max(near[_SLOTS, d], 1.0)
        if near[_INSTANCES, d] > 0:
            ttft[0, d] = tail * (1.0 / known[_LOCAL_RATE, d]) + computed[d] + slots_s
        for p in range(clusters):
            if not asked.far_up[p] or far[_INSTANCES, p] == 0 or links[_RATE, p, d] == 0 or links[_TRANSFER_RATE, p, d] == 0:
                continue
            # On a link shared fairly each of the others sends no more than this one does until it is through.
            others = min(links[_PENDING, p, d] * sent[d], links[_PENDING_BYTES, p, d])
            crossed = (others + sent[d]) * (1.0 / links[_RATE, p, d])
            followed = tail * (1.0 / links[_TRANSFER_RATE, p, d]) + computed[regions + p]
            ttft[p + 1, d] = max(followed, crossed) + links[_RTT, p, d] / 2 + slots_s
    return ttft, work, sent, alone_s


@_compiled(types.Tuple((_I, _F, _F, _F, _I))(_ASKED, _TABLE, _I))
def copy_of(asked: Asked, ttft: _PathTable, path: int) -> tuple[int, float, float, float, int]:
    """A copy: a prefix that is worth moving, before `path` computes, to its side from the other.

    A remote path may copy what its region holds, a local one what the prefill cluster holds that holds most.

    Returns:
        Its tokens, 0 where that side computes as fast as the other could send; prefill seconds that they save; the same, less the seconds
        that the copy takes; bytes that it puts on the link towards the region, 0 on the way back, which has no other traffic; the row of
        the prefill cluster whose link it takes.
    """
    none = 0, 0.0, 0.0, 0.0, 0
    near_held, far_held, pieces, regions = asked.near_held, asked.far_held, asked.pieces, ttft.shape[1]
    if path < 0 or not len(far_held):
        return none
    line, d = path // regions, path % regions
    link = line - 1 if line else int(far_held.argmax())
    row, own, other = (regions + link, far_held[link], near_held[d]) if line else (d, near_held[d], far_held[link])
    if other <= own or ttft[link + 1, d] == math.inf:
        return none
    saved, size = growth(pieces, row, other) - growth(pieces, row, own), kv_bytes(asked.kv, other, own)
    gain = saved - size * (1.0 / asked.links[_TRANSFER_RATE, link, d]) - asked.links[_RTT, link, d] / 2
    return (other - own, saved, gain, 0.0 if line else size, link) if gain > 0 else none


@_compiled(types.UniTuple(_I, 2)(_TABLE))
def _least_of_sides(cost: _PathTable) -> tuple[int, int]:
    """The cheapest open local path and remote one, -1 where there is none: looking at copies for all would cost more than it finds."""
    near = far = -1
    costs = cost.ravel()
    for path in range(len(costs)):
        if path < cost.shape[1]:
            if costs[path] < (costs[near] if near >= 0 else math.inf):
                near = path
        elif costs[path] < (costs[far] if far >= 0 else math.inf):
            far = path
    return near, far


@_compiled(_CHOICE(_ASKED))
def fastest(asked: Asked) -> tuple[int, float, int]:
    """The path that `LeastTtft` takes: an index into the flat table (-1: none is open), its TTFT, tokens that are copied first."""
    ttft, _, _, _ = paths_of(asked)
    best, least, copied = -1, math.inf, 0
    for path in _least_of_sides(ttft):
        if path >= 0:
            count, _, gain, _, _ = copy_of(asked, ttft, path)
            seconds = ttft.ravel()[path] - gain
            if seconds < least:
                best, least, copied = path, seconds, count
    return best, least, copied


@_compiled(_TABLE(_ASKED, _TABLE))
def _late_s(asked: Asked, ttft: _PathTable) -> _PathTable:
    """Seconds of waiting work that make a path one where late requests gather: a cluster's, a region's beyond a cluster and its link's.

    A region that no cluster can reach has nobody to be further behind than: late requests of several such regions spread.
    """
    near, far, links, now, late = asked.near, asked.far, asked.links, asked.now, np.zeros(ttft.shape)
    for d in range(ttft.shape[1]):
        reached, furthest = False, 0.0
        for p in range(far.shape[1]):
            late[p + 1, d] = _waiting_s(far, p, now)
            if ttft[p + 1, d] < math.inf:
                reached = True
                furthest = max(furthest, late[p + 1, d] + links[_PENDING_BYTES, p, d] * (1.0 / links[_RATE, p, d]))
        if reached:
            late[0, d] = max(_waiting_s(near, d, now) - furthest, 0.0)
    return late


@_compiled(_CHOICE(_ASKED, _COLUMN, _TABLE, _F, _F, _F, _F, _F, _F))
def cheapest(
    asked: Asked,
    row_prices: _Rows,
    link_prices: Float64[np.ndarray, "prefill decode"],
    queue_price: float,
    busy_s: float,
    margin: float,
    slo_scale: float,
    slo_base_s: float,
    gather_s: float,
) -> tuple[int, float, int]:
    """The path that `ShadowPrice` takes, as `fastest`; the last arguments are its attributes and prices.

    Args:
        row_prices: of a prefill second on each row.
        link_prices: of a byte on each link.
        queue_price: of a second of waiting work, on a row of one instance, per second.
    """
    near, far, links, now = asked.near, asked.far, asked.links, asked.now
    clusters, regions = far.shape[1], near.shape[1]
    ttft, work, sent, alone_s = paths_of(asked)
    slo_s = slo_scale * alone_s + slo_base_s
    budget_s = margin * slo_s

    # What every path takes, and the longest wait, at an instance or on a link.
    prices, longest_s = np.empty(regions + clusters), 0.0
    for row in range(regions + clusters):
        load, i = (near, row) if row < regions else (far, row - regions)
        waiting_s = _waiting_s(load, i, now)
        prices[row] = waiting_s * (queue_price / max(load[_INSTANCES, i], 1.0)) + row_prices[row]
        longest_s = max(longest_s, waiting_s)
    cost = np.full(ttft.shape, math.inf)
    for d in range(regions):
        if ttft[0, d] < math.inf:
            cost[0, d] = work[d] * prices[d]
        for p in range(clusters):
            if links[_RATE, p, d] > 0:  # a link that is down is no path; its queue counts for nobody
                longest_s = max(longest_s, links[_PENDING_BYTES, p, d] * (1.0 / links[_RATE, p, d]))
            if ttft[p + 1, d] < math.inf:
                cost[p + 1, d] = work[regions + p] * prices[regions + p] + sent[d] * link_prices[p, d]

    copies = np.zeros(ttft.size, np.int64)
    for path in _least_of_sides(cost):
        count, saved_s, gain_s, size, link = copy_of(asked, ttft, path)
        if count:
            line, d = path // regions, path % regions
            more = size * link_prices[link, d] - saved_s * prices[regions + line - 1 if line else d]
            if more <= 0:  # else the link has better use
                copies[path] = count
                cost[line, d] += more
                ttft[line, d] -= gain_s

    busy = longest_s / busy_s
    costs, seconds = cost.ravel(), ttft.ravel()
    best = timely = -1
    for path in range(len(costs)):
        if seconds[path] == math.inf:
            continue
        if busy < 1.0:
            costs[path] = costs[path] * busy + seconds[path] * ((1.0 - busy) / slo_s)
        if best < 0 or costs[path] < costs[best]:
            best = path
        if seconds[path] <= budget_s and (timely < 0 or costs[path] < costs[timely]):
            timely = path
    if timely >= 0:
        best = timely
    elif best >= 0:
        late = _late_s(asked, ttft).ravel()
        best = -1
        for path in range(len(costs)):
            costs[path] *= math.exp(late[path] / -gather_s)
            if seconds[path] < math.inf and (best < 0 or costs[path] < costs[best]):
                best = path
    return (best, seconds[best], copies[best]) if best >= 0 else (-1, math.inf, 0)

"""Predictions from a view: the TTFT of every path that a request could take, and the prefill seconds that it would take there.

A path is a region's own prefill instances, or a prefill cluster and its link. Predictions use what the view tells (work queued, bytes
placed on links, slots) and the profiles. Here views and profiles become the arrays that `path_kernels` computes from.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.path_kernels import Asked, paths_of
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import ClusterView, Request


class Paths(NamedTuple):
    """Predictions for one request.

    Attributes:
        ttft_s: from now; row 0 of local paths per decode row, then a row per prefill row; infinite where there is no path.
        work_s: prefill seconds that a path takes from one instance; decode rows, then prefill rows.
        sent: bytes that a remote path puts on the link.
        alone_s: prefill seconds of the whole prompt, nothing cached, on the fastest instance: the yardstick of its SLO.
    """

    ttft_s: Float64[np.ndarray, "paths decode"]
    work_s: Float64[np.ndarray, " rows"]
    sent: Float64[np.ndarray, " decode"]
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


class Predictor:
    """Predicts every path of a request from the view, with the profiles of a topology whose names the view uses.

    Waiting: prompts on an instance take turns chunk by chunk, and new ones go first (`batching.choose_prefill`). So a prompt waits for the
    chunk under way, for the first chunks of other new prompts, and in every further turn for one chunk of each prompt there; never for
    more than all the work that is there. Transfer: overlapped, the last chunk and the states follow the end of the prefill; a link shared
    fairly takes as long as its other transfers delay this one. Paths compute what their own side does not hold.

    Policies hand `asked` on to compiled functions; `paths` is what these see.
    """

    def __init__(self, topology: Topology, chunk: int, overlap: bool = True):
        if chunk < 1:
            raise InvalidInput("predictor.chunk", chunk, "tokens >= 1")
        self._kv, self._chunk, self._overlap = topology.kv.packed, chunk, overlap
        self._instances: dict[str, Instance] = {c.name: c.instance for c in topology.clusters}
        self._local_rates = {r.name: r.local_bytes_per_s for r in topology.regions}
        self._view: ClusterView | None = None
        self._seen: functools.partial[Asked] | None = None  # with the tables of that view, which its driver writes into
        self._none_held = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def paths(self, request: Request, view: ClusterView, now: float) -> Paths:
        """All paths.

        Raises:
            InvalidInput: a view without loads or links, or with names that the topology does not have; prefixes that are not one per row.
        """
        return Paths(*paths_of(self.asked(request, view, now)))

    def asked(self, request: Request, view: ClusterView, now: float) -> Asked:
        """What `path_kernels` compute from; raises as `paths`."""
        if view is not self._view or self._seen is None:
            self._seen = self._bind(view)
            self._view = view
        near = _per_row("cached_decode", request.cached_decode, self._none_held[0])
        far = _per_row("cached_prefill", request.cached_prefill, self._none_held[1])
        return self._seen(near, far, int(request.tokens), self._chunk, self._overlap, float(now))

    def _bind(self, view: ClusterView) -> functools.partial[Asked]:
        """Gathers the tables of a view and what is known of its servers."""
        near, far, links = view.decode, view.prefill, view.links
        if near.load is None or far.load is None or links is None:
            raise InvalidInput("view", (far.load, near.load, links), "loads and links: this policy predicts from them")
        names = (*near.names, *far.names)
        for field, healthy in (("decode", near.healthy), ("prefill", far.healthy)):
            if healthy.dtype != np.bool_ or not healthy.flags.c_contiguous or not healthy.flags.writeable:
                raise InvalidInput(f"view.{field}.healthy", healthy.dtype, "a contiguous column of bool that can be written into")
        unknown = [name for name in names if name not in self._instances]
        if unknown:
            raise InvalidInput("view names", unknown, f"clusters with a profile: {sorted(self._instances)}")
        times = [self._instances[name].prefill for name in names]
        chunk_s = [t.growth(min(self._chunk, t.max_tokens)) for t in times]
        known = np.array([chunk_s, [t.start_s for t in times], [self._local_rates.get(name, math.inf) for name in names]])
        growths = [t.pieces for t in times]
        pieces = np.zeros((len(times), max(map(len, growths), default=1), 4))
        pieces[:, :, 0] = math.inf
        for row, growth in enumerate(growths):
            pieces[row, : len(growth)] = growth
        self._none_held = np.zeros(len(near.names), np.int64), np.zeros(len(far.names), np.int64)
        tables = near.load.table, near.healthy, far.load.table, far.healthy, links.table
        return functools.partial(Asked, *tables, known, pieces, self._kv)


def _per_row(field: str, cached: int | Int64[np.ndarray, " rows"], none: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """A prefix for all as one for each. Compiled code does not look where arrays end: here is where that is checked."""
    if isinstance(cached, int):
        return np.full(len(none), cached, np.int64) if cached else none
    if cached.shape != none.shape:
        raise InvalidInput(f"request.{field}", cached.shape, f"a number, or one per row of the view: {none.shape}")
    return np.array(cached, np.int64)

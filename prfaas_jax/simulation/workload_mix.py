"""What a planner may know of a workload: its request mix, prefixes included, and its rate."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.simulation.prefix_cache import PrefixCache
from prfaas_jax.simulation.workloads import Workload, check_cap, require, require_count

# Arrivals that stand for an endless workload, and rows that stand for a long one.
MIX_REQUESTS = 100_000
MIX_BINS = 4096


def workload_mix(
    workload: Workload,
    requests: int | None = None,
    bins: int = MIX_BINS,
    seeds: Sequence[int] = (0,),
    cache: Callable[[int], PrefixCache] | None = None,
) -> tuple[Mix, float]:
    """The request mix of a workload, in at most `bins` rows, and its mean request rate per second.

    `cached_pd` is what one cache that sees every prompt would hold of it.

    Args:
        workload: is played.
        requests: how many arrivals to look at, per seed; None for all, at most 100,000.
        bins: rows of the mix.
        seeds: to play it with, each from the start.
        cache: makes the cache with which a seed begins; None for one without end or checkpoints, which begins empty.

    Raises:
        InvalidInput: counts below 1, fewer than two arrivals, or all of them at one time; what the workload raises.
    """
    check_cap("requests", requests)
    require_count("bins", bins)
    require_count("seeds", len(seeds))
    rows: list[tuple[int, int, int]] = []
    gaps, span_s = 0, 0.0
    for seed in seeds:
        held = cache(seed) if cache else PrefixCache(KvFootprint(0, 1), max(1, workload.block_tokens), math.inf)
        begin = end = math.nan
        played = 0
        for time_s, tokens, output, blocks, _ in itertools.islice(workload.arrivals(seed), requests or MIX_REQUESTS):
            end = time_s
            begin = begin if played else end
            played += 1
            cached = held.match(blocks, tokens) if blocks else 0
            if blocks:
                held.insert(blocks, tokens, cached)
            rows.append((tokens, output, cached))
        require(end > begin, "workload", f"{played} arrivals in {end - begin} s", "at least two arrivals, not all at one time")
        gaps, span_s = gaps + played - 1, span_s + end - begin
    tokens_of, output_of, cached_of = np.array(rows).T
    return Mix.of(tokens_of, output_of, cached_pd=cached_of).binned(bins), gaps / span_s

"""What a placement decision costs: every policy on a view of many clusters, busy, with prefixes held here and there.

    python -m experiments.bench_decision [--clusters=64] [--regions=1,4]

CPU time of this process, so that neighbours on a busy machine do not count, as the median of batches. Half of the requests have prefixes,
one per cluster and region. The last line is JSON: microseconds (policy -> the slowest of the region counts) and passed. Exits 1 when a
policy takes longer than --limit_us.
"""

import dataclasses
import itertools
import statistics
import sys
import time

import numpy as np
from absl import flags
from tqdm import tqdm

from configs.studies import case_study
from configs.studies.paper_case import get_config
from prfaas_jax.results import Workdir, headline
from prfaas_jax.scheduling.planner import topology_of
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote, CacheHitRule, LengthBlind, PaperPrefix, Reverse, Threshold
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft, Prices, ShadowPrice
from prfaas_jax.scheduling.topology import Link, PrefillCluster, Region, Topology
from prfaas_jax.scheduling.view import ClusterView, Links, Load, Policy, Request, Servers
from prfaas_jax.serving.process import run_main

CLUSTERS = flags.DEFINE_integer("clusters", 64, "prefill clusters in view", lower_bound=1)
REGIONS = flags.DEFINE_list("regions", ["1", "4"], "decode regions in view: each number is tried")
BATCHES = flags.DEFINE_integer("batches", 21, "timed batches per policy", lower_bound=1)
DECISIONS = flags.DEFINE_integer("decisions", 500, "decisions per batch", lower_bound=1)
LIMIT_US = flags.DEFINE_float("limit_us", 50.0, "most microseconds per decision", lower_bound=0.0)
WORKDIR = flags.DEFINE_string("workdir", "", "where to keep config, environment and summary; empty: nowhere")


def topology(clusters: int, regions: int) -> Topology:
    """The paper's cluster and region, many times, and a link from each to each."""
    (far,), (near,), (link,) = (getattr(topology_of(case_study(get_config()), 3), part) for part in ("prefill", "regions", "links"))
    kv = case_study(get_config()).kv
    prefill = tuple(PrefillCluster(f"far{i}", far.instance, far.instances) for i in range(clusters))
    decode = tuple(Region(f"near{i}", near.instance, near.prefill, near.decode) for i in range(regions))
    links = tuple(Link(p.name, d.name, link.bytes_per_s, 0.02) for p, d in itertools.product(prefill, decode))
    return Topology(kv, prefill, decode, links)


def busy_view(system: Topology, rng: np.random.Generator) -> ClusterView:
    """Everybody has something to do, and one in ten clusters is down."""

    def servers(names: tuple[str, ...], slots: int, up: float) -> Servers:
        n = len(names)
        load = Load.idle(n)
        load.instances[:], load.jobs[:], load.fresh[:] = 4, rng.integers(0, 4, n), rng.integers(0, 2, n)
        load.free_at_s[:], load.drained_at_s[:] = rng.random(n) * 10, rng.random(n) * 10
        load.slots[:] = slots
        return Servers(names, rng.random(n) < up, rng.integers(0, 9, n), load)

    far = servers(tuple(c.name for c in system.prefill), 0, 0.9)
    near = servers(tuple(r.name for r in system.regions), 100, 1.0)
    shape = len(far.names), len(near.names)
    rates = np.full(shape, system.links[0].bytes_per_s)
    pending = rng.integers(0, 5, shape).astype(np.float64)
    return ClusterView(far, near, Links(rates, rates.copy(), np.full(shape, 0.02), pending, pending * 1e9))


def policies(system: Topology) -> dict[str, Policy]:
    """All of them."""
    predictor = Predictor(system, 8192)
    prices = Prices({c.name: 0.2 for c in system.clusters}, {(x.prefill, x.decode): 1e-10 for x in system.links})
    return {
        "always_local": AlwaysLocal(),
        "always_remote": AlwaysRemote(),
        "length_blind": LengthBlind(0.5),
        "reverse": Reverse(19_400),
        "threshold": Threshold(19_400),
        "paper_prefix": PaperPrefix(19_400),
        "cache_hit_rule": CacheHitRule(),
        "least_ttft": LeastTtft(predictor),
        "shadow_price": ShadowPrice(predictor, prices),
    }


def requests(system: Topology, count: int, rng: np.random.Generator) -> list[Request]:
    """Lengths of three magnitudes; every second request has prefixes."""
    found = []
    for i in range(count):
        request = Request(int(10 ** rng.uniform(2.5, 5)), 1024)
        if i % 2:
            far, near = (rng.integers(0, request.tokens, n) * (rng.random(n) < 0.5) for n in (len(system.prefill), len(system.regions)))
            request = dataclasses.replace(request, cached_prefill=far, cached_decode=near)
        found.append(request)
    return found


def microseconds(policy: Policy, asked: list[Request], view: ClusterView, batches: int) -> float:
    """Per decision, the median of the batches; the first batch is not timed."""
    found = []
    for batch in range(batches + 1):
        began = time.process_time()
        for request in asked:
            policy.place(request, view, 1.0)
        if batch:
            found.append((time.process_time() - began) / len(asked) * 1e6)
    return statistics.median(found)


def main(argv: list[str]) -> None:
    """Flags to figures."""
    del argv
    table: dict[str, dict[int, float]] = {}
    for regions in (int(x) for x in REGIONS.value):
        rng = np.random.default_rng(0)
        system = topology(CLUSTERS.value, regions)
        view, asked = busy_view(system, rng), requests(system, DECISIONS.value, rng)
        for name, policy in tqdm(policies(system).items(), desc=f"{CLUSTERS.value} x {regions}", unit="policy", disable=None):
            table.setdefault(name, {})[regions] = microseconds(policy, asked, view, BATCHES.value)
    columns = next(iter(table.values()))
    print(f"{'policy':16}" + "".join(f"{f'{CLUSTERS.value} x {n}':>10}" for n in columns) + "  us per decision")
    for name, row in table.items():
        print(f"{name:16}" + "".join(f"{row[n]:10.1f}" for n in columns))
    slowest = {name: max(row.values()) for name, row in table.items()}
    result = {"microseconds": slowest, "passed": max(slowest.values()) < LIMIT_US.value}
    if WORKDIR.value:
        workdir = Workdir(WORKDIR.value, overwrite=True)
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_summary({**result, "table": table})
    headline(result)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    run_main(main)

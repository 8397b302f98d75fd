"""The contest of policies: the paper's clusters under seven links and four workloads; `cells` makes the cells of a suite.

    python -m experiments.compare_policies --suite=smoke
    python -m experiments.compare_policies --suite=full --config.trace=mooncake_conversation_trace.jsonl.gz --processes=2
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.studies import case_study
from configs.studies.paper_case import get_config as paper_case
from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.planner import topology_of
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.contest import Cell
from prfaas_jax.simulation.scenario import LinkPlan, SquareWave, Steps
from prfaas_jax.simulation.traces import open_workload, trace_mix
from prfaas_jax.simulation.workloads import Bursty, Poisson, Sessions, Synthetic

# (links, workloads) of each suite; smoke is for a look, paper has the paper's own mix only.
SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "smoke": (("100", "8"), ("paper", "sessions")),
    "paper": (("100", "25", "12", "8", "5", "wave", "outage"), ("paper",)),
    "full": (("100", "25", "12", "8", "5", "wave", "outage"), ("paper", "bursts", "sessions", "trace")),
}

# Never looked at while the constants of our policy were chosen: a third of the full suite.
HELD_OUT = frozenset(
    f"{link}/{load}"
    for link, loads in {
        "25": ("paper", "trace"),
        "12": ("bursts", "sessions"),
        "8": ("bursts", "trace"),
        "5": ("sessions",),
        "wave": ("trace",),
        "outage": ("paper", "sessions"),
    }.items()
    for load in loads
)


def get_config() -> ConfigDict:
    """The paper's case with prefix caches, and what the cells add."""
    config = paper_case()
    config.sim.prefill_cache_bytes = 2e12
    config.sim.decode_cache_bytes = 4e12
    config.wave_low_gbps = 5.0
    config.outage_at_s = 300.0  # and again after each `outage_every_s`
    config.outage_every_s = 900.0
    config.outage_s = 60.0
    config.sessions = {
        "first_mu": 8.5,
        "first_sigma": 1.0,
        "added_mu": 7.5,
        "added_sigma": 1.0,
        "output_tokens": 512,
        "mean_turns": 6.0,
        "think_s": 20.0,
        "system_share": 0.5,
        "system_prompts": 8,
        "system_tokens": 4096,
    }
    return config


def cells(config: ConfigDict, suite: str) -> Iterator[Cell]:
    """The cells of a suite, links by workloads. Trace cells need `config.trace`; without it there are none.

    Raises:
        InvalidInput: an unknown suite, or what `case_study` refuses.
    """
    if suite not in SUITES:
        raise InvalidInput("suite", suite, f"one of {', '.join(SUITES)}")
    links, workloads = SUITES[suite]
    loads = {name: _WORKLOADS[name](config) for name in workloads if name != "trace" or config.trace}
    for link, load in itertools.product(links, loads):
        case = case_study(config)
        plan, states = _link(config, link)
        if link.isdecimal():
            case = dataclasses.replace(case, b_out=float(link) * GBPS)
        workload, mix, rate = loads[load]
        hard = load in ("bursts", "sessions") or (link.isdecimal() and float(link) <= 12)
        plans = {("prfaas", "pd"): plan} if plan else {}
        yield Cell(f"{link}/{load}", hard, f"{link}/{load}" in HELD_OUT, topology_of(case, 1), mix, rate, workload, plans, states)


def _link(config: ConfigDict, name: str) -> tuple[LinkPlan | None, tuple[tuple[float, float], ...]]:
    full = config.link_gbps * GBPS
    if name == "wave":
        low = config.wave_low_gbps * GBPS
        return SquareWave(low, config.wave_period_s), ((full, 0.5), (low, 0.5))
    if name == "outage":
        starts = [config.outage_at_s + i * config.outage_every_s for i in range(100)]
        return Steps(tuple(step for at in starts for step in ((at, 0.0), (at + config.outage_s, full)))), ((full, 1.0),)
    return None, ((float(name) * GBPS, 1.0),)


Load = tuple[Any, Mix, float]


def _paper(config: ConfigDict) -> Load:
    w = config.workload
    lengths = LogNormalLengths(w.mu, w.sigma, w.low, w.high)
    return Synthetic(Poisson(1.0), lengths, w.output_tokens), Mix.log_normal(lengths, w.output_tokens, 1 << 14), 1.0


def _bursts(config: ConfigDict) -> Load:
    w = config.workload
    synthetic, mix, rate = _paper(config)
    return dataclasses.replace(synthetic, process=Bursty(1.0, w.burst_factor, w.burst_s, w.quiet_s)), mix, rate


def _sessions(config: ConfigDict) -> Load:
    s, w = config.sessions, config.workload
    sessions = Sessions(
        process=Poisson(1.0),
        first=LogNormalLengths(s.first_mu, s.first_sigma, w.low, w.high - s.system_tokens),
        added=LogNormalLengths(s.added_mu, s.added_sigma, w.low, w.high),
        output_tokens=s.output_tokens,
        mean_turns=s.mean_turns,
        think_s=s.think_s,
        max_tokens=w.high,
        system_share=s.system_share,
        system_prompts=s.system_prompts,
        system_tokens=s.system_tokens,
    )
    mix, _ = trace_mix(sessions, requests=8000)
    return sessions, _held_everywhere(mix), 1.0


def _trace(config: ConfigDict) -> Load:
    trace = open_workload(config.trace)
    mix, rate = trace_mix(trace)
    return trace, _held_everywhere(mix), rate


def _held_everywhere(mix: Mix) -> Mix:
    """A session that stays where it is finds its prefix there; the planner counts on that on either side."""
    return Mix.of(mix.tokens, mix.output, mix.weight, mix.cached_pd, mix.cached_pd)


_WORKLOADS: dict[str, Callable[[ConfigDict], Load]] = {"paper": _paper, "bursts": _bursts, "sessions": _sessions, "trace": _trace}

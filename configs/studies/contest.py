"""The contest of policies: the paper's clusters under seven links and four workloads; `cells` makes the cells of a suite.

python -m experiments.compare_policies --suite=smoke
python -m experiments.compare_policies --suite=full --config.trace=mooncake_conversation_trace.jsonl.gz --processes=2
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from configs.studies import case_study
from configs.studies.paper_case import get_config as paper_case
from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.planner import topology_of
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.clusters import prefix_caches
from prfaas_jax.simulation.contest import Cell, Contest, plan_cell
from prfaas_jax.simulation.scenario import LinkPlan, SimOptions, SquareWave, Steps
from prfaas_jax.simulation.traces import open_workload
from prfaas_jax.simulation.workload_mix import workload_mix
from prfaas_jax.simulation.workloads import Bursty, Poisson, Sessions, Synthetic, Workload

# (links, workloads) of each suite; smoke is for a look, paper has the paper's own mix only.
SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "smoke": (("100", "8"), ("paper", "sessions")),
    "paper": (("100", "25", "12", "8", "5", "wave", "outage"), ("paper",)),
    "full": (("100", "25", "12", "8", "5", "wave", "outage"), ("paper", "bursts", "sessions", "trace")),
}

# The shortest part of a trace that a run may play, in arrivals.
LEAST_WINDOW = 50

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


# What a study of the contest has beside those of paper_case.
ADDED = ("outage_at", "outage_s", "sessions")


def get_config() -> ConfigDict:
    """The paper's case with prefix caches, and what the cells add."""
    config = paper_case()
    config.sim.prefill_cache_bytes = 2e12
    config.sim.decode_cache_bytes = 4e12
    config.wave_low_gbps = 5.0
    config.outage_at = 0.25  # share of a run's arrivals that come before it
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
        "lead_s": 900.0,  # a session takes 164 s on average
    }
    return config


def cells(config: ConfigDict, suite: str, contest: Contest) -> Iterator[Cell]:
    """The cells of a suite, links by workloads. Trace cells need `config.trace`; without it there are none.

    A trace is tuned on in its first third and played in the rest. Each seed has a window of its own, of the contest's `requests` or as many
    as fit side by side: windows that overlap would make intervals too narrow. The windows are what the planner sees too, with caches that
    begin as the runs' do.

    Raises:
        InvalidInput: an unknown suite, a study that is none of the contest, what `case_study` refuses, a trace too short for windows of
            `LEAST_WINDOW` arrivals.
    """
    if missing := [field for field in ADDED if field not in config]:
        raise InvalidInput("config", f"a study without {', '.join(missing)}", "one that has them, as configs/studies/contest.py does")
    if suite not in SUITES:
        raise InvalidInput("suite", suite, f"one of {', '.join(SUITES)}")
    links, workloads = SUITES[suite]
    loads = {name: _WORKLOADS[name](config, contest) for name in workloads if name != "trace" or config.trace}
    for link, load in itertools.product(links, loads):
        case = case_study(config)
        plan, states = _link(config, link)
        if link.isdecimal():
            case = dataclasses.replace(case, b_out=float(link) * GBPS)
        workload, mix, tuning, tuning_mix, rate, requests = loads[load]
        hard = load in ("bursts", "sessions") or (link.isdecimal() and float(link) <= 12)
        plans = {("prfaas", "pd"): plan} if plan else {}
        name = f"{link}/{load}"
        roles = topology_of(case, 1)
        cell = Cell(name, hard, name in HELD_OUT, roles, mix, rate, workload, tuning, tuning_mix, plans, states, requests)
        if link == "outage":
            # Runs take from 3 minutes to 25: at one time for all it would miss some, and end others.
            begins = config.outage_at * requests / (contest.load * plan_cell(cell)[1])
            plan = Steps(((begins, 0.0), (begins + config.outage_s, config.link_gbps * GBPS)))
            cell = dataclasses.replace(cell, links={("prfaas", "pd"): plan})
        yield cell


def _link(config: ConfigDict, name: str) -> tuple[LinkPlan | None, tuple[tuple[float, float], ...]]:
    """How the link changes, but for an outage, whose time depends on the cell; and its states, as of `Cell.states`."""
    full = config.link_gbps * GBPS
    if name == "wave":
        low = config.wave_low_gbps * GBPS
        return SquareWave(low, config.wave_period_s), ((full, 0.5), (low, 0.5))
    return None, ((full if name == "outage" else float(name) * GBPS, 1.0),)


# Workload and mix of the evaluation, those of the tuning, the rate of both workloads in requests/s, and the requests of a run.
Load = tuple[Workload, Mix, Workload, Mix, float, int]


def _paper(config: ConfigDict, contest: Contest) -> Load:
    return _independent(config, Poisson(1.0), contest)


def _bursts(config: ConfigDict, contest: Contest) -> Load:
    w = config.workload
    return _independent(config, Bursty(1.0, w.burst_factor, w.burst_s, w.quiet_s), contest)


def _independent(config: ConfigDict, process: Poisson | Bursty, contest: Contest) -> Load:
    w = config.workload
    lengths = LogNormalLengths(w.mu, w.sigma, w.low, w.high)
    one = Synthetic(process, lengths, w.output_tokens), Mix.log_normal(lengths, w.output_tokens, 1 << 14)
    return *one, *one, 1.0, contest.requests


def _sessions(config: ConfigDict, contest: Contest) -> Load:
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
        lead_s=s.lead_s,
    )
    one = sessions, _mix(config, sessions, 16_000, (0,))[0]
    return *one, *one, 1.0, contest.requests


def _trace(config: ConfigDict, contest: Contest) -> Load:
    path = config.trace
    end = sum(1 for _ in open_workload(path).arrivals(0))
    third = end // 3
    requests = min(contest.requests, third // contest.tuning_seeds, (end - third) // contest.seeds)
    if requests < min(LEAST_WINDOW, contest.requests):
        expected = f"at least {LEAST_WINDOW} per seed: {contest.tuning_seeds} in its first third, {contest.seeds} after it"
        raise InvalidInput("config.trace", f"{path}: {end} arrivals", expected)
    evaluation = open_workload(path, start=third, stop=end, requests=requests, windows=contest.seeds)
    tuning = open_workload(path, stop=third, requests=requests, windows=contest.tuning_seeds)
    mix, rate = _mix(config, evaluation, requests, range(contest.seeds))
    first_mix, first_rate = _mix(config, tuning, requests, range(contest.tuning_seeds))
    return evaluation, mix, tuning.scaled(rate / first_rate), first_mix, rate, requests


def _mix(config: ConfigDict, workload: Workload, requests: int, seeds: Sequence[int]) -> tuple[Mix, float]:
    """Mix and rate of runs with these seeds. A session that stays where it is finds its prefix there: on either side, for the planner."""
    options, topology = SimOptions(**config.sim.to_dict()), topology_of(case_study(config), 1)
    mix, rate = workload_mix(workload, requests, seeds=seeds, cache=lambda seed: prefix_caches(topology, options, workload, seed)[1][0])
    return Mix.of(mix.tokens, mix.output, mix.weight, mix.cached_pd, mix.cached_pd), rate


_WORKLOADS: dict[str, Callable[[ConfigDict, Contest], Load]] = {
    "paper": _paper,
    "bursts": _bursts,
    "sessions": _sessions,
    "trace": _trace,
}

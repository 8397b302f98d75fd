"""One file per study: a system, its workload and how it is simulated. `case_study` and `mix_of` turn one into what the planner takes."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs.models import load_model_config
from configs.profiles import load_profile
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.planner import grid, topology_of
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.scheduling.throughput import CaseStudy
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.contenders import CONTENDERS, Ground
from prfaas_jax.simulation.runs import Run
from prfaas_jax.simulation.scenario import Outage, Part, SimOptions, SquareWave, random_outages
from prfaas_jax.simulation.traces import open_workload
from prfaas_jax.simulation.workload_mix import MIX_REQUESTS, workload_mix
from prfaas_jax.simulation.workloads import Bursty, GammaArrivals, Poisson, Synthetic, Workload

MIB = 2**20


def case_study(config: ConfigDict) -> CaseStudy:
    """The system of a study.

    Raises:
        InvalidInput: an unknown model or profile, or counts, rates or times that make no system, by their name in the config.
    """
    for field, least in (("n_prfaas", 1), ("n_pd", 1)):
        if config[field] < least:
            raise InvalidInput(f"config.{field}", config[field], f"at least {least} instance")
    for field in ("link_gbps", "local_gbps"):
        if not 0 < config[field] < math.inf:
            raise InvalidInput(f"config.{field}", config[field], "finite Gbit/s above zero")
    for field in ("rtt_ms", "window_mib", "prfaas_cost", "pd_cost", "rate", "efficiency"):
        if not 0 <= config[field] < math.inf:
            raise InvalidInput(f"config.{field}", config[field], "a finite number >= 0")
    for field in ("load", "t_step"):
        if not 0 < config[field] < math.inf:
            raise InvalidInput(f"config.{field}", config[field], "a finite number above zero")
    if config.reading not in ("mean", "exact"):
        raise InvalidInput("config.reading", config.reading, "mean or exact")
    if not -1 <= config.n_prefill_local < config.n_pd:
        expected = f"0..{config.n_pd - 1} of n_pd, so that an instance is left to decode, or -1: the planner decides"
        raise InvalidInput("config.n_prefill_local", config.n_prefill_local, expected)
    if config.requests < 1:
        raise InvalidInput("config.requests", config.requests, "at least 1")
    pd = _instance(config, "pd")
    if pd.decode is None:
        raise InvalidInput("config.pd_profile", config.pd_profile, "a profile with decode times")
    return CaseStudy(
        kv=KvFootprint.of(cache_spec(load_model_config(config.model))),
        prfaas=_instance(config, "prfaas"),
        pd=pd,
        n_prfaas=config.n_prfaas,
        n_pd=config.n_pd,
        b_out=config.link_gbps * GBPS,
        local_bytes_per_s=config.local_gbps * GBPS,
        rtt_s=config.rtt_ms * 1e-3,
        window_bytes=config.window_mib * MIB or math.inf,
    )


def mix_of(config: ConfigDict) -> Mix:
    """The request mix of a study: its log-normal, or the lengths of `config.trace`.

    Prefixes of a trace count as held where `config.sim` gives a cluster a cache, which is then taken as large enough for all of them.

    Raises:
        InvalidInput: lengths that make no mix, or a trace that cannot be read.
    """
    if config.trace:
        mix = workload_mix(open_workload(config.trace), bins=MIX_REQUESTS)[0]
        far, near = config.sim.prefill_cache_bytes > 0, config.sim.decode_cache_bytes > 0
        return Mix.of(mix.tokens, mix.output, mix.weight, mix.cached_pd * near, mix.cached_pd * far)
    w = config.workload
    if w.output_tokens < 1:
        raise InvalidInput("config.workload.output_tokens", w.output_tokens, "at least 1 token")
    return Mix.log_normal(lengths_of(config), w.output_tokens)


def workload_of(config: ConfigDict, rate: float) -> Workload:
    """The arrivals of a study at `rate` requests/s: synthetic ones, or those of its trace, faster or slower.

    Raises:
        InvalidInput: an unknown arrival process, or numbers that make no workload.
    """
    w = config.workload
    if config.trace:
        trace = open_workload(config.trace)
        return trace.scaled(rate / workload_mix(trace, bins=1)[1])
    match w.arrivals:
        case "poisson":
            process: Poisson | GammaArrivals | Bursty = Poisson(rate)
        case "gamma":
            process = GammaArrivals(rate, w.cv)
        case "bursty":
            process = Bursty(rate, w.burst_factor, w.burst_s, w.quiet_s)
        case _:
            raise InvalidInput("config.workload.arrivals", w.arrivals, "poisson, gamma or bursty")
    return Synthetic(process, lengths_of(config), w.output_tokens, requests=config.requests)


def runs_of(config: ConfigDict, seeds: Sequence[int]) -> list[Run]:
    """A study's simulation per seed: roles, threshold and rate by the planner where the config leaves them to it; failures by the seed.

    Raises:
        InvalidInput: as `case_study`, `mix_of` and `workload_of`; a policy that is not known; outages or a wave that make no sense.
    """
    case, mix = case_study(config), mix_of(config)
    if config.policy not in CONTENDERS:
        raise InvalidInput("config.policy", config.policy, f"one of {', '.join(CONTENDERS)}")
    fixed = config.n_prefill_local if config.n_prefill_local >= 0 else None
    plan = grid(case, mix, config.reading, config.t_step, fixed)
    topology = topology_of(case, plan.n_p)
    rate = config.rate or config.load * plan.lambda_max
    kind, parameter = CONTENDERS[config.policy][0], config.parameter
    if not kind:
        parameter = 0.0
    elif parameter < 0:
        parameter = plan.p if kind == "share" else min(plan.t, float(mix.uncached.max()))
    links = {}
    if config.wave_low_gbps:
        links["prfaas", "pd"] = SquareWave(config.wave_low_gbps * GBPS, config.wave_period_s)
    targets: list[tuple[str, Part, int]] = [("prfaas", "prefill", i) for i in range(config.n_prfaas)]
    targets += [("pd", "prefill", i) for i in range(plan.n_p)] + [("pd", "decode", i) for i in range(plan.n_d)]

    def outages(seed: int) -> tuple[Outage, ...]:
        if not config.mtbf_s:
            return ()
        rng = np.random.default_rng([seed, 1])  # not the workload's numbers again
        return random_outages(targets, config.mtbf_s, config.mttr_s, 2 * config.requests / rate, rng)

    ground = Ground(topology, mix, SimOptions(**config.sim.to_dict()))
    requests = config.requests
    if config.trace:  # it may have fewer, and the warm-up is a share of those
        requests = sum(1 for _ in itertools.islice(open_workload(config.trace).arrivals(0), requests))
    workload = workload_of(config, rate)
    return [Run(ground, workload, config.policy, parameter, seed, requests, links, outages(seed)) for seed in seeds]


def lengths_of(config: ConfigDict) -> LogNormalLengths:
    """The prompt lengths of a study without a trace. InvalidInput as LogNormalLengths."""
    w = config.workload
    return LogNormalLengths(w.mu, w.sigma, w.low, w.high)


def _instance(config: ConfigDict, part: str) -> Instance:
    name, cost = config[f"{part}_profile"], config[f"{part}_cost"]
    options: dict[str, Any] = {"cost_per_hour": cost} if cost else {}
    if config.efficiency and name.endswith(".json"):
        options["efficiency"] = config.efficiency
    return load_profile(name, **options)

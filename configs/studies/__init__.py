"""One file per study: a system, its workload and how it is simulated. `case_study` and `mix_of` turn one into what the planner takes."""

import math
from typing import Any

from ml_collections import ConfigDict

from configs.models import load_model_config
from configs.profiles import load_profile
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.scheduling.throughput import CaseStudy
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.traces import MIX_REQUESTS, open_workload, trace_mix

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
        mix = trace_mix(open_workload(config.trace), bins=MIX_REQUESTS)[0]
        far, near = config.sim.prefill_cache_bytes > 0, config.sim.decode_cache_bytes > 0
        return Mix.of(mix.tokens, mix.output, mix.weight, mix.cached_pd * near, mix.cached_pd * far)
    w = config.workload
    if w.output_tokens < 1:
        raise InvalidInput("config.workload.output_tokens", w.output_tokens, "at least 1 token")
    return Mix.log_normal(lengths_of(config), w.output_tokens)


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

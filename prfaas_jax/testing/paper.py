"""The PrfaaS paper's printed numbers (arXiv 2604.15039) beside ours, with the tolerance of each. No jax."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import AttentionConfig, MixerConfig
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import LogNormalLengths, Mix
from prfaas_jax.scheduling.planner import (
    Plan,
    best_roles,
    equal_cost_instances,
    grid,
    homogeneous,
    length_blind,
    length_blind_ttft,
    naive,
    topology_of,
)
from prfaas_jax.scheduling.profiles import Instance, prefill_s
from prfaas_jax.scheduling.throughput import CaseStudy, Reading, egress_needed, phi_kv
from prfaas_jax.scheduling.topology import GBPS

MIB = 2**20

# "printed": the paper prints the number, and it is no input of ours. "circular": a profile, shape or price was chosen to give it, or it is
# arithmetic on such: units and code are checked, no more. "extension": the paper lacks it; it is compared with another solution of ours.
Kind = Literal["printed", "circular", "extension"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# What the paper calls 1K, 8K, 32K and 128K: the sizes that it prints are those of these lengths.
LENGTHS = {"1K": 1024, "8K": 8192, "32K": 32_000, "128K": 130_000}

TABLE_1 = {
    "kimi_linear_48b": "KDA:MLA 3:1",
    "mimo_v2_flash": "SWA:GQA 5:1",
    "qwen3_5_397b": "GDN:GQA 3:1",
    "ring_2_5_1t": "Lightning:MLA 7:1",
    "minimax_m2_5": "GQA",
    "qwen3_235b": "GQA",
    "paper_1t": "KDA:MLA 3:1",
}

# Gbit/s on 8xH200 at LENGTHS.
TABLE_3 = {
    "kimi_linear_48b": (1.19, 2.29, 3.87, 4.88),
    "mimo_v2_flash": (0.82, 2.85, 4.66, 4.71),
    "qwen3_5_397b": (4.13, 6.28, 8.25, 7.47),
    "ring_2_5_1t": (7.27, 4.47, 2.59, 1.46),
    "minimax_m2_5": (4.94, 32.87, 59.93, 47.82),
    "qwen3_235b": (4.12, 22.42, 33.35, 21.50),
}

# (KV in MiB, T_prefill in s, Gbit/s) at LENGTHS.
TABLE_5 = ((190.8, 0.44, 3.61), (308.9, 0.72, 3.59), (701.3, 1.84, 3.19), (2316.3, 7.40, 2.62))

# What our own solution of Eq. 3-8 gave first, thresholds in steps of 1,000 tokens: Gbit/s -> requests/s.
LINK_SWEEP = {12: 3.13, 10: 2.99, 8: 2.63, 5: 2.25, 1: 1.56}

# The same in steps of 500: output tokens -> (gain over 12 homogeneous instances, threshold, N_p).
OUTPUT_SWEEP = {256: (1.53, 29_000, 6), 2048: (1.67, 10_500, 1)}


@dataclasses.dataclass(frozen=True)
class Check:
    """One printed number and ours; texts must be equal.

    Numbers must agree to the relative `tolerance`, or to `absolute`, such as half of the last digit that is printed. `because` says why a
    tolerance is wider than 1 %; `kind` is what agreement shows.
    """

    section: str
    kind: Kind
    what: str
    printed: float | str
    ours: float | str
    tolerance: float = 0.01
    absolute: float = 0.0
    because: str = ""

    @property
    def error(self) -> float | None:
        """Relative; None of texts and where zero is printed."""
        if isinstance(self.printed, str) or isinstance(self.ours, str) or not self.printed:
            return None
        return self.ours / self.printed - 1

    @property
    def ok(self) -> bool:
        """Whether ours agrees."""
        if isinstance(self.printed, str) or isinstance(self.ours, str):
            return self.printed == self.ours
        return abs(self.ours - self.printed) <= max(self.tolerance * abs(self.printed), self.absolute) + 1e-12


@dataclasses.dataclass(frozen=True)
class Paper:
    """What the checks are made of: models and their profiles on 8xH200 by name, and the case study."""

    models: Mapping[str, ModelConfig]
    profiles: Mapping[str, Instance]
    case: CaseStudy
    lengths: LogNormalLengths
    output_tokens: int

    def footprint(self, model: str) -> KvFootprint:
        """S_kv of a model."""
        return KvFootprint.of(cache_spec(self.models[model]))

    def mix(self, output_tokens: int | None = None) -> Mix:
        """The case study's, or with another output length."""
        return Mix.log_normal(self.lengths, self.output_tokens if output_tokens is None else output_tokens)

    @property
    def instances(self) -> int:
        """Of the homogeneous system with as many GPUs."""
        return self.case.n_prfaas + self.case.n_pd


_NAMES = {"kda": "KDA", "gated_delta": "GDN", "lightning": "Lightning", "mla": "MLA"}


def _name(mixer: MixerConfig) -> str:
    if isinstance(mixer, AttentionConfig):
        return "SWA" if mixer.window else "GQA"
    return _NAMES[mixer.kind]


def layers_of(config: ModelConfig) -> str:
    """The repeated part of a model's layers as the paper writes it: kinds and their ratio, most frequent first."""
    pattern = config.pattern
    names = [_name(layer.mixer) for layer in config.layers[pattern.head : pattern.head + pattern.period]]
    counts = sorted(((names.count(name), name) for name in dict.fromkeys(names)), reverse=True)
    kinds = ":".join(name for _, name in counts)
    return kinds if len(counts) == 1 else f"{kinds} {':'.join(str(count) for count, _ in counts)}"


def table1(paper: Paper) -> Iterator[Check]:
    """Kinds of layers and their ratio, from the layer patterns of our configs: published ones, but for paper_1t."""
    for model, printed in TABLE_1.items():
        yield Check("table1", "circular" if model == "paper_1t" else "printed", model, printed, layers_of(paper.models[model]))


def table3(paper: Paper) -> Iterator[Check]:
    """Phi_kv. The profiles were made from these very numbers: this checks units and interpolation."""
    for model, row in TABLE_3.items():
        for (name, tokens), printed in zip(LENGTHS.items(), row, strict=True):
            ours = phi_kv(paper.footprint(model), paper.profiles[model], tokens) / GBPS
            yield Check("table3", "circular", f"{model} {name}, Gbps", printed, ours)


def table5(paper: Paper) -> Iterator[Check]:
    """The 1 T hybrid: bytes from layer shapes inferred from these very sizes, seconds from three coefficients fitted to these times."""
    kv, h200 = paper.case.kv, paper.case.prfaas
    because = "three coefficients through four times"
    for (name, tokens), (mib, seconds, gbps) in zip(LENGTHS.items(), TABLE_5, strict=True):
        yield Check("table5", "circular", f"KV {name}, MiB", mib, kv.bytes(tokens) / MIB)
        yield Check("table5", "circular", f"T_prefill {name}, s", seconds, prefill_s(h200.prefill, tokens), 0.035, because=because)
        yield Check("table5", "circular", f"Phi_kv {name}, Gbps", gbps, phi_kv(kv, h200, tokens) / GBPS, 0.035, because=because)


def table6(paper: Paper) -> Iterator[Check]:
    """The case study: grid search, baselines, TTFT without queues, egress.

    Coefficients, decode pace among them, are fitted to its rates and times. Searched roles and threshold, shares and egress are not.
    """
    case, mix = paper.case, paper.mix()
    plan, other, everything = grid(case, mix), homogeneous(case, mix, paper.instances), naive(case, mix)
    yield Check("table6", "printed", "N_p / N_d", "3 / 5", f"{plan.n_p} / {plan.n_d}")
    yield Check("table6", "printed", "homogeneous N_p / N_d", "9 / 3", f"{other.n_p} / {other.n_d}")
    yield Check("table6", "printed", "threshold, tokens", 19_400.0, plan.t, 0.0, 100.0)
    for name, at, thetas, rate, gain in (
        ("PrfaaS-PD", plan, (1.61, 1.64, 3.91), 3.24, 1.54),
        ("homogeneous", other, (None, 2.11, 2.35), 2.11, None),
        ("naive", everything, (2.45, None, 6.25), 2.45, 1.16),
    ):
        ours_of = (at.theta_prfaas, at.theta_pd_p, at.theta_pd_d)
        for symbol, printed, ours in zip(("prfaas", "pd-p", "pd-d"), thetas, ours_of, strict=True):
            if printed is not None:
                yield Check("table6", "circular", f"{name} Theta_{symbol}, requests/s", printed, ours)
        yield Check("table6", "circular", f"{name} Lambda_max, requests/s", rate, at.lambda_max)
        if gain is not None:
            yield Check("table6", "circular", f"{name} gain over homogeneous", gain, at.lambda_max / other.lambda_max)
    for name, t, mean, p90 in (("PrfaaS-PD", plan.t, 2.22, 3.51), ("homogeneous", math.inf, 4.44, 9.73), ("naive", 0.0, 1.74, 3.51)):
        ttft = case.ttft(mix, t)
        yield Check("table6", "circular", f"{name} TTFT mean, s", mean, mix.mean(ttft))
        yield Check("table6", "circular", f"{name} TTFT P90, s", p90, mix.quantile(ttft, 0.9))
    yield Check("table6", "printed", "p, %", 49.6, 100 * plan.p)
    yield Check("table6", "printed", "l_long, K tokens (of 1,024)", 44.0, plan.l_long / 1024, absolute=0.5)
    yield Check("table6", "printed", "mean length, K tokens (of 1,024)", 27.0, mix.mean(mix.tokens) / 1024, absolute=0.5)
    because = "Eq. 2 with its own p and sizes gives 12.4"
    yield Check("table6", "printed", "egress, Gbps", 13.0, plan.egress_gbps, 0.06, because=because)


def sizing(paper: Paper) -> Iterator[Check]:
    """Eq. 2 for whole clusters, printed with two digits: so many times Table 3. The 10,000 GPUs are Ring's at 128K: not printed."""
    for model, instances, length, printed, half in (
        ("minimax_m2_5", 64, "32K", 3800.0, 50.0),
        ("qwen3_235b", 64, "32K", 2100.0, 50.0),
        ("ring_2_5_1t", 64, "32K", 170.0, 5.0),
        ("ring_2_5_1t", 1250, "128K", 1800.0, 50.0),
    ):
        ours = egress_needed(paper.footprint(model), paper.profiles[model], instances, LENGTHS[length]) / GBPS
        what = f"{model}, {8 * instances:,} GPUs at {length}, Gbps"
        yield Check("sizing", "circular", what, printed, ours, absolute=half, because="two digits printed")


def baselines(paper: Paper) -> list[dict[str, Any]]:
    """Rows that Table 6 lacks, in both readings: length-blind, equal cost, the optimum of any placement."""
    case, mix = paper.case, paper.mix()
    rows: list[dict[str, Any]] = []
    best = best_roles(topology_of(case, 0), mix)[1].lambda_max
    equal_cost = equal_cost_instances(case)
    for name, rate in (
        ("PrfaaS-PD, threshold", lambda r: grid(case, mix, r).lambda_max),
        ("length-blind, balanced", lambda r: length_blind(case, mix, r)[0]),
        ("naive heterogeneous", lambda r: naive(case, mix, r).lambda_max),
        (f"homogeneous, {paper.instances} instances (equal GPUs)", lambda r: homogeneous(case, mix, paper.instances, r).lambda_max),
        (f"homogeneous, {equal_cost} instances (equal cost)", lambda r: homogeneous(case, mix, equal_cost, r).lambda_max),
    ):
        rows.append({"system": name, "mean": rate("mean"), "exact": rate("exact")})
    rows.append({"system": "any placement (linear program)", "mean": math.nan, "exact": best})
    return rows


def link_sweep(paper: Paper) -> list[tuple[float, Plan, Plan]]:
    """(Gbit/s, the best of thresholds in steps of 1,000 tokens, in steps of 100)."""
    mix = paper.mix()
    cases = ((gbps, dataclasses.replace(paper.case, b_out=gbps * GBPS)) for gbps in (100, *LINK_SWEEP))
    return [(gbps, grid(case, mix, t_step=1000), grid(case, mix)) for gbps, case in cases]


def output_sweep(paper: Paper, reading: Reading = "mean") -> list[tuple[int, Plan, float, float]]:
    """(output tokens, the best of thresholds in steps of 500, gain over homogeneous, gain over naive)."""
    rows = []
    for tokens in (256, 512, 1024, 2048, 4096):
        mix = paper.mix(tokens)
        plan = grid(paper.case, mix, reading, 500)
        homog = homogeneous(paper.case, mix, paper.instances, reading).lambda_max
        rows.append((tokens, plan, plan.lambda_max / homog, plan.lambda_max / naive(paper.case, mix, reading).lambda_max))
    return rows


def beyond(paper: Paper) -> Iterator[Check]:
    """What the paper does not print, against our first solution of its equations; and "15 %", which priced the H200."""
    rows = {str(row["system"]).split(",")[0]: row for row in baselines(paper)}
    for name, reading, expected in (
        ("length-blind", "mean", 3.16),
        ("length-blind", "exact", 3.125),
        ("PrfaaS-PD", "exact", 3.19),
    ):
        what = f"{name} Lambda_max, {'exact E[T]' if reading == 'exact' else 'T(E[L])'}"
        yield Check("beyond", "extension", what, expected, rows[name][reading])
    case, mix = paper.case, paper.mix()
    cost = homogeneous(case, mix, equal_cost_instances(case)).lambda_max
    yield Check("beyond", "circular", "gain at equal cost (printed: 15 % better)", 1.15, grid(case, mix).lambda_max / cost)
    yield Check("beyond", "extension", "length-blind TTFT P90, s", 4.87, length_blind_ttft(case, mix, length_blind(case, mix)[1])[1])
    for gbps, coarse, _ in link_sweep(paper):
        if gbps in LINK_SWEEP:
            what = f"Lambda_max at {gbps:g} Gbps (t in steps of 1,000)"
            yield Check("beyond", "extension", what, LINK_SWEEP[int(gbps)], coarse.lambda_max)
    for tokens, plan, gain, over_naive in output_sweep(paper):
        if tokens in OUTPUT_SWEEP:
            expected_gain, t, n_p = OUTPUT_SWEEP[tokens]
            yield Check("beyond", "extension", f"gain over homogeneous, {tokens} output tokens", expected_gain, gain)
            yield Check("beyond", "extension", f"threshold, {tokens} output tokens", float(t), plan.t)
            yield Check("beyond", "extension", f"N_p, {tokens} output tokens", float(n_p), float(plan.n_p), 0.0)
        if tokens == 4096:
            yield Check("beyond", "extension", "gain over naive, 4096 output tokens", 1.0, over_naive, 0.0)
            yield Check("beyond", "extension", "threshold, 4096 output tokens", 0.0, plan.t, 0.0)
    short = Mix.log_normal(dataclasses.replace(paper.lengths, mu=8.5), paper.output_tokens)
    ratio = grid(paper.case, short).lambda_max / naive(paper.case, short).lambda_max
    yield Check("beyond", "extension", f"gain over naive, mean length {short.mean(short.tokens):,.0f}", 1.0, ratio)

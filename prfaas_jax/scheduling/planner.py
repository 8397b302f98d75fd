"""From hardware, link and request mix to a plan: threshold, roles, what binds, what one more unit would buy, and whether it pays at all.

`grid` is the paper's search over (t, N_p) (Eq. 6-8). `best_roles` searches the same roles with the linear program of `optimum`, which
also places over several clusters and regions. `advise` puts both beside the alternatives that a sceptic would name.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import Optimum, optimum
from prfaas_jax.scheduling.throughput import CaseStudy, Reading, decode_batch
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology

# Step of the threshold grid in tokens: the paper prints t with this resolution.
T_STEP = 100.0

# Points of the grid that are looked at together.
GRID_ROWS = 1 << 20

# PrfaaS must beat a homogeneous cluster of equal cost by this much before it is worth a second site.
WORTH = 1.05

# A pilot is not started at the edge: its egress is stated at this share of what it could sustain.
PILOT_LOAD = 0.7

# Most combinations of roles that are tried.
MAX_ROLES = 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """One operating point; the symbols and units of `throughput.Operating`."""

    t: float
    n_p: int
    n_d: int
    p: float
    l_long: float
    l_short: float
    theta_prfaas: float
    theta_pd_p: float
    theta_pd_d: float
    lambda_max: float
    egress: float
    reading: Reading

    @property
    def egress_gbps(self) -> float:
        """Gbit/s that cross the link at `lambda_max`."""
        return self.egress / GBPS


def plan_at(case: CaseStudy, mix: Mix, t: float, n_p: int, reading: Reading = "mean") -> Plan:
    """The system at one threshold and one N_p. InvalidInput unless 0 <= n_p < n_pd: something must decode."""
    return _pick(case, mix, np.array([t]), np.array([_check_roles(case, n_p)]), reading)


def _check_roles(case: CaseStudy, n_p: int) -> int:
    if not 0 <= n_p < case.n_pd:
        raise InvalidInput("n_p", n_p, f"0..{case.n_pd - 1}, so that an instance is left to decode")
    return n_p


def grid(case: CaseStudy, mix: Mix, reading: Reading = "mean", t_step: float = T_STEP, n_p: int | None = None) -> Plan:
    """The paper's search: the (t, N_p) of largest Lambda_max, thresholds in steps of `t_step` tokens; at a tie the smaller p, then N_p.

    Where `n_p` is given only the threshold is searched. The grid also holds t = 0 (offload all) and t = infinity (offload nothing), so
    degenerate answers are found and not missed.
    """
    longest = float(mix.uncached.max())
    if not longest / GRID_ROWS <= t_step < math.inf:
        raise InvalidInput("t_step", t_step, f"a finite number of tokens, at least {longest / GRID_ROWS:.2g}")
    thresholds = np.concatenate((np.arange(0.0, longest, t_step), [math.inf]))
    if not case.n_prfaas:
        thresholds = np.array([math.inf])
    counts = np.arange(case.n_pd) if n_p is None else np.array([_check_roles(case, n_p)])
    parts = np.array_split(counts, min(len(counts), -(-len(counts) * len(thresholds) // GRID_ROWS)))
    plans = [_pick(case, mix, thresholds, part, reading) for part in parts]
    most = max(plan.lambda_max for plan in plans)
    return min((plan for plan in plans if plan.lambda_max >= most * (1 - 1e-9)), key=lambda plan: (plan.p, plan.n_p))


def _pick(case: CaseStudy, mix: Mix, thresholds: np.ndarray, counts: np.ndarray, reading: Reading) -> Plan:
    """The best of all thresholds with all N_p in `counts`."""
    n_p = np.repeat(counts, len(thresholds))
    at = case.operate(mix, np.tile(thresholds, len(counts)), n_p, reading)
    best = np.flatnonzero(at.lambda_max >= at.lambda_max.max() * (1 - 1e-9))
    i = best[np.lexsort((n_p[best], at.p[best]))[0]]
    names = ("t", "p", "l_long", "l_short", "theta_prfaas", "theta_pd_p", "theta_pd_d", "lambda_max", "egress")
    values = {name: float(getattr(at, name)[i]) for name in names}
    return Plan(n_p=int(n_p[i]), n_d=case.n_pd - int(n_p[i]), reading=reading, **values)


def homogeneous(case: CaseStudy, mix: Mix, instances: int, reading: Reading = "mean") -> Plan:
    """The best split of `instances` PD instances and no PrfaaS cluster."""
    return grid(dataclasses.replace(case, n_prfaas=0, n_pd=instances), mix, reading)


def naive(case: CaseStudy, mix: Mix, reading: Reading = "mean") -> Plan:
    """Everything is prefilled by the PrfaaS cluster and every PD instance decodes."""
    return plan_at(case, mix, 0.0, 0, reading)


def length_blind(case: CaseStudy, mix: Mix, reading: Reading = "mean") -> tuple[float, int]:
    """Lambda_max and N_p of the best balanced split that does not look at lengths; the smaller N_p at a tie."""
    rates = [case.length_blind(mix, n_p, reading) for n_p in range(case.n_pd)]
    return max(rates), int(np.argmax(rates))


def length_blind_ttft(case: CaseStudy, mix: Mix, n_p: int, reading: Reading = "mean") -> tuple[float, float]:
    """Mean and P90 of TTFT in seconds, without queues, under the balanced split with `n_p` local prefill instances."""
    remote, local = case.operate(mix, 0.0, n_p, reading).theta_prfaas[0], case.operate(mix, math.inf, n_p, reading).theta_pd_p[0]
    share = remote / (remote + local)
    ttft = np.concatenate((case.ttft(mix, 0.0), case.ttft(mix, math.inf)))
    weight = np.concatenate((share * mix.weight, (1 - share) * mix.weight))
    order = np.argsort(ttft)
    at = int(np.searchsorted(np.cumsum(weight[order]), 0.9 - 1e-12))
    return float((weight * ttft).sum()), float(ttft[order][min(at, len(ttft) - 1)])


def equal_cost_instances(case: CaseStudy) -> int:
    """PD instances for the money that the whole system costs, rounded down: no alternative may cost more than what it is compared with."""
    cost = case.n_prfaas * case.prfaas.cost_per_hour + case.n_pd * case.pd.cost_per_hour
    return int(cost / case.pd.cost_per_hour + 1e-9)


def topology_of(case: CaseStudy, n_p: int, rtt_s: float | None = None) -> Topology:
    """The case study as a topology with clusters "prfaas" and "pd"; `rtt_s` instead of the case's own where it is given."""
    region = Region("pd", case.pd, n_p, case.n_pd - n_p, case.local_bytes_per_s)
    if not case.n_prfaas:
        return Topology(case.kv, (), (region,), ())
    link = Link("prfaas", "pd", case.b_out, case.rtt_s if rtt_s is None else rtt_s, case.window_bytes)
    return Topology(case.kv, (PrefillCluster("prfaas", case.prfaas, case.n_prfaas),), (region,), (link,))


def case_of(topology: Topology) -> CaseStudy:
    """The inverse of `topology_of`, names and roles apart. InvalidInput unless it is one prefill cluster with a link to one region."""
    if not len(topology.prefill) == len(topology.regions) == len(topology.links) == 1:
        found = f"{len(topology.prefill)} prefill clusters, {len(topology.regions)} regions, {len(topology.links)} links"
        raise InvalidInput("topology", found, "a topology of one prefill cluster and one region, with a link")
    (far,), (near,), (link,) = topology.prefill, topology.regions, topology.links
    system = topology.kv, far.instance, near.instance, far.instances, near.instances
    return CaseStudy(*system, link.bytes_per_s, near.local_bytes_per_s, link.rtt_s, link.window_bytes)


def best_roles(topology: Topology, mix: Mix) -> tuple[Topology, Optimum]:
    """The split of every region into prefill and decode instances that sustains most, any placement allowed.

    Raises:
        InvalidInput: more than `MAX_ROLES` combinations of roles; plan the regions one by one.
    """
    best: tuple[Topology, Optimum] | None = None
    for candidate in role_choices(topology):
        found = optimum(candidate, mix)
        if best is None or found.lambda_max > best[1].lambda_max * (1 + 1e-9):
            best = candidate, found
    assert best is not None  # a region of one instance has one choice
    return best


def role_choices(topology: Topology) -> Iterator[Topology]:
    """The topology with every split of its regions; InvalidInput for more than `MAX_ROLES` of them."""
    linked = {link.decode for link in topology.links}
    choices = [range(0 if r.name in linked else 1, r.instances) for r in topology.regions]
    count = math.prod(map(len, choices))
    if not 1 <= count <= MAX_ROLES:
        raise InvalidInput("topology.regions", count, f"1..{MAX_ROLES} combinations of roles; a region without links needs two instances")
    for roles in itertools.product(*choices):
        split = zip(topology.regions, roles, strict=True)
        regions = tuple(dataclasses.replace(r, prefill=n_p, decode=r.instances - n_p) for r, n_p in split)
        yield dataclasses.replace(topology, regions=regions)


@dataclasses.dataclass(frozen=True)
class Gain:
    """What one more unit buys: the price at the optimum as it stands, and the true gain when roles and placement follow."""

    what: str
    unit: str
    price: float
    requests_per_s: float


@dataclasses.dataclass(frozen=True)
class Phase:
    """A step of a roll-out: `share` of the requests over `threshold` go remote.

    `offloaded` of all requests do, which keeps `n_prfaas` PrfaaS instances busy; `n_p` of the PD instances prefill what stays. The system
    then sustains `lambda_max`, and sends `egress_gbps` at `PILOT_LOAD` of it.
    """

    threshold: float
    share: float
    offloaded: float
    n_prfaas: int
    n_p: int
    lambda_max: float
    egress_gbps: float


@dataclasses.dataclass(frozen=True)
class Advice:
    """Everything that `experiments.plan` prints; rates in requests/s.

    `plan` and the baselines share one reading. `best` allows any placement, exact reading. `needed_gbps`: egress of the plan on a link
    that never binds. `reasons` say why (or why not) the pilot is worth it.
    """

    plan: Plan
    homogeneous: Plan
    homogeneous_equal_cost: Plan
    naive: Plan
    length_blind: float
    length_blind_n_p: int
    best: Optimum
    best_n_p: int
    needed_gbps: float
    cost_per_hour: float
    gains: tuple[Gain, ...]
    phases: tuple[Phase, ...]
    worth_it: bool
    reasons: tuple[str, ...]


def advise(
    case: CaseStudy,
    mix: Mix,
    reading: Reading = "mean",
    t_step: float = T_STEP,
    n_p: int | None = None,
    requests_per_s: float | None = None,
) -> Advice:
    """Plans the case, compares it with what else the money would buy, and says whether a pilot is worth it.

    Roles are the planner's to choose unless `n_p` fixes them; the alternatives always have their best roles. Where it is known how many
    `requests_per_s` are to be served, a pilot that cannot serve them, or that a cluster of equal cost makes needless, is not worth it.

    Raises:
        InvalidInput: no PrfaaS instance, an `n_p` that leaves none to decode, prompts beyond a profile.
    """
    if not case.n_prfaas:
        raise InvalidInput("n_prfaas", 0, "at least one PrfaaS instance to plan for")
    plan = grid(case, mix, reading, t_step, n_p)
    equal_gpus = homogeneous(case, mix, case.n_prfaas + case.n_pd, reading)
    equal_cost = homogeneous(case, mix, max(2, equal_cost_instances(case)), reading)
    everything = naive(case, mix, reading)
    blind, blind_n_p = length_blind(case, mix, reading)
    free = grid(dataclasses.replace(case, b_out=math.inf), mix, reading, t_step, n_p)
    roles, best = _best(case, mix, n_p)
    verdicts = list(_verdicts(plan, equal_cost, requests_per_s))
    worth_it = all(good for good, _ in verdicts)
    reasons = [f"{'yes' if good else 'no'}: {text}" for good, text in verdicts if good == worth_it]
    return Advice(
        plan=plan,
        homogeneous=equal_gpus,
        homogeneous_equal_cost=equal_cost,
        naive=everything,
        length_blind=blind,
        length_blind_n_p=blind_n_p,
        best=best,
        best_n_p=roles.regions[0].prefill,
        needed_gbps=free.egress_gbps,
        cost_per_hour=roles.cost_per_hour,
        gains=tuple(_gains(case, mix, best, n_p)),
        phases=tuple(roll_out(case, mix, plan, n_p=n_p)),
        worth_it=worth_it,
        reasons=(*reasons, *_remarks(case, plan, everything, blind, free)),
    )


def _verdicts(plan: Plan, equal_cost: Plan, requests_per_s: float | None) -> Iterator[tuple[bool, str]]:
    """(speaks for the pilot, why)."""
    gain = plan.lambda_max / equal_cost.lambda_max
    other = f"a homogeneous cluster of equal cost ({equal_cost.n_p + equal_cost.n_d} instances)"
    paid = f"{gain:.2f}x the {equal_cost.lambda_max:.2f} requests/s of {other}"
    if plan.p == 0:
        yield False, "the best threshold offloads nothing"
    yield gain >= WORTH, paid if gain >= WORTH else f"{paid}, under the {WORTH:.2f}x that a second site should bring"
    if requests_per_s is not None:
        if requests_per_s > plan.lambda_max:
            yield False, f"{requests_per_s:.2f} requests/s are to be served, and it sustains {plan.lambda_max:.2f}"
        elif requests_per_s <= PILOT_LOAD * equal_cost.lambda_max:
            yield False, f"{requests_per_s:.2f} requests/s are at most {PILOT_LOAD:.0%} of what {other} sustains"
        else:
            yield True, f"{requests_per_s:.2f} requests/s are {requests_per_s / plan.lambda_max:.0%} of what it sustains"


def _remarks(case: CaseStudy, plan: Plan, everything: Plan, blind: float, free: Plan) -> Iterator[str]:
    if plan.p == 1 and plan.n_p == 0:
        yield "it degenerates to naive: every prompt is offloaded and every PD instance decodes"
    elif everything.lambda_max > plan.lambda_max * 1.01:
        better = f"{everything.lambda_max:.2f} requests/s"
        yield f"not the best roles: offloading every prompt with all PD instances decoding would sustain {better}"
    elif everything.lambda_max >= plan.lambda_max * 0.99:
        yield "it equals naive: offloading every prompt sustains as much to within 1 %"
    elif blind > plan.lambda_max * 1.01:
        yield f"not the best roles: an equal split of all lengths with its own would sustain {blind:.2f} requests/s"
    elif blind >= plan.lambda_max * 0.99:
        yield "the length rule adds less than 1 % over an equal split of all lengths; its gain is in the tail of TTFT"
    if plan.lambda_max < free.lambda_max * 0.99:
        lost = f"{free.lambda_max - plan.lambda_max:.2f} requests/s less than with {free.egress_gbps:.1f} Gbit/s"
        yield f"the link of {case.b_out / GBPS:g} Gbit/s costs throughput: {lost}"


def _best(case: CaseStudy, mix: Mix, n_p: int | None) -> tuple[Topology, Optimum]:
    if n_p is None:
        return best_roles(topology_of(case, 0), mix)
    topology = topology_of(case, n_p)
    return topology, optimum(topology, mix)


def _gains(case: CaseStudy, mix: Mix, best: Optimum, n_p: int | None) -> Iterator[Gain]:
    prices = {(r.kind, r.name): r for r in best.resources}
    for what, key, grown in (
        ("PrfaaS instance", ("prfaas_compute", "prfaas"), dataclasses.replace(case, n_prfaas=case.n_prfaas + 1)),
        ("PD instance", ("local_prefill", "pd"), dataclasses.replace(case, n_pd=case.n_pd + 1)),
        ("Gbps of egress", ("egress", "prfaas->pd"), dataclasses.replace(case, b_out=case.b_out + GBPS)),
    ):
        price = prices[key].price if key in prices else 0.0
        if what == "PD instance":  # it may take either role
            price = max([price, *(r.price for r in best.resources if r.kind in ("decode", "decode_memory"))])
        unit = "Gbps" if "Gbps" in what else "instance"
        yield Gain(what, unit, price, max(0.0, _best(grown, mix, n_p)[1].lambda_max - best.lambda_max))


def roll_out(case: CaseStudy, mix: Mix, plan: Plan, steps: int = 4, n_p: int | None = None) -> Iterator[Phase]:
    """Canary shares of the longest tenth of the prompts first, where a failure costs fewest requests; then all of them; then t lowered.

    N_p follows, unless it is given: while little is offloaded most prefill is still local, and those instances decode only once it is not.
    """
    if plan.p == 0:
        return
    start = max(plan.t, float(round(mix.quantile(mix.uncached, 0.9))))
    shares = [(start, 0.05), (start, 0.25), (start, 1.0)]
    low = max(plan.t, mix.quantile(mix.uncached, 0.001))
    shares += [(float(round(t)), 1.0) for t in np.geomspace(start, low, steps + 1)[1:]] if start > low else []
    if plan.t < low:
        shares.append((plan.t, 1.0))
    for t, share in shares:
        counts = np.arange(case.n_pd) if n_p is None else np.array([n_p])
        at = case.operate(mix, np.full(len(counts), t), counts, plan.reading, share)
        i = int(np.argmax(at.lambda_max))
        rate, p = float(at.lambda_max[i]), float(at.p[i])
        busy = case.n_prfaas * rate * p / float(at.theta_prfaas_compute[i])
        yield Phase(t, share, p, math.ceil(busy - 1e-9), int(counts[i]), rate, PILOT_LOAD * float(at.egress[i]) / GBPS)


def bottleneck(case: CaseStudy, plan: Plan, mix: Mix) -> str:
    """What binds at the plan: "prfaas_compute", "egress", "local_prefill", "decode" or "decode_memory".

    Where the grid balances two parts to within its resolution the scarcer one is named; the program's prices say the rest.
    """
    at = case.operate(mix, plan.t, plan.n_p, plan.reading)
    decode = "decode_memory" if decode_batch(case.pd, case.kv, mix) < case.pd.max_batch else "decode"
    limits = {
        "prfaas_compute": float(at.theta_prfaas_compute[0]) / plan.p if plan.p else math.inf,
        "egress": float(at.theta_prfaas_egress[0]) / plan.p if plan.p else math.inf,
        "local_prefill": plan.theta_pd_p / (1 - plan.p) if plan.p < 1 else math.inf,
        decode: plan.theta_pd_d,
    }
    return min(limits, key=limits.__getitem__)

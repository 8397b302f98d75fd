"""The paper's throughput model (Eq. 1-6) for one PrfaaS cluster and one PD cluster, over whole columns of thresholds at once.

Symbols are the paper's: t threshold, p = P(L > t), Theta in requests per second, Lambda_max the requests per second that the system
sustains. Two readings: "mean" puts the mean length into T_prefill, as printed; "exact" takes E[T_prefill(L)], which is 2-4 % slower
because T grows faster than linearly and no prompt is average. `optimum` has the model of many clusters and regions.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.profiles import Instance, prefill_s, prefill_s_of

Reading = Literal["mean", "exact"]


def check_longest(instance: Instance, tokens: float) -> None:
    """Raises InvalidInput for a prompt beyond the range of the instance's profile."""
    if tokens > instance.prefill.max_tokens:
        raise InvalidInput("tokens", tokens, f"at most {instance.prefill.max_tokens}, where profile {instance.name} ends")


def phi_kv(kv: KvFootprint, instance: Instance, tokens: float) -> float:
    """Eq. 1: bytes per second of KV that one instance makes of prompts of `tokens` tokens. InvalidInput as `check_longest`."""
    check_longest(instance, tokens)
    return kv.bytes(tokens) / prefill_s(instance.prefill, tokens)


def egress_needed(kv: KvFootprint, instance: Instance, instances: int, tokens: float) -> float:
    """Eq. 2: bytes per second that leave `instances` instances (N/P) when all of them prefill prompts of `tokens` tokens."""
    return instances * phi_kv(kv, instance, tokens)


def decode_batch(instance: Instance, kv: KvFootprint, mix: Mix) -> float:
    """Requests that decode together: BS_max, or fewer where decode memory holds fewer of the mix.

    A request holds room for its prompt and its whole output from the start: that is what servers reserve before they take its KV.
    The figure is a mean: memory too small for the next whole request counts as used.
    """
    held = weighted_by_stay(mix, kv.bytes_of(mix.tokens + mix.output))
    return min(float(instance.max_batch), instance.kv_memory_bytes / held)


def weighted_by_stay(mix: Mix, values: Float64[np.ndarray, " n"]) -> float:
    """Mean over the requests that decode at a moment: long outputs stay longer."""
    return mix.mean(values * mix.output) / mix.mean(mix.output)


def decode_step_s(instance: Instance, batch: float, mix: Mix) -> float:
    """T_decode at `batch` requests of the mix, each with half its output done."""
    if instance.decode is None:
        raise InvalidInput(f"instance {instance.name}.decode", None, "decode times")
    return instance.decode.step_s(batch, batch * weighted_by_stay(mix, mix.tokens + mix.output / 2))


@dataclasses.dataclass(frozen=True, eq=False)
class Operating:
    """The model at columns of thresholds, each with N_p and N_d. Rates in requests/s, bytes in bytes/s, lengths in tokens.

    `p`, `l_long`, `l_short`: share and mean length above the threshold, mean length below (0 where there are none). `theta_*`: infinite
    where that part has nothing to do. `egress`: what crosses the link at `lambda_max`.
    """

    t: Float64[np.ndarray, " m"]
    p: Float64[np.ndarray, " m"]
    l_long: Float64[np.ndarray, " m"]
    l_short: Float64[np.ndarray, " m"]
    theta_prfaas_compute: Float64[np.ndarray, " m"]
    theta_prfaas_egress: Float64[np.ndarray, " m"]
    theta_pd_p: Float64[np.ndarray, " m"]
    theta_pd_d: Float64[np.ndarray, " m"]
    lambda_max: Float64[np.ndarray, " m"]
    egress: Float64[np.ndarray, " m"]

    @property
    def theta_prfaas(self) -> Float64[np.ndarray, " m"]:
        """Eq. 3."""
        return np.minimum(self.theta_prfaas_compute, self.theta_prfaas_egress)


@dataclasses.dataclass(frozen=True)
class CaseStudy:
    """One PrfaaS cluster, one PD cluster, one link: the paper's system.

    Attributes:
        kv: S_kv of the model.
        prfaas: instance of the PrfaaS cluster.
        pd: instance of the PD cluster.
        n_prfaas: PrfaaS instances; 0 for a homogeneous PD cluster.
        n_pd: PD instances, N_p + N_d.
        b_out: bytes/s of PrfaaS egress.
        local_bytes_per_s: the network inside the PD cluster.
        rtt_s: round trip time of the link; like `window_bytes` it delays transfers and takes nothing from the sum of many.
        window_bytes: most bytes that one transfer has in flight.

    Raises:
        InvalidInput: a count, capacity or time that makes no system; by its methods, prompts beyond a profile that has to prefill them.
    """

    kv: KvFootprint
    prfaas: Instance
    pd: Instance
    n_prfaas: int
    n_pd: int
    b_out: float
    local_bytes_per_s: float
    rtt_s: float = 0.0
    window_bytes: float = math.inf

    def __post_init__(self) -> None:
        if self.n_prfaas < 0:
            raise InvalidInput("n_prfaas", self.n_prfaas, "a number of instances >= 0")
        if self.n_pd < 1:
            raise InvalidInput("n_pd", self.n_pd, "at least one instance, to decode")
        for field in ("b_out", "local_bytes_per_s", "window_bytes"):
            if not getattr(self, field) > 0:
                raise InvalidInput(field, getattr(self, field), "bytes above zero")
        if not 0 <= self.rtt_s < math.inf:
            raise InvalidInput("rtt_s", self.rtt_s, "finite seconds >= 0")

    def theta_pd_d(self, n_d: float, mix: Mix) -> float:
        """Eq. 5, with BS_max cut to what decode memory holds."""
        return n_d * self._decoded_per_instance(mix)

    def _decoded_per_instance(self, mix: Mix) -> float:
        batch = decode_batch(self.pd, self.kv, mix)
        return batch / (decode_step_s(self.pd, batch, mix) * mix.mean(mix.output))

    def operate(
        self,
        mix: Mix,
        t: Float64[np.ndarray, " m"] | float,
        n_p: Int64[np.ndarray, " m"] | int,
        reading: Reading = "mean",
        share: float = 1.0,
    ) -> Operating:
        """Eq. 3-6 at the thresholds `t` (tokens; infinite: nothing is offloaded) with `n_p` local prefill instances.

        Of the prompts above the threshold a `share` is offloaded, whichever; then p is what is offloaded, and `l_short` counts what is not.
        """
        t = np.atleast_1d(np.asarray(t, np.float64))
        longest = float(mix.tokens.max())
        if self.n_prfaas:
            check_longest(self.prfaas, longest)
        if np.any(np.asarray(n_p) > 0):
            check_longest(self.pd, longest)
        row, n_d = mix.row(t), self.n_pd - np.asarray(n_p)

        def split(values: Float64[np.ndarray, " n"]) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
            """E[value | remote], E[value | local]; 0 where there are no such requests."""
            below = mix.sums(values)
            above = below[-1] - below[row]
            with np.errstate(divide="ignore", invalid="ignore"):
                long, short = share * above / p, (below[row] + (1 - share) * above) / (1 - p)
            return np.where(has_long, long, 0.0), np.where(has_short, short, 0.0)

        has_long, has_short = (row < len(mix.tokens)) & (share > 0), (row > 0) | (share < 1)
        p = np.where(has_long, np.where(has_short, share * mix.p(t), 1.0), 0.0)
        l_long, l_short = split(mix.tokens)
        shipped = split(self.kv.bytes_of(mix.tokens, mix.cached_pd))[0]
        if reading == "exact":
            long_s = split(prefill_s_of(self.prfaas.prefill, mix.tokens - mix.cached_prfaas, mix.cached_prfaas))[0]
            short_s = split(prefill_s_of(self.pd.prefill, mix.uncached, mix.cached_pd))[1]
        else:
            cached_long, cached_short = split(mix.cached_prfaas)[0], split(mix.cached_pd)[1]
            long_s = prefill_s_of(self.prfaas.prefill, l_long - cached_long, cached_long)
            short_s = prefill_s_of(self.pd.prefill, l_short - cached_short, cached_short)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            compute = np.where(has_long, self.n_prfaas / long_s, math.inf)
            hosts = np.minimum(self.n_prfaas * self.prfaas.nic_bytes_per_s, n_d * self.pd.nic_bytes_per_s) if self.n_prfaas else math.inf
            egress_cap = np.minimum(self.b_out, hosts)
            egress = np.where(has_long, egress_cap / shipped, math.inf)
            pd_p = np.where(has_short, n_p / short_s, math.inf)
            pd_d = np.broadcast_to(n_d * self._decoded_per_instance(mix), t.shape)
            shares = (np.where(has_long, np.minimum(compute, egress) / p, math.inf), np.where(has_short, pd_p / (1 - p), math.inf))
        lambda_max = np.minimum(np.minimum(*shares), pd_d)
        return Operating(t, p, l_long, l_short, compute, egress, pd_p, pd_d, lambda_max, lambda_max * p * shipped)

    def length_blind(self, mix: Mix, n_p: int, reading: Reading = "mean") -> float:
        """Lambda_max when the same share of every length is offloaded, chosen so that both sides are as busy: an honest baseline."""
        remote = float(self.operate(mix, 0.0, n_p, reading).theta_prfaas[0]) if self.n_prfaas else 0.0
        local = float(self.operate(mix, math.inf, n_p, reading).theta_pd_p[0])
        return min(remote + local, self.theta_pd_d(self.n_pd - n_p, mix))

    def ttft(self, mix: Mix, t: float) -> Float64[np.ndarray, " n"]:
        """Seconds to the first token of every row of the mix without any queue: T_prefill + S_kv / B, transfer not overlapped."""
        remote = prefill_s_of(self.prfaas.prefill, mix.tokens - mix.cached_prfaas, mix.cached_prfaas)
        each = min(self.b_out, self.window_bytes / self.rtt_s if self.rtt_s else math.inf)
        remote = remote + self.kv.bytes_of(mix.tokens, mix.cached_pd) / each + self.rtt_s / 2
        local = prefill_s_of(self.pd.prefill, mix.uncached, mix.cached_pd) + self.kv.bytes_of(mix.tokens) / self.local_bytes_per_s
        return np.where(mix.uncached > t, remote, local)

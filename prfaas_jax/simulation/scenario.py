"""What happens to a system while requests arrive: how its links change, what fails and when; and how the simulation is run."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.batching import prefill_buckets


@dataclasses.dataclass(frozen=True)
class SimOptions:
    """How the clusters work, beyond their profiles.

    Attributes:
        prefill_chunk: tokens per prefill row, a multiple of 64; prompts on one instance take turns chunk by chunk.
        prefill_rows: prompts per prefill step.
        overlap: KV leaves chunk by chunk while the prefill goes on; otherwise all of it after its end, as the paper computes TTFT.
        link_order: of transfers from one cluster to one region: "fair", side by side, as with a connection each, or "least_left", one after
            the other, as ours are sent (see `links`).
        prefill_cache_bytes: prefix cache of each prefill cluster; 0 for none.
        decode_cache_bytes: prefix cache of each region.
        checkpoint_blocks: a state checkpoint at every that many blocks (and at the end of every prompt).
        stall_s: a transfer that has stood still on a link that is down for this long is given up, and its request placed again.
        detect_s: until the router knows that an instance or link is down or up again.
        convert_s: what an instance needs to change its role, once it is drained.
        control_s: period of the controller.
        slo_scale: SLO on TTFT = slo_scale * unloaded TTFT of the prompt on its best path + slo_base_s.
        slo_base_s: see there.
        slo_tpot_s: SLO on TPOT.
        warmup: share of the requests, the first ones, that no statistic counts.
    """

    prefill_chunk: int = 8192
    prefill_rows: int = 1
    overlap: bool = True
    link_order: Literal["fair", "least_left"] = "fair"
    prefill_cache_bytes: float = 0.0
    decode_cache_bytes: float = 0.0
    checkpoint_blocks: int = 16
    stall_s: float = 5.0
    detect_s: float = 1.0
    convert_s: float = 10.0
    control_s: float = 5.0
    slo_scale: float = 3.0
    slo_base_s: float = 0.5
    slo_tpot_s: float = 0.05
    warmup: float = 0.05

    def __post_init__(self) -> None:
        prefill_buckets(self.prefill_chunk, self.prefill_rows)  # refuses what makes none
        if self.link_order not in ("fair", "least_left"):
            raise InvalidInput("link_order", self.link_order, "fair or least_left")
        if self.checkpoint_blocks < 1:
            raise InvalidInput("checkpoint_blocks", self.checkpoint_blocks, "a whole number >= 1")
        for field in ("prefill_cache_bytes", "decode_cache_bytes", "detect_s", "convert_s", "slo_base_s"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InvalidInput(field, getattr(self, field), "a finite number >= 0")
        for field in ("stall_s", "control_s", "slo_scale", "slo_tpot_s"):
            if not getattr(self, field) > 0:
                raise InvalidInput(field, getattr(self, field), "a number above zero")
        if not 0 <= self.warmup < 1:
            raise InvalidInput("warmup", self.warmup, "a share of the requests, 0 up to but not 1")


@dataclasses.dataclass(frozen=True)
class SquareWave:
    """A link that has `low` bytes/s for half of every `period_s` seconds; the first half has what the topology says."""

    low: float
    period_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < math.inf:
            raise InvalidInput("square_wave.low", self.low, "finite bytes/s >= 0")
        if not 0 < self.period_s < math.inf:
            raise InvalidInput("square_wave.period_s", self.period_s, "finite seconds above zero")

    def changes(self, high: float) -> Iterator[tuple[float, float]]:
        """(time, bytes/s) from the first change on, without end."""
        for i in itertools.count(1):
            yield i * self.period_s / 2, self.low if i % 2 else high


@dataclasses.dataclass(frozen=True)
class Steps:
    """A link whose capacity changes at given times: ascending (seconds, bytes/s)."""

    steps: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        times = [t for t, _ in self.steps]
        if not all(0 <= t < math.inf for t in times) or any(a >= b for a, b in itertools.pairwise(times)):
            raise InvalidInput("steps", times, "ascending finite times >= 0")
        if not all(0 <= rate < math.inf for _, rate in self.steps):
            raise InvalidInput("steps", self.steps, "finite bytes/s >= 0")

    def changes(self, high: float) -> Iterator[tuple[float, float]]:
        """(time, bytes/s)."""
        return iter(self.steps)


LinkPlan = SquareWave | Steps

Part = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Outage:
    """One instance is gone from `start_s` on for `seconds` (infinite: for good); what it held is lost, KV that has not left it too.

    `part` says which of a cluster's instances: "prefill" or "decode"; `index` counts them, as the topology has them, from 0. One that has
    changed its role by then is spared. The prefix cache of a cluster is lost with the last of its instances.
    """

    cluster: str
    part: Part
    index: int
    start_s: float
    seconds: float

    def __post_init__(self) -> None:
        if self.part not in ("prefill", "decode"):
            raise InvalidInput("outage.part", self.part, "prefill or decode")
        if not 0 <= self.start_s < math.inf or not self.seconds > 0:
            raise InvalidInput("outage", (self.start_s, self.seconds), "a finite start >= 0 and a duration above zero")


def random_outages(
    targets: Sequence[tuple[str, Part, int]], mtbf_s: float, mttr_s: float, until_s: float, rng: np.random.Generator
) -> tuple[Outage, ...]:
    """Outages that begin before `until_s`, of each (cluster, part, index) on its own: exponential times to failure and to repair.

    Raises:
        InvalidInput: times that are not finite and above zero.
    """
    for field, value in (("mtbf_s", mtbf_s), ("mttr_s", mttr_s), ("until_s", until_s)):
        if not 0 < value < math.inf:
            raise InvalidInput(field, value, "finite seconds above zero")
    outages = []
    for cluster, part, index in targets:
        at = rng.exponential(mtbf_s)
        while at < until_s:
            seconds = max(1e-3, rng.exponential(mttr_s))
            outages.append(Outage(cluster, part, index, float(at), float(seconds)))
            at += seconds + rng.exponential(mtbf_s)
    return tuple(sorted(outages, key=lambda o: o.start_s))

"""One request on its way through a simulation."""

import math
from typing import Any

from prfaas_jax.simulation.decode import DecodeTask
from prfaas_jax.simulation.links import Pair, Transfer
from prfaas_jax.simulation.prefill import PrefillInstance, PrefillTask
from prfaas_jax.simulation.workloads import Arrival


class Job:
    """Times are absolute simulated seconds, NaN until they have come; `tokens` and `output` grow and shrink when a decode is restarted.

    `placed_s`, `begun_s`, `computed_s`, `kv_s` are of the last placement, `path` has them of the one that gave the first token; `attempts`
    counts placements; `fallbacks` those that a failure forced. `sent_bytes` went towards the region, `returned_bytes` to the prefill side.
    """

    __slots__ = (
        *("arrival", "attempts", "begun_s", "cached", "cluster", "computed_s", "decode", "done_s", "fallbacks", "first_s", "held", "id"),
        *("kv_s", "output", "pair", "path", "pending_bytes", "placed_s", "prefill", "reason", "region", "released", "returned_bytes"),
        *("sent_bytes", "source", "tokens", "transfer", "unloaded_s", "want_bytes"),
    )

    def __init__(self, number: int, arrival: Arrival, unloaded_s: float):
        self.id, self.arrival, self.unloaded_s = number, arrival, unloaded_s
        self.tokens, self.output = arrival.tokens, arrival.output_tokens
        self.attempts = self.fallbacks = 0
        self.reason = ""
        self.cluster = -1  # row of the prefill cluster, -1 for local
        self.region = -1
        self.cached = self.held = 0  # prefix tokens where it is computed, where it is decoded
        self.prefill: PrefillTask | None = None
        self.source: PrefillInstance | None = None  # which holds the KV until all of it is in the region
        self.transfer: Transfer | None = None
        self.pair: Pair | None = None
        self.decode: DecodeTask | None = None
        self.path = (math.nan, math.nan, math.nan, math.nan)
        self.released = self.want_bytes = self.pending_bytes = self.sent_bytes = self.returned_bytes = 0.0
        self.placed_s = self.begun_s = self.computed_s = self.kv_s = self.first_s = self.done_s = math.nan

    @property
    def ttft_s(self) -> float:
        """Arrival to first token."""
        return self.first_s - self.arrival.time_s

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; 0 where there is only one."""
        more = self.arrival.output_tokens - 1
        return (self.done_s - self.first_s) / more if more else 0.0

    @property
    def e2e_s(self) -> float:
        """Arrival to last token."""
        return self.done_s - self.arrival.time_s

    def row(self, clusters: tuple[str, ...], regions: tuple[str, ...]) -> dict[str, Any]:
        """The request's row of the table; seconds, tokens, bytes.

        TTFT is the sum of its parts: `before_s` until the placement that gave the first token, `queue_s` (with copying a prefix) until its
        prefill began, `prefill_s`, `transfer_s` that the prefill did not hide, `admit_s` until it joined a decode batch.
        """
        placed, begun, computed, kv = self.path
        return {
            "request": self.id,
            "arrival_s": self.arrival.time_s,
            "session": self.arrival.session,
            "tokens": self.arrival.tokens,
            "output_tokens": self.arrival.output_tokens,
            "prefill": clusters[self.cluster] if self.cluster >= 0 else "",
            "decode": regions[self.region],
            "reason": self.reason,
            "cached": self.cached,
            "held": self.held,
            "kv_bytes": self.sent_bytes,
            "returned_bytes": self.returned_bytes,
            "attempts": self.attempts,
            "fallbacks": self.fallbacks,
            "before_s": placed - self.arrival.time_s,
            "queue_s": begun - placed,
            "prefill_s": computed - begun,
            "transfer_s": kv - computed,
            "admit_s": self.first_s - kv,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "e2e_s": self.e2e_s,
            "unloaded_ttft_s": self.unloaded_s,
        }

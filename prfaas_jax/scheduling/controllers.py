"""Two timescales of control: thresholds and prices from what egress and queues do, roles of instances from where the load goes.

A driver calls `observe` for every request that it places and `update` every few seconds, and carries out the actions. Clock and view are
arguments, so the same object runs live, in the simulator and under a test's virtual clock.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

from prfaas_jax.scheduling.view import ClusterView, Policy


@dataclasses.dataclass(frozen=True)
class UsePolicy:
    """From now on `policy` decides."""

    policy: Policy
    reason: str


@dataclasses.dataclass(frozen=True)
class Convert:
    """One instance of a region drains and takes the other role."""

    region: str
    to: Literal["prefill", "decode"]
    reason: str


Action = UsePolicy | Convert


class Controller(Protocol):
    """Watches and acts; deterministic in its arguments and its own state."""

    def observe(self, tokens: int, output_tokens: int, held: int, remote: bool, now: float) -> None:
        """A request of `tokens` tokens, of which the region holds `held`, was placed."""
        ...

    def update(self, view: ClusterView, now: float) -> Sequence[Action]:
        """What to change now; nothing most of the time."""
        ...

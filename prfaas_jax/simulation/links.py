"""Transfers over shared links as fluids: max-min fair within every link, host cap and transfer cap, capacities that change with time.

All transfers of a pair (prefill cluster, region) are alike, so a pair has one rate per transfer, and virtual time makes every start, end
and change cost O(log n): a transfer that starts when `served` bytes have gone to each of its neighbours ends when `served` has grown by
its size.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.simulation.kernel import Kernel


class Transfer:
    """Bytes of one request on a pair. They may be released in parts, as the prefill makes them. `owner` is the caller's.

    `copied_tokens` is above zero where a cached prefix is moved to where it will be used.
    """

    __slots__ = ("active", "closed", "copied_tokens", "ends", "owner", "released", "waiting")

    def __init__(self, owner: Any, copied_tokens: int):
        self.owner, self.copied_tokens = owner, copied_tokens
        self.released = 0.0
        self.ends = 0.0  # `served` of the pair at which everything released has gone
        self.active = False
        self.closed = False  # nothing more will be released
        self.waiting = True  # neither delivered nor cancelled


class Pair:
    """The transfers from one prefill cluster to one region.

    `moved` counts the bytes that have gone, delivered or not; `capacity` and `transfer_cap` are in bytes/s.
    """

    __slots__ = (
        *("_delivered", "_heap", "_kernel", "_net", "_order", "_since", "_version", "active", "capacity", "delay_s"),
        *("down_since", "egress", "ingress", "moved", "open", "rate", "served", "transfer_cap"),
    )

    def __init__(
        self,
        net: "Network",
        capacity: float,
        transfer_cap: float,
        delay_s: float,
        egress: str,
        ingress: str,
        delivered: Callable[[Transfer], None],
    ):
        self._net, self._kernel = net, net.kernel
        self.capacity, self.transfer_cap, self.delay_s, self.egress, self.ingress = capacity, transfer_cap, delay_s, egress, ingress
        self._delivered = delivered
        self._heap: list[tuple[float, int, Transfer]] = []
        self._order = itertools.count()
        self._since = 0.0
        self._version = 0
        self.down_since = math.nan  # the driver's note
        self.active = 0
        self.rate = 0.0  # bytes/s of each active transfer
        self.served = 0.0
        self.moved = 0.0
        self.open: dict[Transfer, None] = {}  # not yet delivered, in order of their start

    def start(self, owner: Any, copied_tokens: int = 0) -> Transfer:
        """A transfer of which nothing is released yet."""
        transfer = Transfer(owner, copied_tokens)
        self.open[transfer] = None
        return transfer

    def release(self, transfer: Transfer, size: float, last: bool) -> None:
        """Adds `size` bytes to what can travel; after the `last` ones the transfer is delivered once all have gone."""
        if transfer.closed or not transfer.waiting:
            raise InvalidInput("transfer", transfer.owner, "one that is neither closed nor over")
        self._advance()
        transfer.closed = last
        transfer.released += size
        was_active = transfer.active
        transfer.ends = (transfer.ends if was_active else self.served) + size
        if size > 0 or was_active:
            heapq.heappush(self._heap, (transfer.ends, next(self._order), transfer))
            if not was_active:
                transfer.active = True
                self.active += 1
                self._net.share(self)
            else:
                self._plan()
        elif last:
            self._finish(transfer)

    def cancel(self, transfer: Transfer) -> None:
        """Drops what has not gone yet; nothing is delivered."""
        if not transfer.waiting:
            return
        self._advance()
        transfer.waiting = False
        self.open.pop(transfer, None)
        if transfer.active:
            transfer.active = False
            self.active -= 1
            self._net.share(self)

    def remaining(self, transfer: Transfer) -> float:
        """Bytes that are released and have not gone."""
        self._advance()
        return max(0.0, transfer.ends - self.served) if transfer.active else 0.0

    def set_capacity(self, capacity: float) -> None:
        """From now on; 0 is an outage: transfers stand still."""
        if not capacity >= 0:
            raise InvalidInput("link capacity", capacity, "bytes/s >= 0")
        self._advance()
        self.capacity = capacity
        self._net.share(self)

    def _advance(self) -> None:
        """Brings `served` and `moved` to now."""
        gone = self.rate * (self._kernel.now - self._since)
        self._since = self._kernel.now
        self.served += gone
        self.moved += gone * self.active

    def share_alone(self) -> None:
        """The fair rate where no cap is shared with other pairs; counters are up to date already."""
        n = self.active
        self.rate = min(self.capacity / n, self.transfer_cap) if n else 0.0
        self._plan()

    def set_rate(self, rate: float) -> None:
        """For the Network, after it shared anew."""
        self._advance()
        self.rate = rate
        self._plan()

    def _plan(self) -> None:
        """Schedules the next end; older plans become void."""
        heap = self._heap
        while heap and (not heap[0][2].active or heap[0][0] != heap[0][2].ends):
            heapq.heappop(heap)  # cancelled, or grown since
        self._version += 1
        if heap and self.rate > 0:
            wait = max(0.0, heap[0][0] - self.served) / self.rate
            self._kernel.at(self._kernel.now + wait, self._end, self._version)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        self.served = max(self.served, self._heap[0][0])  # rounding must not make an event come twice
        ended = []
        while self._heap and self._heap[0][0] <= self.served:
            ends, _, transfer = heapq.heappop(self._heap)
            if transfer.active and transfer.ends == ends:
                transfer.active = False
                self.active -= 1
                ended.append(transfer)
        self._net.share(self)
        for transfer in ended:
            if transfer.closed:
                self._finish(transfer)

    def _finish(self, transfer: Transfer) -> None:
        if self.delay_s:
            self._kernel.at(self._kernel.now + self.delay_s, self._arrive, transfer)
        else:
            self._arrive(transfer)

    def _arrive(self, transfer: Transfer) -> None:
        if transfer.waiting:
            transfer.waiting = False
            del self.open[transfer]
            self._delivered(transfer)


class Network:
    """All pairs, and the caps that some of them share: bytes/s that leave a prefill cluster's hosts or enter a region's."""

    def __init__(self, kernel: Kernel, host_caps: dict[str, float] | None = None):
        self.kernel = kernel
        self._caps = {name: cap for name, cap in (host_caps or {}).items() if cap < math.inf}
        self._pairs: list[Pair] = []

    def add(
        self,
        capacity: float,
        delivered: Callable[[Transfer], None],
        transfer_cap: float = math.inf,
        delay_s: float = 0.0,
        egress: str = "",
        ingress: str = "",
    ) -> Pair:
        """A pair; `egress` and `ingress` name the host caps that it falls under, `delay_s` is what the last byte takes on its way."""
        pair = Pair(self, capacity, transfer_cap, delay_s, egress, ingress, delivered)
        self._pairs.append(pair)
        return pair

    def share(self, changed: Pair) -> None:
        """Max-min fair rates after a change on one pair; only pairs that share a host cap with it, however indirectly, are looked at."""
        if not self._caps or (changed.egress not in self._caps and changed.ingress not in self._caps):
            changed.share_alone()
            return
        for pair, rate in zip(self._pairs, fair_rates(self._pairs, self._caps), strict=True):
            pair.set_rate(rate)


def fair_rates(pairs: Sequence[Pair], caps: dict[str, float]) -> list[float]:
    """Bytes/s of each active transfer of each pair by progressive filling: all rates rise together until something is full."""
    rates = [0.0] * len(pairs)
    rising = {i for i, pair in enumerate(pairs) if pair.active}
    left = [pair.capacity for pair in pairs]
    left_caps = dict(caps)
    level = 0.0
    while rising:
        # How much every rising rate may grow until the first of its constraints is full.
        steps = [(left[i] / pairs[i].active, i) for i in rising] + [(pairs[i].transfer_cap - level, i) for i in rising]
        flows = {name: sum(pairs[i].active for i in rising if name in (pairs[i].egress, pairs[i].ingress)) for name in left_caps}
        shared = [(left_caps[name] / n, name) for name, n in flows.items() if n]
        grow = max(0.0, min([s for s, _ in steps] + [s for s, _ in shared]))
        level += grow
        for i in rising:
            rates[i] = level
            left[i] -= grow * pairs[i].active
        for name, n in flows.items():
            left_caps[name] -= grow * n
        tight = 1e-12 * (level + 1.0)
        full = {name for name, n in flows.items() if n and left_caps[name] <= tight * n}
        stop = {
            i
            for i in rising
            if left[i] <= tight * pairs[i].active
            or pairs[i].transfer_cap - level <= tight
            or pairs[i].egress in full
            or pairs[i].ingress in full
        }
        if not stop:
            break  # nothing bounds them: infinite capacities
        rising -= stop
    return rates

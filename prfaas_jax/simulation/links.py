"""Transfers over shared links as fluids: max-min fair within every link, host cap and transfer cap, capacities that change with time.

All transfers of a pair (prefill cluster, region) are alike, so a pair has one rate per transfer, and virtual time makes every start, end
and change cost O(log n): a transfer that starts when `served` bytes have gone to each of its neighbours ends when `served` has grown by
its size.

Where transfers of a pair are ordered, as `transfer.dispatch` sends them, one of them leads: that with least left of the whole, of those
that have something to send. It has seven eighths of what the pair has, or all that a transfer may have, and the others share the rest.
Whoever leads goes on to, until it has nothing to send or one with less left starts: its bytes go fastest.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.simulation.kernel import Kernel

# Of the pieces that a sender with several transfers sends, those of the one that leads: all but every eighth.
_LEADING = 7 / 8


class Transfer:
    """Bytes of one request on a pair. They may be released in parts, as the prefill makes them. `owner` is the caller's.

    `copied_tokens` is above zero where a cached prefix is moved to where it will be used.
    """

    __slots__ = ("active", "closed", "copied_tokens", "ends", "owner", "rank", "released", "to_come", "waiting")

    def __init__(self, owner: Any, size: float, copied_tokens: int):
        self.owner, self.to_come, self.copied_tokens = owner, size, copied_tokens
        self.released = 0.0
        self.ends = 0.0  # `served` of the pair at which everything released has gone
        self.rank = 0.0  # and at which all would have gone, were it released; of one that is active and does not lead
        self.active = False
        self.closed = False  # nothing more will be released
        self.waiting = True  # neither delivered nor cancelled


class Pair:
    """The transfers from one prefill cluster to one region.

    `moved` counts the bytes that have gone, delivered or not, `backlog` those released that have not; `capacity` and `transfer_cap` are in
    bytes/s. `down_since` is NaN while the capacity is above zero.
    """

    __slots__ = (
        *("_delivered", "_due", "_fast", "_heap", "_kernel", "_leader", "_net", "_order", "_ranked", "_since", "_slow", "_version"),
        *("active", "backlog", "capacity"),
        *("delay_s", "down_since", "egress", "pending", "to_come", "ingress", "moved", "open", "rate", "served", "transfer_cap"),
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
        _check_capacity(capacity)
        self._net, self._kernel = net, net.kernel
        self.capacity, self.transfer_cap, self.delay_s, self.egress, self.ingress = capacity, transfer_cap, delay_s, egress, ingress
        self._delivered = delivered
        self._heap: list[tuple[float, int, Transfer]] = []
        self._ranked: list[tuple[float, int, Transfer]] = []
        self._leader: Transfer | None = None
        self._due: Transfer | None = None
        self._order = itertools.count()
        self._since = 0.0
        self._version = 0
        self.down_since = math.nan if capacity else net.kernel.now
        self.active = 0
        self.rate = 0.0  # bytes/s of each active transfer, in the mean
        self._slow = self._fast = 0.0  # of one that does not lead, and of the one that does
        self.served = 0.0
        self.moved = self.backlog = 0.0
        self.pending, self.to_come = 0, 0.0  # the driver's: requests, and bytes that they have not released
        self.open: dict[Transfer, None] = {}  # not yet delivered, in order of their start

    def start(self, owner: Any, size: float, copied_tokens: int = 0) -> Transfer:
        """A transfer of `size` bytes in all, of which nothing is released yet."""
        transfer = Transfer(owner, size, copied_tokens)
        self.open[transfer] = None
        return transfer

    def release(self, transfer: Transfer, size: float, last: bool) -> None:
        """Adds `size` bytes to what can travel; after the `last` ones the transfer is delivered once all have gone.

        Raises:
            InvalidInput: a transfer that is closed, delivered or cancelled, or a size below 0.
        """
        if transfer.closed or not transfer.waiting:
            raise InvalidInput("transfer", transfer.owner, "one that is neither closed nor over")
        if not 0 <= size < math.inf:
            raise InvalidInput("release", size, "bytes >= 0")
        transfer.closed = last
        if not size:
            if last and not transfer.active:
                self._finish(transfer)
            return
        self.advance()
        transfer.released += size
        transfer.to_come = max(0.0, transfer.to_come - size)
        self.backlog += size
        transfer.ends = (transfer.ends if transfer.active else self.served) + size
        heapq.heappush(self._heap, (transfer.ends, next(self._order), transfer))
        if transfer.active:
            self.plan()
        else:
            transfer.active = True
            self.active += 1
            self._rank(transfer)
            self._net.share(self)

    def cancel(self, transfer: Transfer) -> None:
        """Drops what has not gone yet; nothing is delivered."""
        if not transfer.waiting:
            return
        self.advance()
        transfer.waiting = False
        self.open.pop(transfer, None)
        if transfer.active:
            transfer.active = False
            self.active -= 1
            self.backlog -= max(0.0, transfer.ends - self.served)
            self._rest()
            self._net.share(self)

    def remaining(self, transfer: Transfer) -> float:
        """Bytes that are released and have not gone."""
        self.advance()
        return max(0.0, transfer.ends - self.served) if transfer.active else 0.0

    def set_capacity(self, capacity: float) -> None:
        """From now on; 0 is an outage: transfers stand still. Raises InvalidInput unless it is finite and >= 0."""
        _check_capacity(capacity)
        self.advance()
        if not capacity and self.capacity:
            self.down_since = self._kernel.now
        elif capacity:
            self.down_since = math.nan
        self.capacity = capacity
        self._net.share(self)

    def advance(self) -> None:
        """Brings the counters to now."""
        elapsed = self._kernel.now - self._since
        self._since = self._kernel.now
        self.served += self._slow * elapsed
        if self._leader is not None:
            self._leader.ends -= (self._fast - self._slow) * elapsed
        gone = self.rate * elapsed * self.active
        self.moved += gone
        self.backlog -= gone

    def _rest(self) -> None:
        """Starts to count anew while nothing travels, so that rounding stays that of single transfers."""
        if not self.active:
            self.served = self.backlog = 0.0
            self._heap.clear()
            self._ranked.clear()
            self._leader = None

    def set_rate(self, rate: float) -> None:
        """For the Network, after it shared anew."""
        self.advance()
        self.rate = rate
        self.plan()

    def plan(self) -> None:
        """Schedules the next end, by the rate; older plans become void."""
        self._lead()
        heap = self._heap
        while heap and (not heap[0][2].active or heap[0][0] != heap[0][2].ends or heap[0][2] is self._leader):
            heapq.heappop(heap)  # cancelled, or grown since
        self._version += 1
        self._due, wait = None, math.inf
        if heap and self._slow > 0:
            self._due, wait = heap[0][2], max(0.0, heap[0][0] - self.served) / self._slow
        if self._leader is not None and self._fast > 0:
            led = max(0.0, self._leader.ends - self.served) / self._fast
            if led <= wait:
                self._due, wait = self._leader, led
        if self._due is not None:
            self._kernel.at(self._kernel.now + wait, self._end, self._version)

    def _rank(self, transfer: Transfer) -> None:
        """It may come to lead: what is left of it and what is left of its neighbours become less together, whatever is released."""
        if self._net.ordered:
            transfer.rank = transfer.ends + transfer.to_come
            heapq.heappush(self._ranked, (transfer.rank, next(self._order), transfer))

    def _lead(self) -> None:
        """Who leads from now on, and what that and the others have of the pair's rate."""
        self._slow = self._fast = self.rate
        ranked, leader = self._ranked, self._leader
        if leader is not None and not leader.active:
            leader = None
        while ranked and (not ranked[0][2].active or ranked[0][0] != ranked[0][2].rank or ranked[0][2] is leader):
            heapq.heappop(ranked)
        if ranked and (leader is None or ranked[0][0] < leader.ends + leader.to_come):
            if leader is not None:
                heapq.heappush(self._heap, (leader.ends, next(self._order), leader))
                self._rank(leader)
            leader = heapq.heappop(ranked)[2]
        self._leader = leader
        if leader is not None and self.active > 1:
            whole = self.rate * self.active
            self._fast = min(self.transfer_cap, _LEADING * whole)
            self._slow = (whole - self._fast) / (self.active - 1)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self.advance()
        # Rounding must not make an event come twice.
        leader, ended = self._leader, []
        if leader is not None and leader is self._due:
            leader.ends = min(leader.ends, self.served)
        else:
            self.served = max(self.served, self._heap[0][0])
        if leader is not None and leader.ends <= self.served:
            leader.active = False
            ended.append(leader)
        while self._heap and self._heap[0][0] <= self.served:
            ends, _, transfer = heapq.heappop(self._heap)
            if transfer.active and transfer.ends == ends and transfer is not leader:
                transfer.active = False
                ended.append(transfer)
        self.active -= len(ended)
        self._rest()
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
    """All pairs, and the caps that some of them share: bytes/s that leave or enter the hosts of a cluster."""

    def __init__(self, kernel: Kernel, host_caps: dict[str, float] | None = None, ordered: bool = False):
        """`ordered`: transfers of a pair go one after the other, as far as that is so above; else side by side."""
        self.kernel, self.ordered = kernel, ordered
        self._caps = {name: cap for name, cap in (host_caps or {}).items() if cap < math.inf}
        self._groups: dict[Pair, list[Pair]] = {}  # pairs that share a cap, however indirectly

    def add(
        self,
        capacity: float,
        delivered: Callable[[Transfer], None],
        transfer_cap: float = math.inf,
        delay_s: float = 0.0,
        egress: str = "",
        ingress: str = "",
    ) -> Pair:
        """A pair; `egress` and `ingress` name the host caps that it falls under, `delay_s` is what the last byte takes on its way.

        Raises:
            InvalidInput: a capacity that is not finite and >= 0.
        """
        pair = Pair(self, capacity, transfer_cap, delay_s, egress, ingress, delivered)
        if capped := {egress, ingress} & self._caps.keys():
            group = [pair]
            for other in [p for p in self._groups if capped & {p.egress, p.ingress}]:
                group += [p for p in self._groups[other] if p not in group]
            self._groups |= dict.fromkeys(group, group)
        return pair

    def share(self, changed: Pair) -> None:
        """Max-min fair rates after a change on one pair, whose counters are up to date."""
        group = self._groups.get(changed)
        if group is None:
            n = changed.active
            changed.rate = min(changed.capacity / n, changed.transfer_cap) if n else 0.0
            changed.plan()
            return
        for pair, rate in zip(group, fair_rates(group, self._caps), strict=True):
            if rate != pair.rate or pair is changed:
                pair.set_rate(rate)


def fair_rates(pairs: Sequence[Pair], caps: dict[str, float]) -> list[float]:
    """Bytes/s of each active transfer of each pair, max-min fair: what is full first fixes the rates of those in it, again and again."""
    rates = [0.0] * len(pairs)
    limits = {i: min(pair.capacity / pair.active, pair.transfer_cap) for i, pair in enumerate(pairs) if pair.active}
    names = {i: {pairs[i].egress, pairs[i].ingress} & caps.keys() for i in limits}
    left = dict(caps)
    while limits:
        flows: dict[str, int] = {}
        for i in limits:
            for name in names[i]:
                flows[name] = flows.get(name, 0) + pairs[i].active
        level, full = min(((max(0.0, left[name]) / n, name) for name, n in flows.items()), default=(math.inf, ""))
        # Pairs that need less than any shared cap would give them; else the tightest cap decides.
        fixed = [i for i, limit in limits.items() if limit <= level] or [i for i in limits if full in names[i]]
        for i in fixed:
            rates[i] = min(limits.pop(i), level)
            for name in names[i]:
                left[name] -= rates[i] * pairs[i].active
    return rates


def _check_capacity(capacity: float) -> None:
    if not 0 <= capacity < math.inf:
        raise InvalidInput("link capacity", capacity, "finite bytes/s >= 0")

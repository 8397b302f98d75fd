import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.simulation.kernel import Kernel
from prfaas_jax.simulation.links import Network, fair_rates

PAIRS = [("out a", "in x"), ("out a", "in y"), ("out b", "in x"), ("out b", "in y")]


def slow_rates(flows, capacities, windows, caps):
    """Max-min fair rate of every (flow, pair), one flow at a time, by water filling in the plainest form."""
    rates, rising = {}, dict(flows)
    while rising:

        def share(limit, members, rising=rising):
            """What each rising member could have if all of them got the same."""
            rest = limit - sum(rates[f] for f in members if f in rates)
            return max(0.0, rest) / sum(f in rising for f in members)

        options = []
        for f, pair in rising.items():
            options.append((windows[pair], f))
            options.append((share(capacities[pair], [g for g, p in flows.items() if p == pair]), f))
            for name, cap in caps.items():
                if name in PAIRS[pair]:
                    options.append((share(cap, [g for g, p in flows.items() if name in PAIRS[p]]), f))
        least = min(rate for rate, _ in options)
        for f in {f for rate, f in options if rate <= least * (1 + 1e-12)}:
            rates[f] = least
            del rising[f]
    return rates


class Reference:
    """The network as a fluid, in the plainest way: every rate anew at every moment at which something changes."""

    def __init__(self, capacities, windows, delays, caps, totals=None):
        """`totals`: where transfers of a pair are ordered, how much each will have released in all."""
        self.totals, self.released = totals, {}
        self.capacities, self.windows, self.delays, self.caps = list(capacities), windows, delays, caps
        self.now, self.moved = 0.0, [0.0] * len(capacities)
        self.left, self.pair, self.closed, self.over = {}, {}, set(), {}

    def advance(self, until):
        while True:
            flows = {f: self.pair[f] for f, left in self.left.items() if left > 0}
            rates = slow_rates(flows, self.capacities, self.windows, self.caps)
            if self.totals is not None:
                rates = self.ordered(flows, rates)
            end = min([self.now + self.left[f] / rates[f] for f in flows if rates[f] > 0], default=math.inf)
            step = min(end, until) - self.now
            for f in flows:
                gone = min(rates[f] * step, self.left[f])
                self.moved[self.pair[f]] += gone
                self.left[f] -= gone
                if self.left[f] <= 1e-9 * (1 + rates[f]):
                    self.moved[self.pair[f]] += self.left[f]
                    self.left[f] = 0.0
            self.now = min(end, until)
            self.settle()
            if end >= until:
                return

    def ordered(self, flows, rates):
        """Seven eighths of a pair's rate, as far as one may have that, for whoever has least left, be it released or not."""
        for pair in set(flows.values()):
            here = [f for f in flows if flows[f] == pair]
            whole = sum(rates[f] for f in here)
            leader = min(here, key=lambda f: self.left[f] + self.totals[f] - self.released[f])
            if len(here) > 1:
                fast = min(self.windows[pair], whole * 7 / 8)
                rates |= {f: fast if f == leader else (whole - fast) / (len(here) - 1) for f in here}
        return rates

    def settle(self):
        for f in self.closed:
            if f not in self.over and self.left.get(f) == 0:
                self.over[f] = self.now + self.delays[self.pair[f]]

    def cancel(self, f):
        # What is still on the wire is dropped too.
        if self.over.get(f, math.inf) > self.now:
            self.over[f] = math.nan
        self.left.pop(f, None)
        self.closed.discard(f)


rates = st.sampled_from([0.5, 1.0, 3.0, 10.0])
sizes = st.sampled_from([0.0, 0.3, 1.0, 2.5, 7.0])


@st.composite
def histories(draw):
    """Starts, releases in parts, cancels and changes of capacity at increasing times."""
    events, times, closed = [], itertools.count(), set()
    started = 0
    for _ in range(draw(st.integers(1, 25))):
        next(times)
        gap = draw(st.sampled_from([0.0, 0.1, 0.37, 1.0, 4.0]))
        kind = draw(st.sampled_from(["start", "start", "release", "cancel", "capacity"]))
        if kind == "start":
            last = draw(st.booleans())
            events.append((gap, kind, started, draw(st.integers(0, 3)), draw(sizes), last))
            closed |= {started} if last else set()
            started += 1
        elif kind == "capacity":
            events.append((gap, kind, draw(st.integers(0, 3)), draw(st.sampled_from([0.0, 1.0, 4.0]))))
        elif open_ones := [f for f in range(started) if f not in closed]:
            f = draw(st.sampled_from(open_ones))
            last = kind == "cancel" or draw(st.booleans())
            events.append((gap, kind, f, *((draw(sizes), last) if kind == "release" else ())))
            closed |= {f} if last else set()
    return events, started


@pytest.mark.parametrize("ordered", [False, True])
@settings(max_examples=80)
@given(
    histories(),
    st.lists(rates, min_size=4, max_size=4),
    st.lists(st.sampled_from([0.7, 2.0, math.inf]), min_size=4, max_size=4),
    st.lists(st.sampled_from([0.0, 0.25]), min_size=4, max_size=4),
    st.dictionaries(st.sampled_from(["out a", "out b", "in x", "in y"]), st.sampled_from([0.5, 2.0, 5.0])),
)
def test_transfers_are_a_max_min_fair_fluid(ordered, history, capacities, windows, delays, caps):
    events, count = history
    kernel, delivered = Kernel(), {}
    network = Network(kernel, caps, ordered)
    pairs = [
        network.add(capacity, lambda t: delivered.setdefault(t.owner, kernel.now), window, delay, *names)
        for capacity, window, delay, names in zip(capacities, windows, delays, PAIRS, strict=True)
    ]
    # None has as much left as another, or who leads would be a matter of rounding.
    totals = {f: 0.011 * 1.37**f for f in range(count)}
    for _, kind, f, *rest in events:
        if kind in ("start", "release"):
            totals[f] += rest[-2]
    slow = Reference(capacities, windows, delays, caps, totals if ordered else None)
    transfers, released = {}, [0.0] * 4
    dropped = [0.0] * 4
    now = 0.0
    for gap, kind, *rest in events:
        now += gap
        kernel.run(now)
        slow.advance(now)
        if kind == "start":
            f, pair, size, last = rest
            transfers[f] = pairs[pair].start(f, totals[f])
            slow.released[f] = 0.0
            slow.pair[f], slow.left[f] = pair, 0.0
            rest = [f, size, last]
        if kind in ("start", "release"):
            f, size, last = rest
            pairs[slow.pair[f]].release(transfers[f], size, last)
            released[slow.pair[f]] += size
            slow.left[f] += size
            slow.released[f] += size
            slow.closed |= {f} if last else set()
            slow.settle()
        elif kind == "cancel":
            (f,) = rest
            dropped[slow.pair[f]] += pairs[slow.pair[f]].remaining(transfers[f])
            pairs[slow.pair[f]].cancel(transfers[f])
            slow.cancel(f)
        else:
            pair, capacity = rest
            pairs[pair].set_capacity(capacity)
            assert math.isnan(pairs[pair].down_since) == (capacity > 0)
            slow.capacities[pair] = capacity
    for pair in range(4):
        pairs[pair].set_capacity(2.0)
        slow.capacities[pair] = 2.0
    kernel.run()
    slow.advance(kernel.now + 1000.0)

    expected = {f: at for f, at in slow.over.items() if not math.isnan(at)}
    assert delivered.keys() == expected.keys()
    assert delivered == pytest.approx(expected, rel=1e-7, abs=1e-7), "late or early"
    for i, pair in enumerate(pairs):
        assert pair.moved == pytest.approx(released[i] - dropped[i], abs=1e-6), "bytes are conserved"
        assert pair.moved == pytest.approx(slow.moved[i], abs=1e-6)
        assert pair.active == 0 and pair.backlog == 0 and pair.served == 0
        assert set(pair.open) == {t for f, t in transfers.items() if slow.pair[f] == i and t.waiting}
    assert count == len(transfers)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.one_of(st.just(0.0), st.floats(1e-3, 1e10)), st.one_of(st.just(math.inf), st.floats(0.1, 1e9))),
        min_size=4,
        max_size=4,
    ),
    st.dictionaries(st.sampled_from(["out a", "out b", "in x", "in y"]), st.floats(1e-3, 1e10)),
)
def test_rates_are_feasible_and_nobody_could_have_more_without_taking_from_a_poorer_one(given_pairs, caps):
    network, pairs = Network(Kernel(), caps), []
    for (active, capacity, window), names in zip(given_pairs, PAIRS, strict=True):
        pairs.append(network.add(capacity, print, window, 0.0, *names))
        pairs[-1].active = active
    rates = fair_rates(pairs, caps)
    used = {name: sum(r * p.active for r, p in zip(rates, pairs, strict=True) if name in (p.egress, p.ingress)) for name in caps}
    slack = 1 + 1e-9
    assert all(used[name] <= cap * slack for name, cap in caps.items())
    for rate, pair in zip(rates, pairs, strict=True):
        assert 0 <= rate <= pair.transfer_cap and rate * pair.active <= pair.capacity * slack
        if not pair.active:
            assert rate == 0
            continue
        full = [rate * pair.active >= pair.capacity / slack, rate >= pair.transfer_cap / slack]
        for name in {pair.egress, pair.ingress} & caps.keys():
            largest = max(r for r, p in zip(rates, pairs, strict=True) if p.active and name in (p.egress, p.ingress))
            full.append(used[name] >= caps[name] / slack and rate >= largest / slack)
        assert any(full), "every flow has a bottleneck where it is among the fastest"


def test_pairs_that_share_nothing_do_not_hear_of_each_other():
    kernel = Kernel()
    network = Network(kernel, {"out a": 1.0, "in y": 5.0, "out b": math.inf})
    a_x, b_x, b_y = (network.add(2.0, print, egress=e, ingress=i) for e, i in (("out a", "in x"), ("out b", "in x"), ("out b", "in y")))
    for pair in (a_x, b_x, b_y):
        pair.release(pair.start(None, 10.0), 10.0, True)
    assert [p.rate for p in (a_x, b_x, b_y)] == [1.0, 2.0, 2.0]
    planned = kernel.pending
    b_x.release(b_x.start(None, 10.0), 10.0, True)
    assert kernel.pending == planned + 1 and b_x.rate == 1.0


def test_a_capped_pair_that_joins_two_groups_merges_them():
    network = Network(Kernel(), {"out a": 3.0, "in y": 3.0})
    a_x, b_y = network.add(9.0, print, egress="out a", ingress="in x"), network.add(9.0, print, egress="out b", ingress="in y")
    a_y = network.add(9.0, print, egress="out a", ingress="in y")
    for pair in (a_x, b_y, a_y):
        pair.release(pair.start(None, 10.0), 10.0, True)
    assert [p.rate for p in (a_x, b_y, a_y)] == [1.5, 1.5, 1.5]


def test_a_transfer_on_its_way_can_be_cancelled_and_nothing_comes():
    kernel, delivered = Kernel(), []
    pair = Network(kernel).add(1.0, delivered.append, delay_s=1.0)
    transfer = pair.start("r", 1.0)
    pair.release(transfer, 2.0, True)
    kernel.run(2.5)
    assert pair.moved == 2.0 and transfer in pair.open
    pair.cancel(transfer)
    pair.cancel(transfer)
    kernel.run()
    assert not delivered and not pair.open


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda pair: pair.set_capacity(-1.0), "link capacity"),
        (lambda pair: pair.set_capacity(math.inf), "link capacity"),
        (lambda pair: pair.set_capacity(math.nan), "link capacity"),
        (lambda pair: pair.release(pair.start("r", 1.0), -1.0, True), "release"),
        (lambda pair: pair.release(pair.start("r", 1.0), math.nan, True), "release"),
        (lambda pair: Network(Kernel()).add(math.inf, print), "link capacity"),
    ],
)
def test_bad_input_names_the_field(call, field):
    pair = Network(Kernel()).add(1.0, print)
    with pytest.raises(InvalidInput) as caught:
        call(pair)
    assert caught.value.field == field


@pytest.mark.parametrize("end", ["closed", "cancelled"])
def test_nothing_is_released_into_a_transfer_that_is_over(end):
    pair = Network(Kernel()).add(1.0, print)
    transfer = pair.start("r", 1.0)
    pair.release(transfer, 1.0, end == "closed")
    if end == "cancelled":
        pair.cancel(transfer)
    with pytest.raises(InvalidInput, match="neither closed nor over"):
        pair.release(transfer, 1.0, True)

import threading
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from transfer_fixtures import SPEC, Cache

from prfaas_jax.errors import Exhausted, InvalidInput, TransferError
from prfaas_jax.kvcache.segments import Segment, SegmentKey
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.transfer import frames, wire
from prfaas_jax.transfer.dispatch import Dispatcher
from prfaas_jax.transfer.outbox import Outbox, StaleEpoch, Ticket, UnknownTicket

LEASE_S = 30.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Reader:
    """A session with one stream, spoken to without a network."""

    def __init__(self, outbox: Outbox, message_bytes: int = 100):
        self.dispatcher = Dispatcher(outbox, message_bytes)
        self.stream = self.dispatcher.join(b"s" * 16, 1)

    def open(self, ticket: Ticket, granted: int = 1 << 30) -> None:
        self.dispatcher.open(self.stream, frames.Open(ticket.id, ticket.epoch, granted))

    def next(self) -> tuple[wire.Header, bytes] | frames.Frame | None:
        """What is sent now; data is acknowledged at once."""
        item, alive = self.dispatcher.next(self.stream)
        assert alive
        if not isinstance(item, bytes):
            return item
        header, payload = wire.decode(item)
        self.dispatcher.acknowledge(self.stream, header.sequence + 1)
        return header, bytes(payload)


def read(outbox: Outbox, ticket: Ticket) -> list[tuple[SegmentKey, int, bytes]]:
    """All that a finished ticket has; raises TransferError with the sender's word when it is dead."""
    reader, seen = Reader(outbox), []
    reader.open(ticket)
    while True:
        match reader.next():
            case frames.End():
                return seen
            case frames.Failed(_, _, text):
                raise TransferError(text)
            case header, payload:
                seen.append((header.key, header.offset, payload))


class OutboxMachine(RuleBasedStateMachine):
    """Any order of calls: the bytes held are those of the live tickets, streams carry what was put, dead tickets carry nothing."""

    tickets = Bundle("tickets")

    @initialize()
    def start(self):
        self.clock = Clock()
        self.outbox = Outbox(SPEC, SPEC.bytes(20), LEASE_S, self.clock)
        self.live: dict[bytes, dict] = {}

    @rule(target=tickets, length=st.integers(0, 24))
    def open(self, length):
        size, held = SPEC.bytes(length), sum(SPEC.bytes(t["length"]) for t in self.live.values() if not t["failed"])
        if size > SPEC.bytes(20):
            with pytest.raises(InvalidInput, match="length"):
                self.outbox.open(length)
        elif held + size > SPEC.bytes(20):
            with pytest.raises(Exhausted):
                self.outbox.open(length)
        else:
            ticket = self.outbox.open(length)
            cache = Cache(SPEC, length)
            state = {"length": length, "cache": cache, "todo": cache.keys(5), "put": [], "over": False, "failed": False}
            self.live[ticket.id] = state | {"at": self.clock.now}
            return ticket
        return Ticket(b"?" * 16, 1)

    @rule(ticket=tickets)
    def put(self, ticket):
        state = self.live.get(ticket.id)
        if state is None:
            with pytest.raises(UnknownTicket):
                self.outbox.put(ticket, Segment(SegmentKey(0, 0, (0, 1), (0, 1), (0, 1)), memoryview(b"")))
        elif state["todo"]:
            segment = state["cache"].segment(state["todo"][0])
            if state["over"] or state["failed"]:
                with pytest.raises(TransferError):
                    self.outbox.put(ticket, segment)
            else:
                self.outbox.put(ticket, segment)
                state["put"].append(state["todo"].pop(0))
                state["at"] = self.clock.now

    @rule(ticket=tickets)
    def finish(self, ticket):
        state = self.live.get(ticket.id)
        if state is None or state["failed"]:
            with pytest.raises(TransferError):
                self.outbox.finish(ticket)
        else:
            self.outbox.finish(ticket)
            state["over"], state["at"] = True, self.clock.now

    @rule(ticket=tickets)
    def fail(self, ticket):
        self.outbox.fail(ticket, TransferError("engine broke"))
        if state := self.live.get(ticket.id):
            state["failed"] = True

    @rule(ticket=tickets)
    def extend(self, ticket):
        self.outbox.extend(ticket)
        if state := self.live.get(ticket.id):
            state["at"] = self.clock.now

    @rule(ticket=tickets)
    def fetch(self, ticket):
        state = self.live.get(ticket.id)
        if state is None or state["failed"]:
            with pytest.raises(TransferError, match="ABORTED" if state else "NOT_FOUND"):
                read(self.outbox, ticket)
        elif state["over"]:
            seen = read(self.outbox, ticket)
            if seen:
                state["at"] = self.clock.now
            assert seen == [
                (key, i, bytes(payload[i : i + 100]))
                for key in state["put"]
                for payload in [state["cache"].segment(key).payload.cast("B")]
                for i in range(0, payload.nbytes, 100)
            ]

    @rule(ticket=tickets)
    def stale_epoch(self, ticket):
        if ticket.id in self.live:
            with pytest.raises(StaleEpoch):
                self.outbox.release(ticket.id, ticket.epoch + 1)
            with pytest.raises(TransferError, match="FAILED_PRECONDITION"):
                read(self.outbox, Ticket(ticket.id, ticket.epoch + 1))

    @rule(ticket=consumes(tickets))
    def release(self, ticket):
        for _ in range(2):
            self.outbox.release(ticket.id, ticket.epoch)
        self.live.pop(ticket.id, None)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def sweep(self):
        expired = {id for id, state in self.live.items() if self.clock.now - state["at"] > LEASE_S}
        assert {ticket.id for ticket in self.outbox.sweep()} == expired
        for id in expired:
            del self.live[id]

    @invariant()
    @precondition(lambda self: hasattr(self, "outbox"))
    def bytes_are_those_of_live_tickets(self):
        assert self.outbox.bytes_held == sum(SPEC.bytes(t["length"]) for t in self.live.values() if not t["failed"]) >= 0
        assert {t.id for t in self.outbox.tickets} == set(self.live)

    def teardown(self):
        if hasattr(self, "outbox"):
            self.clock.now += 1000
            self.outbox.sweep()
            assert self.outbox.bytes_held == 0
            assert self.outbox.tickets == ()


OutboxMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestOutboxMachine = OutboxMachine.TestCase


def test_reader_sees_segments_while_prefill_goes_on():
    outbox, cache = Outbox(SPEC, 1 << 20), Cache(SPEC, 12)
    ticket, reader = outbox.open(12), Reader(outbox, 10_000)
    reader.open(ticket)
    for key in cache.keys(4):
        outbox.put(ticket, cache.segment(key))
        header, payload = reader.next()
        assert (header.key, payload) == (key, bytes(cache.segment(key).payload.cast("B")))
    timer = threading.Timer(0.05, outbox.finish, [ticket])
    timer.start()
    ends = [reader.next(), reader.next()]
    assert frames.End(ticket.id, ticket.epoch) in ends


@pytest.mark.parametrize("how", ["release", "fail", "sweep"])
def test_lost_notification_a_waiting_reader_is_told_when_its_ticket_dies(how):
    """Class C."""
    outbox = Outbox(SPEC, 1 << 20, lease_s=0.05)
    ticket, reader = outbox.open(12), Reader(outbox)
    reader.open(ticket)

    def end():
        time.sleep(0.1)
        match how:
            case "release":
                outbox.release(ticket.id, ticket.epoch)
            case "fail":
                outbox.fail(ticket, TransferError("engine broke"))
            case "sweep":
                assert outbox.sweep() == (ticket,)

    thread = threading.Thread(target=end)
    thread.start()
    started = time.monotonic()
    while (said := reader.next()) is None:
        assert time.monotonic() - started < 2
    assert said.text.startswith("ABORTED" if how == "fail" else "NOT_FOUND")
    thread.join(5)


def test_expired_lease_nothing_is_read_after_release_even_in_mid_segment():
    """Class B."""
    outbox, cache = Outbox(SPEC, 1 << 20), Cache(SPEC, 4)
    ticket, reader = outbox.open(4), Reader(outbox, 16)
    outbox.put(ticket, cache.segment(cache.keys(4)[0]))
    reader.open(ticket)
    assert isinstance(reader.next(), tuple)
    outbox.release(ticket.id, ticket.epoch)
    assert reader.next().text.startswith("NOT_FOUND")
    with pytest.raises(UnknownTicket):
        outbox.put(ticket, cache.segment(cache.keys(4)[1]))


def test_progress_of_the_reader_extends_the_lease():
    clock = Clock()
    outbox, cache = Outbox(SPEC, 1 << 20, LEASE_S, clock), Cache(SPEC, 12)
    ticket, reader = outbox.open(12), Reader(outbox)
    for key in cache.keys(4):
        outbox.put(ticket, cache.segment(key))
    outbox.finish(ticket)
    reader.open(ticket)
    while isinstance(reader.next(), tuple):
        clock.now += LEASE_S - 1
        assert outbox.sweep() == ()
    clock.now += 2
    assert outbox.sweep() == (ticket,)


def test_zero_length_transfer_ends_at_once():
    """Class C."""
    outbox = Outbox(SPEC, 1)
    ticket = outbox.open(0)
    outbox.finish(ticket)
    assert read(outbox, ticket) == []


def test_bad_segments_are_refused_by_name():
    outbox, cache = Outbox(SPEC, 1 << 20), Cache(SPEC, 4)
    ticket = outbox.open(4)
    keys = cache.keys(4)
    good = cache.segment(keys[0])
    with pytest.raises(InvalidInput, match=r"segment\.payload"):
        outbox.put(ticket, Segment(good.key, good.payload.cast("B")[1:]))
    with pytest.raises(InvalidInput, match=r"segment\.payload"):
        outbox.put(ticket, Segment(good.key, memoryview(np.zeros(2 * good.payload.nbytes, np.uint8))[::2]))
    with pytest.raises(InvalidInput, match=r"segment\.tokens"):
        outbox.put(ticket, Segment(SegmentKey(0, 0, (0, 1), (0, 5), (0, 4)), good.payload))
    for key in keys:
        outbox.put(ticket, cache.segment(key))
    with pytest.raises(TransferError, match="goes beyond"):
        outbox.put(ticket, good)


def test_dtypes_that_lanes_cannot_carry_are_refused():
    spec = CacheSpec((SPEC.groups[0], CacheGroup(LayerCache("state", (TensorSpec("recurrent", 1, 1, "float64"),)), (0,))))
    with pytest.raises(InvalidInput, match=r"groups\[1\].*float64"):
        Outbox(spec, 1 << 20)


@pytest.mark.parametrize(("group", "tokens"), [(2, (13, 20)), (2, (0, 6)), (3, (0, 1)), (3, (18, 20))])
def test_what_does_not_stay_is_refused(group, tokens):
    """Tokens before the window and states of another length belong to no cache of 20 tokens."""
    outbox = Outbox(SPEC, 1 << 20)
    ticket = outbox.open(20)
    key = SegmentKey(group, 0, (0, 1), tokens, (0, 1))
    with pytest.raises(InvalidInput, match=r"segment\.tokens"):
        outbox.put(ticket, Segment(key, memoryview(bytes(key.nbytes(SPEC)))))


@pytest.mark.parametrize(("field", "value"), [("capacity_bytes", 0), ("lease_s", 0.0)])
def test_bad_settings_of_an_outbox_are_named(field, value):
    with pytest.raises(InvalidInput, match=field):
        Outbox(SPEC, **{"capacity_bytes": 1 << 20} | {field: value})

"""What the receiving side knows of a link, fed by hand with a virtual clock."""

import pytest

from prfaas_jax.transfer.link import LinkMeter
from prfaas_jax.transfer.overlap import exposed_bound_s


def flow(meter: LinkMeter, now: float, rate: float, seconds: float, piece: int = 1 << 20) -> float:
    """A backlogged stream at `rate` bytes/s; when it ended."""
    end = now + seconds
    while now < end:
        now += piece / rate
        meter.arrived(now, piece, backlog=True)
    return now


def test_nothing_is_known_at_first():
    assert LinkMeter().estimate(5.0).bytes_per_s == 0


def test_rate_of_a_backlogged_stream_is_the_links():
    meter = LinkMeter()
    now = flow(meter, 0.0, 125e6, 2.0)
    assert meter.estimate(now).bytes_per_s == pytest.approx(125e6, rel=0.01)
    assert meter.estimate(now).goodput_bytes_per_s == pytest.approx(125e6, rel=0.02)
    assert meter.estimate(now).spare_bytes_per_s < 3e6


@pytest.mark.parametrize(("before", "after"), [(125e6, 12.5e6), (12.5e6, 125e6), (125e6, 1.25e6)])
def test_a_step_is_seen_within_two_seconds(before, after):
    meter = LinkMeter()
    now = flow(meter, 0.0, before, 3.0)
    piece = min(1 << 20, max(64 << 10, int(after * 0.02)))
    now = flow(meter, now, after, 1.9, piece)
    assert meter.estimate(now).bytes_per_s == pytest.approx(after, rel=0.15)


def test_time_without_a_backlog_is_not_the_links_fault():
    """A prefill that makes a megabyte every half second over a fast link."""
    meter, now = LinkMeter(), 0.0
    for _ in range(20):
        now += 0.5
        for i in range(4):
            now += 0.002
            meter.arrived(now, 256 << 10, backlog=i < 3)
    estimate = meter.estimate(now)
    assert estimate.bytes_per_s == pytest.approx((256 << 10) / 0.002, rel=0.01)
    assert estimate.goodput_bytes_per_s < 3e6
    assert estimate.spare_bytes_per_s > 100e6
    assert estimate.stalls == 0


def test_a_link_that_falls_silent_gets_slower_while_it_does():
    meter = LinkMeter()
    now = flow(meter, 0.0, 125e6, 1.0)
    assert meter.estimate(now + 3.0).bytes_per_s < 50e6
    meter.arrived(now + 3.0, 1, backlog=True)
    assert (meter.estimate(now + 3.0).stalls, meter.estimate(now + 3.0).stalled_s) == (1, pytest.approx(3.0))


def test_a_broken_connection_is_no_stall():
    meter = LinkMeter()
    now = flow(meter, 0.0, 125e6, 1.0)
    meter.interrupted()
    meter.arrived(now + 3.0, 1 << 20, backlog=True)
    assert meter.estimate(now + 3.0).stalls == 0


def test_round_trip_is_the_smallest_of_late():
    meter = LinkMeter()
    for at, rtt in [(0.0, 0.02), (1.0, 0.09), (2.0, 0.05)]:
        meter.round_trip(at, rtt)
    assert meter.estimate(2.0).rtt_s == 0.02
    assert meter.estimate(31.0).rtt_s == 0.05


@pytest.mark.parametrize(
    ("segments", "computed", "rate", "bound"),
    [
        ([(1.0, 100)], 1.0, 100.0, 1.0),
        ([(0.0, 100), (1.0, 100)], 1.0, 100.0, 1.0),
        ([(0.0, 300), (1.0, 100)], 1.0, 100.0, 3.0),
        ([(0.0, 10), (0.5, 10), (1.0, 10)], 1.0, 100.0, 0.1),
        ([], 1.0, 100.0, 0.0),
    ],
)
def test_what_the_computation_cannot_hide(segments, computed, rate, bound):
    assert exposed_bound_s(segments, computed, rate) == pytest.approx(bound)


def test_a_lane_that_lags_does_not_promise_more_than_the_sender_has():
    """Of two messages the second, which left last and was the last, overtakes the first: the pause that follows is nobody's pace."""
    meter, now = LinkMeter(), 0.0
    for order in range(0, 40, 2):
        for late, backlog in ((1, False), (0, True)):
            now += 0.001
            meter.arrived(now, 1 << 20, backlog, (order + late + 2**32 - 10) % 2**32)
            meter.arrived(now, 0, False)  # a probe's answer in between is no reason to forget
        now += 0.5
    estimate = meter.estimate(now)
    assert estimate.stalls == 0
    assert estimate.bytes_per_s == pytest.approx((1 << 20) / 0.001, rel=0.01), "what was overtaken, and nothing made up"
    for order in range(40, 60):
        now += 0.001
        meter.arrived(now, 1 << 20, True, (order + 2**32 - 10) % 2**32)
    assert meter.estimate(now).bytes_per_s == pytest.approx((1 << 20) / 0.001, rel=0.1)


def test_what_one_lane_still_carries_is_measured_after_another_has_brought_the_last_message():
    """A link slows down tenfold with a window of bytes under way: the last message comes first, the others at the new pace."""
    meter = LinkMeter()
    now, piece = 0.0, 64 << 10
    for order in range(20):
        now += piece / 1.25e6
        meter.arrived(now, piece, True, order)
    meter.arrived(now, piece, False, 26)
    for order in range(20, 26):
        now += piece / 0.125e6
        meter.arrived(now, piece, True, order)
    estimate = meter.estimate(now + 5.0)
    assert estimate.bytes_per_s == pytest.approx(0.125e6, rel=0.1)
    assert estimate.age_s == pytest.approx(5.0), "nothing more was promised"

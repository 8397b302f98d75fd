import random

from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.testing.relay_link import READ_BYTES, Flips, Link, Mark

RATES = st.floats(1e4, 2e9)


@given(rate=RATES, reads=st.lists(st.tuples(st.floats(0, 0.05), st.floats(0.01, 1)), min_size=1, max_size=60))
def test_no_stretch_of_time_carries_more_than_rate_and_burst(rate, reads):
    """Whatever comes late or stops in between, between any two moments at most what the line sends, and 20 ms that it caught up on."""
    link, now, done = Link(rate), 100.0, []
    for late, share in reads:
        now = max(now, link.reads_at()) + late
        nbytes = max(1, int(link.read_size() * share))
        done.append((link.put(now, nbytes), nbytes))
        link.flying = 0
        assert done[-1][0] >= now
        if late > 0.01:
            link.starve()
    for i, (first, _) in enumerate(done):
        for j in range(i + 1, len(done)):
            carried = sum(n for _, n in done[i + 1 : j + 1])
            assert carried <= (done[j][0] - first + 0.0201) * rate + 1


@given(rate=RATES)
def test_a_sender_that_never_stops_gets_the_whole_rate_from_a_loop_that_ticks_in_milliseconds(rate):
    link, now, passed = Link(rate), 50.0, 0
    link.put(now, 1)
    for tick in range(500):
        now = 50.0 + tick / 1e3
        while link.reads_at() <= now:
            passed += link.read_size()
            link.put(now, link.read_size())
            link.flying = 0
    assert abs(passed - 0.499 * rate) < 0.004 * rate + READ_BYTES


@given(rate=RATES, idle_s=st.floats(0.01, 100))
def test_an_idle_line_saves_up_two_milliseconds_at_most(rate, idle_s):
    link = Link(rate)
    link.put(10.0, 1000)
    link.starve()
    now = max(10.0, link.reads_at() + 0.002) + idle_s
    nbytes = int(rate)
    assert link.put(now, nbytes) >= now + nbytes / rate - 0.0021


@given(rate=RATES)
def test_what_the_relay_queues_in_front_of_the_line_is_bounded(rate):
    link, now = Link(rate), 7.0
    while link.reads_at() <= now:
        sent = link.put(now, link.read_size())
    # The whole of a second's queue on the slowest lines is one read.
    assert (sent - now) * rate <= max(512 << 10, 1024)


@given(rate=RATES, delay_s=st.floats(0, 0.2), late_s=st.floats(0, 1))
def test_no_more_flies_than_rate_times_delay_and_three_quarters_of_a_mib(rate, delay_s, late_s):
    link = Link(rate, delay_s)
    link.put(0.0, 1)
    while link.reads_at() <= late_s:
        link.put(late_s, link.read_size())
    assert link.flying <= rate * delay_s + (768 << 10)


@given(marks=st.lists(st.integers(0, 10_000), min_size=1, max_size=5), slice_bytes=st.none() | st.integers(1, 500))
def test_reads_stop_exactly_at_every_mark(marks, slice_bytes):
    link = Link(slice_bytes=slice_bytes)
    for offset in marks:
        link.mark(Mark(offset, "reset"))
    seen = []
    while len(seen) < len(marks):
        if size := link.read_size():
            link.put(0.0, size)
        else:
            seen.append(link.take_mark().offset)
            assert seen[-1] == link.passed
    assert seen == sorted(marks)


@given(
    offsets=st.lists(st.integers(0, 4999), max_size=8, unique=True),
    per_byte=st.sampled_from([0.0, 1e-3, 0.05, 1.0]),
    seed=st.integers(0, 99),
    cuts=st.integers(0, 1 << 30),
)
def test_what_is_damaged_does_not_depend_on_the_pieces_it_is_read_in(offsets, per_byte, seed, cuts):
    def damaged(pieces: list[int]) -> bytes:
        flips, data, start = Flips(), bytearray(5000), 0
        flips.add(offsets)
        flips.set_rate(per_byte, seed, 0)
        for piece in pieces:
            flips.apply(memoryview(data)[start : start + piece], start)
            start += piece
        return bytes(data)

    rng, pieces = random.Random(cuts), []
    while sum(pieces) < 5000:
        pieces.append(min(rng.randrange(1, 900), 5000 - sum(pieces)))
    whole = damaged([5000])
    assert damaged(pieces) == whole
    if per_byte == 0:
        assert [i for i, byte in enumerate(whole) if byte] == sorted(offsets)
    if per_byte == 1:
        assert sum(byte == 0 for byte in whole) <= len(offsets)

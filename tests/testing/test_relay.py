import itertools
import socket
import threading
import time

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tcp_target import Target, connect, pattern, ping, read_all, wait_until

from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing.relay import Relay


def test_a_target_may_be_named_after_the_relay_has_its_port():
    with Target(echo=True) as target, Relay("127.0.0.1:9") as relay:
        relay.set_target(target.address)
        with connect(relay) as sock:
            ping(sock)
        with pytest.raises(InvalidInput, match="target='nowhere'"):
            relay.set_target("nowhere")


def test_bytes_pass_unchanged_in_both_directions():
    with Target(echo=True) as target, Relay(target.address) as relay, connect(relay) as sock:
        data = pattern(3_000_000)
        threading.Thread(target=sock.sendall, args=(data,)).start()
        seen = b""
        while len(seen) < len(data):
            seen += sock.recv(1 << 18)
        assert seen == data


def best_rate(gbps: float, rtt_ms: float, connections: int, seconds: float = 0.5) -> float:
    """Gbit/s over all connections, the best of three: a busy machine makes a relay slower, never faster."""
    nbytes = int(gbps * 1e9 / 8 * seconds) // connections
    best = 0.0
    for _ in range(3):
        with Target(nbytes) as target, Relay(target.address, gbps=gbps, rtt_ms=rtt_ms) as relay:
            socks = [connect(relay) for _ in range(connections)]
            started = time.perf_counter() + rtt_ms / 2e3
            readers = [threading.Thread(target=drain, args=(sock, nbytes)) for sock in socks]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join(20)
            best = max(best, connections * nbytes * 8 / 1e9 / (time.perf_counter() - started))
        if best > 0.9 * gbps:
            break
    return best


def drain(sock: socket.socket, nbytes: int) -> None:
    buffer = bytearray(1 << 18)
    with sock:
        while got := sock.recv_into(buffer):
            nbytes -= got
    assert nbytes == 0


# The long round trip needs bandwidth x RTT bytes in flight, 5 MB.
@pytest.mark.parametrize(("gbps", "rtt_ms", "connections"), [(0.05, 0, 1), (1.0, 0, 1), (1.0, 40, 1), (0.08, 0, 3)])
def test_rate_is_the_one_set_and_shared(gbps, rtt_ms, connections):
    assert 0.9 * gbps < best_rate(gbps, rtt_ms, connections) < 1.1 * gbps


@pytest.mark.parametrize("rtt_ms", [0, 5, 40])
def test_round_trip_is_the_one_set(rtt_ms):
    with Target(echo=True) as target, Relay(target.address, rtt_ms=rtt_ms) as relay, connect(relay) as sock:
        ping(sock)
        seen = sorted(ping(sock) for _ in range(9))[4] * 1e3
    assert rtt_ms <= seen < rtt_ms * 1.2 + 2


def test_jitter_delays_and_never_reorders():
    with Target(echo=True) as target, Relay(target.address, jitter_ms=8) as relay, connect(relay) as sock:
        seen = [ping(sock) * 1e3 for _ in range(20)]
        assert max(seen) - min(seen) > 3
        for i in range(100):
            sock.sendall(bytes([i]))
        back = b""
        while len(back) < 100:
            back += sock.recv(100)
        assert back == bytes(range(100))


@pytest.mark.parametrize("nbytes", [0, 1, 70_000])
def test_reset_lets_exactly_so_many_bytes_through(nbytes):
    with Target(400_000) as target, Relay(target.address) as relay:
        relay.reset_after(nbytes)
        # It may come while connecting, and overtake what the receiver has not read yet, so the relay counts.
        with pytest.raises(ConnectionResetError), connect(relay) as sock:
            read_all(sock)
        assert relay.passed("down") == nbytes
        assert relay.connections == 0


def wrong_bits(seen: bytes) -> dict[int, int]:
    """Of each byte that differs from the pattern, how many bits do."""
    return {i: (a ^ b).bit_count() for i, (a, b) in enumerate(zip(seen, pattern(len(seen)), strict=True)) if a != b}


@pytest.mark.parametrize("offsets", [[4321], [0, 1, 65_536, 299_999], [7, 7]])
def test_flip_changes_one_bit_of_each_byte_named(offsets):
    with Target(300_000) as target, Relay(target.address) as relay:
        relay.flip_byte_after(offsets if len(offsets) > 1 else offsets[0])
        with connect(relay) as sock:
            seen = read_all(sock)
    # Twice the same bit is none.
    assert wrong_bits(seen) == ({} if offsets == [7, 7] else dict.fromkeys(offsets, 1))


def test_random_flips_come_at_their_rate_and_the_seed_alone_decides_which():
    nbytes = 1_000_000

    def flips(seed: int, slice_bytes: int | None) -> dict[int, int]:
        with Target(nbytes) as target, Relay(target.address) as relay:
            relay.set_slices(slice_bytes)
            relay.flip_rate(100_000, seed=seed)
            with connect(relay) as sock:
                return wrong_bits(read_all(sock))

    first = flips(1, None)
    assert 60 < len(first) < 140  # 100 expected, four sigma
    assert set(first.values()) == {1}
    assert flips(1, 10_000) == first != flips(2, None)


def test_black_hole_delays_and_loses_nothing():
    with Target(echo=True) as target, Relay(target.address) as relay, connect(relay) as sock:
        ping(sock)
        relay.black_hole(0.3)
        assert 0.25 < ping(sock) < 0.6
        relay.pause()
        sock.sendall(b"p")
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        relay.resume()
        sock.settimeout(5)
        assert sock.recv(1) == b"p"


def test_black_hole_of_one_direction_leaves_the_other():
    with Target() as target, Relay(target.address) as relay, connect(relay) as sock:
        relay.pause("down")
        sock.sendall(b"up goes on")
        wait_until(lambda: bytes(target.received) == b"up goes on")
        relay.resume()
        relay.pause("up")
        sock.sendall(b"nothing of this")
        time.sleep(0.1)
        assert bytes(target.received) == b"up goes on"


@pytest.mark.parametrize("nbytes", [0, 1, 70_000])
def test_black_hole_after_bytes_lets_exactly_so_many_through(nbytes):
    with Target(200_000) as target, Relay(target.address) as relay:
        relay.black_hole_after(nbytes, seconds=0.4)
        started = time.perf_counter()
        with connect(relay) as sock:
            seen = b""
            while len(seen) < nbytes:
                seen += sock.recv(nbytes - len(seen))
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            assert relay.passed() == nbytes
            sock.settimeout(5)
            assert seen + read_all(sock) == pattern(200_000)
            assert time.perf_counter() - started > 0.4


def test_reset_now_ends_every_connection():
    with Target(echo=True) as target, Relay(target.address) as relay, connect(relay) as one, connect(relay) as two:
        ping(one), ping(two)
        relay.reset()
        for sock in (one, two):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert relay.connections == 0
        with connect(relay) as sock:
            ping(sock)


@pytest.mark.parametrize("nbytes", [0, 1, 70_000])
def test_half_close_after_bytes_ends_the_stream_there(nbytes):
    with Target(200_000) as target, Relay(target.address) as relay:
        relay.half_close_after(nbytes)
        with connect(relay) as sock:
            assert read_all(sock) == pattern(200_000)[:nbytes]
            sock.sendall(b"still there")
            wait_until(lambda: bytes(target.received) == b"still there")


def test_slices_come_one_at_a_time_and_no_larger():
    with Target(600) as target, Relay(target.address) as relay:
        relay.set_slices(100, pause_ms=20, direction="down")
        with connect(relay) as sock:
            seen = [(time.perf_counter(), len(data)) for data in iter(lambda: sock.recv(1 << 16), b"")]
    # A reader that is late finds two slices in one.
    assert sum(n for _, n in seen) == 600 and len(seen) >= 4 and sum(n == 100 for _, n in seen) >= 3
    assert seen[-1][0] - seen[0][0] > 0.08


def test_half_close_ends_one_direction_only():
    with Target() as target, Relay(target.address) as relay, connect(relay) as sock:
        sock.sendall(b"before")
        wait_until(lambda: len(target.received) == 6)
        relay.half_close("down")
        assert sock.recv(1) == b""
        sock.sendall(b"after")
        sock.shutdown(socket.SHUT_WR)
        assert target.ended.wait(5)
        assert bytes(target.received) == b"beforeafter"


def test_rate_may_differ_by_direction():
    nbytes = 500_000
    with Target() as target, Relay(target.address) as relay, connect(relay) as sock:
        relay.set_rate(0.02, "down")
        started = time.perf_counter()
        sock.sendall(pattern(nbytes))
        wait_until(lambda: len(target.received) == nbytes)
        assert time.perf_counter() - started < 0.1
    with Target(nbytes) as target, Relay(target.address) as relay:
        relay.set_rate(0.02, "down")
        with connect(relay) as sock:
            started = time.perf_counter()
            assert read_all(sock) == pattern(nbytes)
            assert time.perf_counter() - started > 0.18


def test_a_step_of_the_rate_comes_at_its_time():
    nbytes = 2_000_000
    with Target(nbytes) as target, Relay(target.address, gbps=0.02) as relay:
        relay.set_rate(None, after_s=0.3)
        with connect(relay) as sock:
            started = time.perf_counter()
            sock.recv(1)
            time.sleep(0.2)
            assert relay.passed() < 0.3 * 0.02e9 / 8 + 300_000
            read_all(sock)
            # 0.8 s at the first rate.
            assert 0.25 < time.perf_counter() - started < 0.6


def test_change_of_rate_takes_effect_in_mid_transfer():
    nbytes = 2_000_000
    with Target(nbytes) as target, Relay(target.address, gbps=0.01) as relay, connect(relay) as sock:
        started = time.perf_counter()
        sock.recv(1000)
        relay.set_link(gbps=None)
        read_all(sock)
        assert time.perf_counter() - started < 1.0


def test_nobody_listens_at_the_target():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with Relay(f"127.0.0.1:{port}") as relay:
        # The reset may come while connecting, sending or receiving.
        with pytest.raises(ConnectionError), connect(relay) as sock:
            sock.sendall(b"x")
            read_all(sock)
        assert relay.connections == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    up=st.lists(st.integers(1, 70_000), min_size=1, max_size=6),
    gbps=st.sampled_from([None, 0.2, 1.0]),
    rtt_ms=st.sampled_from([0, 3]),
    jitter_ms=st.sampled_from([0, 2]),
    slice_bytes=st.sampled_from([None, 1000, 65_536]),
    pause_ms=st.sampled_from([0, 0.1]),
    changes=st.lists(st.tuples(st.sampled_from(["stall", "rate", "delay", "slices"]), st.floats(0.001, 0.03)), max_size=4),
)
def test_bytes_are_conserved_and_in_order_whatever_the_link_does(up, gbps, rtt_ms, jitter_ms, slice_bytes, pause_ms, changes):
    """No fault that destroys bytes is among these: what goes in comes out, both ways, and nothing stays inside."""
    data = pattern(sum(up))
    with Target(echo=True) as target, Relay(target.address, gbps=gbps, rtt_ms=rtt_ms, jitter_ms=jitter_ms) as relay:
        relay.set_slices(slice_bytes, pause_ms if slice_bytes else 0)
        for kind, after_s in changes:
            if kind == "stall":
                relay.black_hole(0.02, after_s=after_s)
            elif kind == "rate":
                relay.set_rate(0.5, "up", after_s=after_s)
            elif kind == "delay":
                relay.set_link(gbps, 1, 0, after_s=after_s)
            else:
                relay.set_slices(3000, after_s=after_s)
        with connect(relay) as sock:

            def send() -> None:
                for start, end in itertools.pairwise(itertools.accumulate([0, *up])):
                    sock.sendall(data[start:end])
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            assert read_all(sock) == data
            sender.join(5)
        wait_until(lambda: relay.connections == 0)
        assert relay.passed("up") == relay.passed("down") == len(data)


def test_what_is_held_is_the_bandwidth_times_the_delay_and_no_more():
    gbps, rtt_ms = 0.8, 100
    flying = gbps * 1e9 / 8 * rtt_ms / 2e3  # 5 MB
    with Target(40_000_000) as target, Relay(target.address, gbps=gbps, rtt_ms=rtt_ms) as relay, connect(relay) as sock:
        most = 0
        reader = threading.Thread(target=drain, args=(sock, 40_000_000))
        reader.start()
        while reader.is_alive():
            most = max(most, relay.held())
            time.sleep(0.002)
        assert 0.9 * flying < most < flying + (1 << 20)


def test_a_reader_that_does_not_read_holds_back_its_sender():
    with Target(60_000_000) as target, Relay(target.address, gbps=4, rtt_ms=10) as relay, socket.socket() as sock:
        # A small window of its own, so that the kernel does not swallow it all.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        sock.connect(("127.0.0.1", relay.port))
        time.sleep(0.3)
        stuck = relay.passed()
        time.sleep(0.1)
        assert relay.passed() == stuck < 60_000_000
        assert relay.held() < 4e9 / 8 * 0.005 + (1 << 20)
        cpu = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - cpu < 0.1
        assert read_all(sock) == target.data


@pytest.mark.parametrize(("gbps", "kernel"), [(0.05, 256 << 10), (1.0, 500_000)])
def test_the_queue_in_front_of_the_line_is_short(gbps, kernel):
    with Target() as target, Relay(target.address, gbps=gbps) as relay, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        own = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        sock.connect(("127.0.0.1", relay.port))
        sock.settimeout(0.3)
        relay.pause()
        sent = 0
        with pytest.raises(TimeoutError):
            while True:
                sent += sock.send(bytes(1 << 16))
        assert relay.passed("up") == 0
        assert sent < kernel + own + (128 << 10)


def test_nothing_is_left_behind_and_idle_costs_no_cpu():
    me = psutil.Process()
    before = me.num_fds(), threading.active_count()
    with Target(echo=True) as target:
        with Relay(target.address) as relay, connect(relay) as sock:
            ping(sock)
            cpu = time.process_time()
            time.sleep(0.3)
            assert time.process_time() - cpu < 0.1
        assert target.ended.wait(5)
    deadline = time.monotonic() + 5
    while (me.num_fds() > before[0] or threading.active_count() > before[1]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert me.num_fds() <= before[0]
    assert threading.active_count() <= before[1]


@pytest.mark.parametrize(("field", "kwargs"), [("gbps", {"gbps": 0}), ("rtt_ms", {"rtt_ms": -1}), ("listen", {"listen": "nowhere"})])
def test_bad_settings_are_named(field, kwargs):
    with pytest.raises(InvalidInput, match=field):
        Relay("127.0.0.1:1", **kwargs)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("gbps", lambda relay: relay.set_rate(-1)),
        ("jitter_ms", lambda relay: relay.set_link(jitter_ms=60_000)),
        ("slice_bytes", lambda relay: relay.set_slices(0)),
        ("pause_ms", lambda relay: relay.set_slices(1, pause_ms=-1)),
        ("pause_ms", lambda relay: relay.set_slices(None, pause_ms=1)),
        ("seconds", lambda relay: relay.black_hole(float("nan"))),
        ("seconds", lambda relay: relay.black_hole_after(0, -1)),
        ("nbytes", lambda relay: relay.reset_after(-1)),
        ("nbytes", lambda relay: relay.half_close_after(-1)),
        ("nbytes", lambda relay: relay.flip_byte_after([0, -1])),
        ("flips_per_gb", lambda relay: relay.flip_rate(-1)),
        ("after_s", lambda relay: relay.reset(after_s=-1)),
    ],
)
def test_bad_arguments_are_named_at_once(field, call):
    with Relay("127.0.0.1:1") as relay, pytest.raises(InvalidInput, match=f"^{field}="):
        call(relay)

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing.relay import Relay


class Target:
    """A TCP server: echoes when `echo`, else sends `nbytes` of a pattern to whoever connects and keeps what it is sent."""

    def __init__(self, nbytes: int = 0, echo: bool = False):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.data, self.echo = pattern(nbytes), echo
        self.received = bytearray()
        self.ended = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which close does not
        self.listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), sock:
            if self.data:
                sock.sendall(self.data)
                sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(1 << 16):
                if self.echo:
                    sock.sendall(data)
                else:
                    self.received += data
        self.ended.set()


def pattern(nbytes: int) -> bytes:
    return (bytes(range(251)) * (nbytes // 251 + 1))[:nbytes]


def connect(relay: Relay) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", relay.port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 18):
        parts.append(data)
    return b"".join(parts)


def ping(sock: socket.socket) -> float:
    started = time.perf_counter()
    sock.sendall(b"p")
    assert sock.recv(1) == b"p"
    return time.perf_counter() - started


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
        with connect(relay) as sock:
            # A reset may overtake what the receiver has not read yet, so it counts at the relay.
            with pytest.raises(ConnectionResetError):
                read_all(sock)
            assert relay.passed("down") == nbytes
            assert relay.connections == 0


def test_flip_changes_one_bit_of_one_byte():
    with Target(10_000) as target, Relay(target.address) as relay:
        relay.flip_byte_after(4321)
        with connect(relay) as sock:
            seen = read_all(sock)
    wrong = [i for i, (a, b) in enumerate(zip(seen, pattern(10_000), strict=True)) if a != b]
    assert wrong == [4321]
    assert (seen[4321] ^ pattern(10_000)[4321]).bit_count() == 1


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


def test_half_close_ends_one_direction_only():
    with Target() as target, Relay(target.address) as relay, connect(relay) as sock:
        sock.sendall(b"before")
        while len(target.received) < 6:
            time.sleep(0.005)
        relay.half_close("down")
        assert sock.recv(1) == b""
        sock.sendall(b"after")
        sock.shutdown(socket.SHUT_WR)
        assert target.ended.wait(5)
        assert bytes(target.received) == b"beforeafter"


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


def test_command_line_prints_its_port_and_stops_on_sigterm():
    with Target(echo=True) as target:
        command = [sys.executable, "-m", "prfaas_jax.testing.relay", f"--target={target.address}", "--gbps=1", "--rtt_ms=4"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
            try:
                line = json.loads(process.stdout.readline())
                with socket.create_connection(("127.0.0.1", line["port"]), timeout=10) as sock:
                    assert ping(sock) >= 0.004
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
            finally:
                process.kill()

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tcp_target import wait_until

from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing.json_child import ChildFailed
from prfaas_jax.testing.relay import Relay
from prfaas_jax.testing.transfer_baselines import JaxTransfer, Mooncake, Nixl, Pair, RawSockets, Sample, Unavailable
from prfaas_jax.testing.transfer_mover import Pattern

MIB = 1 << 20
# An interpreter that has packages which are no part of this project.
PEERS = os.environ.get("PRFAAS_PEERS_PYTHON", sys.executable)


class Polling(RawSockets):
    polls = True


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def runs(pid: int) -> bool:
    try:
        # Where nobody is left to reap it, a zombie counts as gone.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def plausible(sample: Sample, nbytes: int) -> bool:
    cpu_s = sample.sender_cpu_s + sample.receiver_cpu_s
    return sample.nbytes == nbytes and 0 < sample.seconds < 30 and cpu_s > 0 and sample.receiver_cpu_s > 0


@pytest.mark.parametrize(("checksum", "connections"), [(False, 1), (True, 1), (False, 3), (True, 3)])
def test_raw_sockets_move_any_number_of_bytes(checksum, connections):
    with RawSockets(3 * MIB + 17, checksum, connections) as pair:
        for nbytes in (1, MIB - 1, MIB, MIB + 1, 3 * MIB + 17):
            assert plausible(pair.run(nbytes), nbytes)
        assert len(pair.pids) == 2
        pids = pair.pids
    assert not any(map(psutil.pid_exists, pids))


def test_raw_sockets_go_through_a_relay():
    address = free_address()
    with Relay(address) as relay, RawSockets(MIB, via=relay.address, address=address) as pair:
        relay.set_rate(0.05)
        assert pair.run(MIB).seconds > 0.15
        assert relay.passed() >= 2 * MIB


@pytest.mark.parametrize(
    ("checksum", "found"), [(True, "checksum of the piece at 0"), (False, "other bytes than were sent in the MiB at 0")]
)
def test_a_flipped_byte_is_found(checksum, found):
    address = free_address()
    with Relay(address) as relay, RawSockets(MIB, checksum, via=relay.address, address=address) as pair:
        relay.flip_byte_after(5000)
        with pytest.raises(ChildFailed, match=found):
            pair.run(MIB)


@settings(max_examples=50, deadline=None)
@given(nbytes=st.integers(1, 3 * MIB), run=st.integers(1, 1000), at=st.integers(0, 3 * MIB), other=st.integers(1, 1000))
def test_bytes_that_are_missing_stale_or_elsewhere_are_seen(nbytes, run, at, other):
    pattern = Pattern()
    seen, stale = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    pattern.write(seen, run)
    pattern.check(seen, nbytes, run)
    pattern.write(stale, run + other)
    at %= nbytes
    if (seen[at : at + 4096] != stale[at : at + 4096]).any():
        seen[at : at + 4096] = stale[at : at + 4096]
        with pytest.raises(ValueError, match="other bytes"):
            pattern.check(seen, nbytes, run)
    with pytest.raises(ValueError, match="bytes came"):
        pattern.check(seen[1:], nbytes, run)


def test_jax_transfer_moves_the_bytes():
    with JaxTransfer(2 * MIB + 5) as pair:
        for nbytes in (1, MIB, 2 * MIB + 5):
            assert plausible(pair.run(nbytes), nbytes)


@pytest.mark.parametrize("transport", [Mooncake, Nixl])
@pytest.mark.parametrize("write", [True, False])
def test_what_others_made_moves_the_bytes_where_it_is_installed(transport, write):
    try:
        with transport(2 * MIB + 5, write=write, python=PEERS) as pair:
            for nbytes in (1, MIB, 2 * MIB + 5):
                assert plausible(pair.run(nbytes), nbytes)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("transport", "module"), [(Mooncake, "mooncake/engine.py"), (Nixl, "nixl/_api.py")])
def test_a_package_that_does_not_work_here_is_reported_with_its_reason(transport, module, tmp_path):
    path = tmp_path / module
    path.parent.mkdir()
    (path.parent / "__init__.py").touch()
    path.write_text("raise ImportError('libibverbs.so.1: cannot open shared object file')")
    with (
        pytest.raises(Unavailable, match=r"ImportError: libibverbs\.so\.1: cannot open"),
        transport(MIB, env={"PYTHONPATH": str(tmp_path)}),
    ):
        pass


def test_processes_that_poll_are_frozen_between_transfers():
    with Polling(MIB) as pair:
        for _ in range(2):
            assert plausible(pair.run(MIB), MIB)
            wait_until(lambda: all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in pair.pids))
        pids = pair.pids
    assert not any(map(psutil.pid_exists, pids))


def test_frozen_processes_end_with_their_parent_however_it_ends():
    code = (
        "from prfaas_jax.testing.transfer_baselines import RawSockets\n"
        "RawSockets.polls = True\n"
        "with RawSockets(1 << 20) as pair:\n"
        "    print(*pair.pids, flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(runs, pids)))


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_dies_is_an_error_at_once(which):
    with RawSockets(MIB) as pair:
        os.kill(pair.pids[which], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(ChildFailed, match="raw"):
            pair.run(MIB)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("nbytes", lambda: RawSockets(0)),
        ("connections", lambda: RawSockets(1, connections=0)),
        ("address", lambda: RawSockets(1, address="here")),
        ("address", lambda: JaxTransfer(1, address="here:")),
        ("address", lambda: Pair("raw", 1, ":80")),
    ],
)
def test_bad_arguments_are_named_before_anything_starts(field, make):
    with pytest.raises(InvalidInput, match=f"^{field}="):
        make()


def test_more_than_the_buffers_hold_is_refused():
    with RawSockets(100) as pair:
        for nbytes in (0, 101):
            with pytest.raises(InvalidInput, match=f"nbytes={nbytes}"):
                pair.run(nbytes)

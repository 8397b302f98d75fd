"""Sender and receiver processes that are killed, frozen, orphaned or spoken to out of turn; every one is real."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transfer_fixtures import SPEC, Cache, Movers, Sink, wait_until, wide_spec

from prfaas_jax.errors import Exhausted, TransferError
from prfaas_jax.transfer.receivers import Receivers

WIDE, LENGTH = wide_spec(2), 512  # 4 MiB


def test_killed_sender_process_fails_its_tickets_and_is_replaced():
    with Movers(WIDE) as movers:
        cache, sink = Cache(WIDE, LENGTH), Sink(WIDE, LENGTH)
        ticket = movers.send(cache, cache.keys(64)[:-1], finish=False)
        pull = movers.pull(ticket, WIDE, LENGTH, sink)
        wait_until(lambda: sink.blocks > 2)
        before = movers.outbox.pids
        os.kill(before[0], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(TransferError):
            pull.finish(WIDE.bytes(LENGTH))
        assert time.monotonic() - started < 2
        with pytest.raises(TransferError, match="sender process 0 ended"):
            movers.outbox.finish(ticket)
        movers.outbox.release(ticket.id, ticket.epoch)
        # With the one that is left, and then with both again.
        one = movers.send(cache, cache.keys(64))
        assert set(movers.outbox.shares(one).result(5)) == {1}
        movers.fetch(one, cache)
        wait_until(lambda: len(movers.outbox.pids) == 2, 20)
        assert before[0] not in movers.outbox.pids
        both = movers.send(cache, cache.keys(64))
        assert set(movers.outbox.shares(both).result(5)) == {0, 1}
        movers.fetch(both, cache)
        wait_until(lambda: movers.regions_taken() == 0)


def test_killed_receiver_process_fails_its_transfers_and_is_replaced():
    with Movers(WIDE, senders=1, receivers=1) as movers:
        cache, sink = Cache(WIDE, LENGTH), Sink(WIDE, LENGTH)
        ticket = movers.send(cache, cache.keys(64)[:-1], finish=False)
        pull = movers.pull(ticket, WIDE, LENGTH, sink)
        wait_until(lambda: sink.blocks > 2)
        os.kill(movers.receivers.pids[0], signal.SIGKILL)
        with pytest.raises(TransferError, match="receiver process 0 ended"):
            pull.finish(WIDE.bytes(LENGTH))
        assert not any(group.alive for group in pull.groups)
        wait_until(lambda: len(movers.receivers.pids) == 1, 20)
        movers.outbox.put(ticket, cache.segment(cache.keys(64)[-1]))
        movers.outbox.finish(ticket)
        movers.fetch(ticket, cache)


def test_transfer_goes_on_with_what_a_killed_receiver_process_had_handed_on():
    """Resume over a new process: blocks that are here are not sent again."""
    with Movers(WIDE, senders=1, receivers=1) as movers:
        cache, sink = Cache(WIDE, LENGTH), Sink(WIDE, LENGTH)
        ticket = movers.send(cache, cache.keys(64)[:-1], finish=False)
        pull = movers.pull(ticket, WIDE, LENGTH, sink)
        wait_until(lambda: sink.blocks == len(cache.keys(64)) - 1)
        os.kill(movers.receivers.pids[0], signal.SIGKILL)
        wait_until(lambda: not pull.groups[0].alive)
        wait_until(lambda: len(movers.receivers.pids) == 1, 20)
        movers.outbox.put(ticket, cache.segment(cache.keys(64)[-1]))
        movers.outbox.finish(ticket)
        (address,) = movers.outbox.shares(ticket).result(5).values()
        pull.puller.start(ticket.id, ticket.epoch, [movers.receivers.connect(address, probe=False)])
        assert pull.finish(WIDE.bytes(LENGTH)).resent == 0
        sink.check(cache)


def test_nothing_can_be_opened_while_no_process_is_up():
    with Movers(SPEC, senders=1, receivers=1) as movers:
        for pid in (*movers.outbox.pids, *movers.receivers.pids):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not movers.outbox.pids and not movers.receivers.pids)
        with pytest.raises(Exhausted, match="no sender process is up"):
            movers.outbox.open(8)
        with pytest.raises(TransferError, match="no receiver process is up"):
            movers.receivers.connect("127.0.0.1:9")
        assert movers.outbox.bytes_held == 0


def test_frozen_sender_process_is_an_idle_peer():
    with Movers(WIDE, senders=1, receivers=0) as movers:
        cache, sink = Cache(WIDE, LENGTH), Sink(WIDE, LENGTH)
        ticket = movers.send(cache, cache.keys(64)[:-1], finish=False)
        pull = movers.pull(ticket, WIDE, LENGTH, sink, idle_s=1.0)
        wait_until(lambda: sink.blocks > 2)
        os.kill(movers.outbox.pids[0], signal.SIGSTOP)
        try:
            movers.outbox.finish(ticket)  # nothing here waits for it
            movers.outbox.release(ticket.id, ticket.epoch)
            with pytest.raises(TransferError, match="no progress for"):
                pull.finish(WIDE.bytes(LENGTH))
        finally:
            os.kill(movers.outbox.pids[0], signal.SIGCONT)


@pytest.mark.parametrize("whose", ["sender", "receiver"])
def test_frozen_process_is_ended_and_replaced(whose):
    with Movers(WIDE, capacity=4 * WIDE.bytes(LENGTH)) as movers:
        crew = movers.outbox if whose == "sender" else movers.receivers
        frozen, other = crew.pids
        os.kill(frozen, signal.SIGSTOP)
        wait_until(lambda: len(crew.pids) == 2 and frozen not in crew.pids, 20)
        assert other in crew.pids
        cache = Cache(WIDE, LENGTH)
        movers.fetch(movers.send(cache, cache.keys(64)), cache)


def test_memory_that_a_frozen_sender_process_may_still_read_is_bounded():
    with Movers(WIDE, senders=1, receivers=0, capacity=2 * WIDE.bytes(LENGTH)) as movers:
        cache = Cache(WIDE, LENGTH)
        os.kill(movers.outbox.pids[0], signal.SIGSTOP)
        with pytest.raises(Exhausted, match="a sender process may still read"):
            for _ in range(8):
                ticket = movers.send(cache, cache.keys(64))
                movers.outbox.release(ticket.id, ticket.epoch)
        assert movers.outbox.bytes_held == 0


def test_put_into_a_ticket_that_ends_meanwhile_is_a_transfer_error(monkeypatch):
    """Anything else would fail the engine's whole step."""
    with Movers(WIDE, senders=1, receivers=0) as movers:
        cache = Cache(WIDE, LENGTH)
        ticket = movers.outbox.open(LENGTH)
        copyto = np.copyto

        def late(*arguments):
            movers.outbox.release(ticket.id, ticket.epoch)
            copyto(*arguments)

        monkeypatch.setattr(np, "copyto", late)
        with pytest.raises(TransferError, match="unknown"):
            movers.outbox.put(ticket, cache.segment(cache.keys(64)[0]))
        monkeypatch.undo()
        wait_until(lambda: movers.regions_taken() == 0)


def test_words_about_a_group_that_is_closed_do_not_end_the_process():
    with Movers(SPEC, senders=1, receivers=1) as movers:
        before = movers.receivers.pids
        group = movers.receivers.connect(movers.outbox.addresses[0], probe=False)
        assert group.warm()
        group.close()
        for message in (
            {"do": "grant", "ticket": "00" * 16, "granted": 1},
            {"do": "release", "ticket": "00" * 16},
            {"do": "warm", "timeout_s": 1.0},
            {"do": "close"},
            {"do": "close"},
        ):
            group._tell(message)
        cache = Cache(SPEC, 24)
        movers.fetch(movers.send(cache, cache.keys(8)), cache)
        assert movers.receivers.pids == before


def test_processes_that_cannot_start_leave_nothing_behind(monkeypatch):
    before = psutil.Process().num_fds(), threading.active_count()
    monkeypatch.setattr("prfaas_jax.transfer.receivers._MODULE", "prfaas_jax.no_such_module")
    for _ in range(3):
        with pytest.raises(TransferError, match="receiver process 0 did not start"):
            Receivers(2).start()
    gc.collect()
    wait_until(lambda: psutil.Process().num_fds() <= before[0] and threading.active_count() <= before[1])


def test_processes_end_with_a_server_that_is_killed(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(
        textwrap.dedent("""
            import sys, time
            sys.path.insert(0, sys.argv[1])
            from transfer_fixtures import Movers, SPEC
            with Movers(SPEC) as movers:
                print(*movers.outbox.pids, *movers.receivers.pids, flush=True)
                time.sleep(60)
        """)
    )
    server = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True)
    children = [psutil.Process(int(pid)) for pid in server.stdout.readline().split()]
    assert len(children) == 4
    server.kill()
    server.wait(10)
    server.stdout.close()
    wait_until(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children), 10)


def test_no_thread_descriptor_or_process_is_left():
    with Movers(SPEC, senders=1, receivers=1):
        pass
    gc.collect()
    before = threading.active_count(), psutil.Process().num_fds(), len(psutil.Process().children())
    with Movers(SPEC) as movers:
        cache = Cache(SPEC, 24)
        movers.fetch(movers.send(cache, cache.keys(8)), cache)
    gc.collect()
    assert (threading.active_count(), psutil.Process().num_fds(), len(psutil.Process().children())) == before

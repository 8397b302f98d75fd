"""Admission, aborts, failures and the end of an engine: whatever happens, everything comes back and every callback is called once."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
from engine_harness import (
    TIMEOUT_S,
    Done,
    Recorder,
    assert_like_oracle,
    assert_same,
    committed,
    decode_worker,
    eventually,
    job,
    prefill,
    prefill_worker,
    run_local,
)

from prfaas_jax.engine.api import Admitted, Committed, Failed, Finished, Job, PrefillDone, PrefillProgress, SamplingParams, Token
from prfaas_jax.engine.decode import DecodeWorker
from prfaas_jax.engine.runner import Runner
from prfaas_jax.errors import EngineFailed, Exhausted, InvalidInput
from prfaas_jax.kvcache.segments import SegmentKey

FIRST = Token(7, 0.0)


def block(tokens: tuple[int, int], tensor: int = 0, heads: int = 4) -> tuple[SegmentKey, np.ndarray]:
    """A block of zeros for the toy model."""
    return SegmentKey(0, tensor, (0, 4), tokens, (0, heads)), np.zeros((4, tokens[1] - tokens[0], heads, 16), np.float32)


def admit(worker: DecodeWorker, j: Job) -> Recorder:
    sink = Recorder()
    worker.reserve(j, sink)
    sink.wait(Admitted)
    return sink


class Gate:
    """Holds an engine before every call of one of its runner's methods until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runner: Runner, method: str):
        self.calls = 0
        self._open = threading.Event()
        run = getattr(runner, method)

        def held(*args: object) -> object:
            self.calls += 1
            assert self._open.wait(TIMEOUT_S)
            return run(*args)

        monkeypatch.setattr(runner, method, held)

    def open(self) -> None:
        self._open.set()


# --- admission ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "new", "field"),
    [
        ((), 4, "prompt"),
        ((1, 512), 4, "prompt token id"),
        ((-1,), 4, "prompt token id"),
        ((1,) * 641, 4, "prompt length"),
        ((1,) * 640, 1, "prompt length \\+ max_new_tokens"),
    ],
)
def test_what_can_never_run_is_refused_at_once(runner: Runner, prompt: tuple[int, ...], new: int, field: str) -> None:
    """640 tokens is what the pool holds, although max_length is 1024."""
    with decode_worker(runner) as worker, pytest.raises(InvalidInput, match=field):
        worker.reserve(Job("a", prompt, SamplingParams(max_new_tokens=new)), Recorder())


@pytest.mark.parametrize("prompt", [(), (512,), (1,) * 641])
def test_prefill_refuses_what_can_never_run(sender: Runner, prompt: tuple[int, ...]) -> None:
    with prefill_worker(sender) as worker, pytest.raises(InvalidInput, match="prompt"):
        worker.submit(Job("a", prompt, SamplingParams()), Recorder())


def test_full_queue_is_exhausted_and_places_come_back(runner: Runner, sender: Runner) -> None:
    with decode_worker(runner, start=False, max_queue=2) as worker:
        worker.reserve(job("a", 10), Recorder())
        worker.reserve(job("b", 10), Recorder())
        with pytest.raises(Exhausted, match="max_queue=2"):
            worker.reserve(job("c", 10), Recorder())
        worker.start()
        eventually(lambda: worker.status().waiting == 0)
        worker.reserve(job("c", 10), late := Recorder())
        late.wait(Admitted)
        for ticket in "abc":
            worker.abort(ticket)
    with prefill_worker(sender, start=False, max_queue=1) as prefills:
        prefills.submit(job("a", 10), first := Recorder())
        with pytest.raises(Exhausted, match="max_queue=1"):
            prefills.submit(job("b", 10), Recorder())
        prefills.start()
        first.wait(PrefillDone)


def test_pages_are_waited_for_in_order_of_arrival(runner: Runner) -> None:
    """The small one fits at once, but the large one came first."""
    with decode_worker(runner) as worker:
        running = admit(worker, job("first", 470, new=10))  # 30 of 40 pages
        worker.reserve(job("large", 300, new=4), large := Recorder())  # 19 pages
        worker.reserve(job("small", 20, new=4), small := Recorder())  # 2 pages
        eventually(lambda: worker.status().waiting == 2)
        worker.prefill_local("first")
        assert running.end() == Finished("length")
        large.wait(Admitted)
        small.wait(Admitted)
        for ticket, sink in (("large", large), ("small", small)):
            worker.prefill_local(ticket)
            assert sink.end() == Finished("length")


def test_a_waiting_request_is_admitted_when_the_last_running_one_ends(runner: Runner) -> None:
    """No command comes in between: the round in which pages return must admit by itself, or the request sleeps for ever."""
    with decode_worker(runner) as worker:
        running = admit(worker, job("running", 470, new=20))
        waiting = Recorder()
        worker.prefill_local("running")
        running.wait(Committed)
        worker.reserve(job("waiting", 300), waiting)
        running.end()
        waiting.wait(Admitted)
        worker.abort("waiting")


def test_more_ready_requests_than_rows_all_run(runner: Runner) -> None:
    """Nine are ready for eight rows that all end in the same step."""
    with decode_worker(runner, max_queue=16) as worker:
        sinks = run_local(worker, *(job(f"j{i}", 20, new=6, seed=i) for i in range(9)))
        assert all(len(s.tokens) == 6 for s in sinks)


def test_a_ticket_in_use_is_refused_and_its_owner_lives(runner: Runner, sender: Runner) -> None:
    with decode_worker(runner) as worker:
        owner = admit(worker, job("same", 20))
        worker.reserve(job("same", 30), second := Recorder())
        error = second.end()
        assert isinstance(error, Failed) and "ticket" in str(error.error)
        worker.prefill_local("same")
        assert owner.end() == Finished("length")
    with prefill_worker(sender, start=False) as prefills:
        prefills.submit(job("same", 200), first := Recorder())
        prefills.submit(job("same", 20), second := Recorder())
        prefills.start()
        assert isinstance(second.end(), Failed)
        first.wait(PrefillDone)


# --- aborts, phase by phase --------------------------------------------------------------------------------------------------


def test_abort_while_waiting(runner: Runner) -> None:
    with decode_worker(runner) as worker:
        admit(worker, job("holder", 600))
        worker.reserve(job("waiting", 600), waiting := Recorder())
        worker.abort("waiting")
        assert waiting.end() == Finished("cancelled") and not waiting.of(Admitted)
        worker.abort("holder", "gone")


def test_abort_while_reserved_reports_its_reason(runner: Runner) -> None:
    with decode_worker(runner) as worker:
        sink = admit(worker, job("a", 600))
        worker.abort("a", "peer left")
        assert sink.end() == Finished("peer left")
        worker.abort("a")
        worker.abort("unknown")
        run_local(worker, job("b", 600, new=2))
    assert sink.events == [Admitted(), Finished("peer left")]


def test_abort_while_prefilling_stops_within_a_chunk(runner: Runner) -> None:
    with decode_worker(runner) as worker:
        sink = Recorder(lambda e: worker.abort("a") if isinstance(e, PrefillProgress) else None)
        worker.reserve(job("a", 600), sink)
        sink.wait(Admitted)
        worker.prefill_local("a")
        assert sink.end() == Finished("cancelled")
        assert sink.of(PrefillProgress)[-1].tokens <= 128 and not sink.of(Token)
        (next_one,) = run_local(worker, job("b", 600, new=2))
        assert_like_oracle(runner, job("b", 600, new=2), next_one)


def test_cancel_of_a_prefill_stops_within_a_chunk(sender: Runner) -> None:
    with prefill_worker(sender) as worker:
        sink = Recorder(lambda e: worker.cancel("a") if isinstance(e, PrefillProgress) else None)
        worker.submit(job("a", 600), sink)
        assert sink.end() == Finished("cancelled")
        assert sink.of(PrefillProgress)[-1].tokens <= 128
        worker.cancel("a")


def test_abort_while_receiving_returns_every_block(runner: Runner) -> None:
    with decode_worker(runner, start=False, ingest_bytes_per_step=1) as worker:
        sink, releases = Recorder(), [Done() for _ in range(4)]
        worker.reserve(job("a", 128), sink)
        worker._drain(wait=False)  # the commands run here: the engine is not started
        worker._admit()
        for i, done in enumerate(releases):
            worker.ingest("a", *block((64 * (i % 2), 64 * (i % 2) + 64), i // 2), done)
        worker.abort("a")
        worker.start()
        assert sink.end() == Finished("cancelled")
        eventually(lambda: all(d.calls for d in releases))
    assert [d.calls for d in releases] == [1] * 4


def test_ingest_after_abort_is_dropped(runner: Runner) -> None:
    with decode_worker(runner) as worker:
        admit(worker, job("a", 64))
        worker.abort("a")
        worker.ingest("a", *block((0, 64)), done := Done())
        worker.commit("a", FIRST)
        eventually(lambda: done.calls == 1)
        run_local(worker, job("b", 64, new=2))
    assert done.calls == 1


def test_abort_while_ready_and_while_running(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, runner, "decode")
    with decode_worker(runner, max_queue=16) as worker:
        sinks = {f"j{i}": admit(worker, job(f"j{i}", 20, new=8)) for i in range(9)}
        for ticket, sink in sinks.items():
            worker.commit(ticket, FIRST)
            if ticket == "j0":
                sink.wait(Committed)
        eventually(lambda: gate.calls == 1)  # held in the first step, of j0 alone
        gate.open()
        eventually(lambda: sum(map(committed, sinks.values())) >= 8)
        monkeypatch.undo()
        for ticket in sinks:
            worker.abort(ticket)
        assert all(isinstance(s.end(), Finished) for s in sinks.values())


def test_abort_of_the_ninth_of_eight_rows(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, runner, "decode")
    with decode_worker(runner, start=False, max_queue=16) as worker:
        sinks = [Recorder() for _ in range(9)]
        for i, sink in enumerate(sinks):
            worker.reserve(job(f"j{i}", 20, new=8), sink)
        worker._drain(wait=False)
        worker._admit()
        for i in range(9):
            worker.commit(f"j{i}", FIRST)
        worker.start()
        eventually(lambda: gate.calls == 1)
        assert [committed(s) for s in sinks] == [True] * 8 + [False]
        worker.abort("j8")
        worker.abort("j3")
        gate.open()
        assert sinks[8].end() == Finished("cancelled") and not sinks[8].tokens
        assert sinks[3].end() == Finished("cancelled") and len(sinks[3].tokens) == 2
        assert all(s.end() == Finished("length") for i, s in enumerate(sinks) if i not in (3, 8))


# --- ingest and commit -------------------------------------------------------------------------------------------------------


def test_commit_waits_for_every_block(runner: Runner, sender: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another decodes, one scatter is dispatched per step; the new request may not run before its last one."""
    j = job("late", 200, new=4)
    with prefill_worker(sender) as prefills:
        blocks, done = prefill(prefills, j)
    scatters, ingest = [], runner.ingest
    monkeypatch.setattr(runner, "ingest", lambda *args: (scatters.append(args), ingest(*args))[1])
    with decode_worker(runner, ingest_bytes_per_step=1) as worker:
        (expected,) = run_local(worker, j)
        other = admit(worker, job("other", 20, new=300))
        worker.prefill_local("other")
        other.wait(Committed)
        at_commit: list[tuple[int, int]] = []
        sink = Recorder(lambda e: at_commit.append((len(scatters), len(other.tokens))) if isinstance(e, Committed) else None)
        worker.reserve(j, sink)
        sink.wait(Admitted)
        began = len(other.tokens)
        for key, data in blocks:
            worker.ingest("late", key, data, Done())
        worker.commit("late", done.first)
        sink.end()
        other.end()
        rows = sum(block.shape[0] * block.shape[1] for _, block in blocks)
        assert at_commit[0][0] == len(scatters) >= rows // runner.ingest_sizes(0)[-1]
        assert at_commit[0][1] - began >= len(scatters) - 2  # the other one went on decoding between the scatters
    assert_same(expected, sink)


@pytest.mark.parametrize(
    ("tokens", "tensor", "heads", "field"), [((0, 64), 2, 4, "tensor"), ((0, 64), 0, 2, "block shape"), ((1000, 1064), 0, 4, "tokens")]
)
def test_misshapen_block_is_refused(runner: Runner, tokens: tuple[int, int], tensor: int, heads: int, field: str) -> None:
    with decode_worker(runner) as worker:
        sink = admit(worker, job("a", 64))
        with pytest.raises(InvalidInput, match=field):
            worker.ingest("a", *block(tokens, tensor, heads), Done())
        worker.abort("a")
        sink.end()


def test_block_beyond_the_prompt_fails_its_request_only(runner: Runner) -> None:
    """It would be scattered into pages that the request does not have."""
    with decode_worker(runner) as worker:
        good, bad, done = admit(worker, job("good", 20)), admit(worker, job("bad", 20)), Done()
        worker.ingest("bad", *block((64, 128)), done)
        error = bad.end()
        assert isinstance(error, Failed) and "segment.tokens" in str(error.error)
        worker.prefill_local("good")
        assert good.end() == Finished("length")
    assert done.calls == 1


def test_a_step_out_of_order_fails_its_request_only(runner: Runner) -> None:
    with decode_worker(runner, start=False) as worker:
        worker.reserve(job("a", 20), sink := Recorder())
        worker._drain(wait=False)
        worker._admit()
        worker.prefill_local("a")
        worker.commit("a", FIRST)
        worker.start()
        error = sink.end()
        assert isinstance(error, Failed) and "phase" in str(error.error)
        run_local(worker, job("b", 20, new=2))


# --- failures and the end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["decode", "prefill", "ingest"])
def test_a_failing_step_fails_its_requests_and_the_next_one_is_right(
    runner: Runner, sender: Runner, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The step fails after its pools were donated: they must be made anew. A block of 30 tokens is one piece, the one that fails."""
    with prefill_worker(sender) as prefills:
        blocks, done = prefill(prefills, job("a", 30))
    run = getattr(runner, method)

    def broken(*args: object) -> None:
        pools = runner.pools
        run(*args)
        runner.pools = pools  # donated, so gone
        raise RuntimeError("device lost")

    release = Done()
    with decode_worker(runner) as worker:
        monkeypatch.setattr(runner, method, broken)
        reserved, sink = admit(worker, job("reserved", 30)), admit(worker, job("a", 30))
        if method == "prefill":
            worker.prefill_local("a")
        else:
            for key, data in blocks:
                worker.ingest("a", key, data, release)
            worker.commit("a", done.first)
        for s in (sink, reserved):
            error = s.end()
            assert isinstance(error, Failed) and isinstance(error.error, EngineFailed) and "device lost" in str(error.error)
        monkeypatch.undo()
        (after,) = run_local(worker, job("b", 100))
        assert_like_oracle(runner, job("b", 100), after)
        assert release.calls == (0 if method == "prefill" else len(blocks))


def test_a_failing_prefill_step_leaves_a_working_prefill_engine(sender: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("device lost")

    with prefill_worker(sender) as worker:
        expected, _ = prefill(worker, job("a", 100))
        monkeypatch.setattr(sender, "prefill", broken)
        worker.submit(job("b", 100), sink := Recorder())
        assert isinstance(sink.end(), Failed)
        monkeypatch.undo()
        again, _ = prefill(worker, job("a", 100))
    for (_, a), (_, b) in zip(expected, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_close_fails_outstanding_jobs_and_ends_the_thread(runner: Runner, sender: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, releases = Gate(monkeypatch, runner, "decode"), [Done(), Done()]
    worker = DecodeWorker(runner)
    worker.start()
    sinks = {t: admit(worker, job(t, 64)) for t in ("reserved", "receiving", "running")}
    worker.commit("running", FIRST)
    eventually(lambda: gate.calls == 1)
    for tensor, done in enumerate(releases):
        worker.ingest("receiving", *block((0, 64), tensor), done)
    threading.Timer(0.05, gate.open).start()
    worker.close()
    worker.close()
    for sink in sinks.values():
        error = sink.end()
        assert isinstance(error, Failed) and "closed" in str(error.error)
    assert [d.calls for d in releases] == [1, 1]
    calls: list[Callable[[], None]] = [
        lambda: worker.reserve(job("late", 5), Recorder()),
        lambda: worker.ingest("receiving", *block((0, 64)), Done()),
        lambda: worker.commit("receiving", FIRST),
    ]
    for call in calls:
        with pytest.raises(EngineFailed, match="closed"):
            call()
    worker.abort("running")
    with prefill_worker(sender, start=False) as prefills:
        prefills.submit(job("a", 600), sink := Recorder(lambda e: prefills._closing.set() if isinstance(e, PrefillProgress) else None))
        prefills.start()
        assert isinstance(sink.end(), Failed)
    names = {t.name for t in threading.enumerate()}
    assert not names & {"decode-engine", "prefill-engine"}


def test_a_command_posted_while_closing_is_run_or_refused(runner: Runner) -> None:
    """Never taken and forgotten: its sender would wait for ever."""
    for _ in range(20):
        worker = DecodeWorker(runner)
        worker.start()
        accepted: list[Recorder] = []
        start = threading.Barrier(2)

        def post(worker: DecodeWorker = worker, accepted: list[Recorder] = accepted, start: threading.Barrier = start) -> None:
            start.wait()
            for i in range(8):
                sink = Recorder()
                try:
                    worker.reserve(job(f"j{i}", 5), sink)
                except EngineFailed:
                    return
                accepted.append(sink)

        poster = threading.Thread(target=post)
        poster.start()
        start.wait()
        worker.close()
        poster.join(TIMEOUT_S)
        for sink in accepted:
            assert isinstance(sink.end(), Failed)

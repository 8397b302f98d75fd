"""What comes out of the engines: exact against a dense oracle, equal on every path, blind to companions."""

import dataclasses

import numpy as np
import pytest
from engine_harness import (
    CHUNK,
    LENGTHS,
    SMALL,
    Recorder,
    assert_like_oracle,
    assert_same,
    decode_worker,
    job,
    make_runner,
    prefill,
    prefill_worker,
    run_local,
    run_remote,
)

from prfaas_jax.engine.api import Admitted, Committed, Finished, PrefillDone, PrefillProgress, Token
from prfaas_jax.engine.runner import Runner


@pytest.mark.smoke
@pytest.mark.parametrize("length", LENGTHS)
def test_local_and_remote_prefill_give_the_same_bits_and_the_oracles_logits(runner: Runner, sender: Runner, length: int) -> None:
    j = job("a", length)
    with decode_worker(runner) as decodes, prefill_worker(sender) as prefills:
        (local,) = run_local(decodes, j)
        (remote,) = run_remote(prefills, decodes, j)
        assert decodes.status().local_prefills == 1
    assert_same(local, remote)
    assert_like_oracle(runner, j, local)
    kinds = [type(e) for e in local.events if not isinstance(e, PrefillProgress)]
    assert kinds == [Admitted, PrefillDone, Committed, *[Token] * 6, Finished]


def test_segments_cover_the_cache_once(sender: Runner) -> None:
    length = 2 * CHUNK + 7
    with prefill_worker(sender) as prefills:
        blocks, _ = prefill(prefills, job("a", length))
    assert sum(b.nbytes for _, b in blocks) == sender.spec.bytes(length)
    covered = np.zeros((2, sender.config.num_layers, length), int)
    for key, _ in blocks:
        covered[key.tensor, slice(*key.layers), slice(*key.tokens)] += 1
    assert (covered == 1).all()


def test_page_size_changes_no_bit(runner: Runner, sender: Runner) -> None:
    other = make_runner(dataclasses.replace(SMALL, page_size=64, pages=12))
    jobs = [job(f"j{n}", n, new=4) for n in (17, 64, 3 * CHUNK + 5)]
    with decode_worker(runner) as small, decode_worker(other) as large, prefill_worker(sender) as prefills:
        for j in jobs:
            (a,), (b,), (c,) = run_local(small, j), run_local(large, j), run_remote(prefills, large, j)
            assert_same(a, b)
            assert_same(a, c)


def test_meshes_of_the_two_sides_may_differ(runner: Runner, sender: Runner) -> None:
    wide = make_runner(dataclasses.replace(SMALL, mesh="data:2,model:2"))
    with decode_worker(runner) as one, decode_worker(wide) as four, prefill_worker(sender) as from_one:
        jobs = [job(f"j{n}", n, new=4) for n in (1, 17, 65, 3 * CHUNK + 5)]
        expected = [run_local(one, j)[0] for j in jobs]
        for got in (run_local(four, *jobs), run_remote(from_one, four, *jobs)):
            for a, b in zip(expected, got, strict=True):
                assert_same(a, b, tolerance=1e-4)
    with decode_worker(runner) as one, prefill_worker(wide) as from_four:
        for a, b in zip(expected, run_remote(from_four, one, *jobs), strict=True):
            assert_same(a, b, tolerance=1e-4)


def test_companions_change_nothing(runner: Runner, sender: Runner) -> None:
    """Bit by bit where prefill ran in the same bucket; within tolerance where its rows were shared."""
    jobs = [job(f"j{i}", n, new=8, seed=i, temperature=t, top_p=0.9) for i, (n, t) in enumerate([(5, 0), (63, 1), (65, 0.7), (130, 0)])]
    with decode_worker(runner) as decodes, prefill_worker(sender) as prefills:
        alone = [run_remote(prefills, decodes, j)[0] for j in jobs]
        for a, b in zip(alone, run_remote(prefills, decodes, *jobs), strict=True):
            assert_same(a, b)
        for a, b in zip(alone, run_local(decodes, *jobs), strict=True):
            assert_same(a, b, tolerance=1e-4)


def test_rows_join_and_leave_while_others_run(runner: Runner) -> None:
    jobs = [job(f"j{i}", 10 + i, new=2 + 3 * i, seed=i) for i in range(12)]
    with decode_worker(runner, max_queue=16) as worker:
        for j, sink in zip(jobs, run_local(worker, *jobs), strict=True):
            assert len(sink.tokens) == j.sampling.max_new_tokens
            assert_like_oracle(runner, j, sink)


def test_stop_token_ends_with_itself(runner: Runner) -> None:
    with decode_worker(runner) as worker:
        (free,) = run_local(worker, job("free", 40, new=8, temperature=1.0))
        drawn = [t.token for t in free.tokens]
        stop = next(t for i, t in enumerate(drawn) if i > 2 and t not in drawn[:i])
        (stopped,) = run_local(worker, job("stopped", 40, new=8, temperature=1.0, stop_token_ids=(stop,)))
        assert [t.token for t in stopped.tokens] == drawn[: drawn.index(stop) + 1]
        assert stopped.events[-1] == Finished("stop")
        (at_once,) = run_local(worker, job("at once", 40, new=8, temperature=1.0, stop_token_ids=(drawn[0],)))
        assert [t.token for t in at_once.tokens] == drawn[:1]


@pytest.mark.parametrize("length", [1, 64, 600])
def test_one_new_token_needs_no_decode_step(runner: Runner, length: int) -> None:
    with decode_worker(runner) as worker:
        (sink,) = run_local(worker, job("a", length, new=1))
        assert sink.events[-1] == Finished("length") and len(sink.tokens) == 1
        assert worker.status().tokens_decoded == 0


def test_logprob_is_that_of_the_logits(runner: Runner) -> None:
    with decode_worker(runner) as worker:
        (sink,) = run_local(worker, job("a", 30, new=6, temperature=1.5, top_k=50))
    for token in sink.tokens:
        shifted = token.logits - token.logits.max()
        assert token.logprob == pytest.approx(shifted[token.token] - np.log(np.exp(shifted).sum()), abs=1e-5)


def test_a_short_prompt_beside_a_long_one_waits_two_steps_at_most(sender: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, run = [], sender.prefill
    monkeypatch.setattr(sender, "prefill", lambda plan, *more: (steps.append(plan), run(plan, *more))[1])
    at_done: list[int] = []
    long = Recorder()
    short = Recorder(lambda e: at_done.append(len(steps)) if isinstance(e, PrefillDone) else None)
    with prefill_worker(sender, start=False) as worker:
        worker.submit(job("long", 600), long)
        worker.submit(job("short", 10), short)
        worker.start()
        long.wait(PrefillDone)
    assert at_done and at_done[0] <= 3  # its own step, one before it, one dispatched behind it
    assert len(steps) == 10 or len(steps) == 11

"""Models of several cache kinds through both engines: what leaves is what stays, and it decodes like a local prefill, bit by bit."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from engine_harness import (
    CHUNK,
    SMALL,
    Done,
    Recorder,
    assert_like_oracle,
    assert_same,
    decode_worker,
    eventually,
    job,
    make_runner,
    prefill,
    prefill_worker,
    prompt,
    run_local,
    run_remote,
)

from prfaas_jax.engine.api import Admitted, Committed, Failed, Finished, PrefillDone, PrefillProgress, SamplingParams, SegmentReady, Token
from prfaas_jax.engine.plan import PrefillInput, plan_prefill
from prfaas_jax.engine.runner import Leaving, Runner
from prfaas_jax.engine.steps import Drawn
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.transfer.coverage import Coverage

# Windows of 24 beside full layers; gated delta states beside attention. Compiling the others takes minutes.
TOYS = ("mimo_toy", "gated_delta_toy")
SLOW_TOYS = ("kimi_linear_toy", "deepseek_toy", "lightning_toy", "gemma3_toy", "qwen3_next_toy", "qwen3_moe_toy")
# Shorter than the window, on its edges, around a chunk, several chunks.
LENGTHS = (1, 23, 24, 25, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


@pytest.fixture(scope="module", params=[*TOYS, *(pytest.param(toy, marks=pytest.mark.slow) for toy in SLOW_TOYS)])
def hybrid(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """A warm Runner of each toy, for prefill and decode alike."""
    if request.param == "gated_delta_toy":
        yield request.getfixturevalue("states")
    else:
        yield make_runner(dataclasses.replace(SMALL, checkpoint=f"random:{request.param}"))


def test_local_and_remote_prefill_give_the_same_bits_and_the_oracles_logits(hybrid: Runner) -> None:
    jobs = [job(f"j{n}", n, new=4, seed=n) for n in LENGTHS]
    with decode_worker(hybrid, max_queue=16) as decodes, prefill_worker(hybrid) as prefills:
        for j in jobs:
            (local,), (remote,) = run_local(decodes, j), run_remote(prefills, decodes, j)
            assert_same(local, remote)
            assert_like_oracle(hybrid, j, local, tolerance=1e-3)


def test_nothing_compiles_after_warm_up(hybrid: Runner) -> None:
    assert hybrid._warm_count is not None
    hybrid._warm_count += hybrid.compiles_after_warmup()  # oracles of other tests compile too: count from here
    jobs = [job(f"j{i}", n, new=1 + i, seed=i, temperature=0.5 * (i % 2)) for i, n in enumerate((3, 64, 100, 250, 65, 24))]
    with decode_worker(hybrid, max_queue=16) as decodes, prefill_worker(hybrid) as prefills:
        run_local(decodes, *jobs)
        for j in jobs:  # one by one: both workers are over one Runner
            run_remote(prefills, decodes, j)
        assert decodes.status().compiles_after_warmup == 0


def test_what_stays_leaves_layer_by_layer_within_a_chunk(hybrid: Runner) -> None:
    """Tokens with every chunk, states with the last one, each with its own layer."""
    sink, length = Recorder(), 2 * CHUNK + 5
    with prefill_worker(hybrid) as prefills:
        prefills.submit(job("a", length), sink)
        sink.wait(PrefillDone)
    events = sink.of(SegmentReady, PrefillProgress)
    ends = [i for i, event in enumerate(events) if isinstance(event, PrefillProgress)]
    assert len(ends) == 3
    for start, stop in zip([0, *(i + 1 for i in ends)], ends, strict=False):
        keys = [event.segment.key for event in events[start:stop]]
        depth = [hybrid.spec.groups[key.group].layers[key.layers[0]] for key in keys]
        assert depth == sorted(depth)
    everywhere = {i for key in keys for i in hybrid.spec.groups[key.group].layers[slice(*key.layers)]}
    assert everywhere == set(range(hybrid.config.num_layers)), "the last chunk has something of every layer"
    assert len(set(depth)) == len(hybrid.steps.pieces)


def run_chunk(runner: Runner) -> tuple[Drawn, tuple[Leaving, ...]]:
    """One chunk of one prompt through the first pages and the first slot; everything leaves."""
    pages = np.arange(1, 5, dtype=np.int32)
    plan = plan_prefill([PrefillInput(0, prompt(CHUNK), 0, CHUNK, pages, SamplingParams(), 1, 1)], 1, CHUNK, runner.geometry.width)
    kinds = {group.cache.kind for group in runner.spec.groups}
    return runner.prefill(plan, [(kind, "none") for kind in kinds])


def test_what_a_part_exports_needs_no_other_part(states: Runner) -> None:
    """A part that read another one's arrays would wait for layers that are still to run."""
    _, parts = run_chunk(states)
    assert len(parts) == 8, "three layers of states and one of attention, twice"
    for number in range(8):
        jax.block_until_ready([part.arrays for part in parts])
        assert all(part.ready for part in parts)
        for array in [array for i, part in enumerate(parts) for array in jax.tree.leaves(part.arrays) if i != number]:
            array.delete()
        keys = [segment.key for segment in states.export(parts[number], 0, 0, CHUNK, job("a", CHUNK))]
        assert {states.spec.groups[key.group].layers[slice(*key.layers)] for key in keys} == {(number,)}
        _, parts = run_chunk(states)


def test_a_step_in_parts_adds_draws_and_writes_what_one_program_does(hybrid: Runner) -> None:
    """Bit by bit, but for the decays of lightning attention, which one program computes otherwise."""
    tolerance = 1e-4 if hybrid.config.name == "lightning_toy" else 0
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance)
    hybrid.reset_pools()
    drawn, parts = run_chunk(hybrid)
    written = [np.array(pool) for pools in hybrid.pools for pool in pools]
    pieces, hybrid.steps.pieces = hybrid.steps.pieces, ()
    try:
        hybrid.reset_pools()
        whole_drawn, (whole,) = run_chunk(hybrid)
    finally:
        hybrid.steps.pieces = pieces
    assert len(parts) == len(pieces) > 1
    same(drawn.logits, whole_drawn.logits)
    for (g, name), tensors in whole.arrays.items():
        for t, expected in enumerate(tensors):
            same(np.concatenate([part.arrays[g, name][t] for part in parts if part.layers[g]]), expected)
        assert [i for part in parts for i in part.layers[g]] == list(whole.layers[g])
    for got, expected in zip(written, (pool for pools in hybrid.pools for pool in pools), strict=True):
        same(got, np.array(expected))


def test_segments_are_what_stays_each_once(hybrid: Runner) -> None:
    """Windows in pieces of the last chunks, states with the last one; the bytes are those of the spec."""
    spec = hybrid.spec
    with prefill_worker(hybrid) as prefills:
        for length in LENGTHS:
            blocks, _ = prefill(prefills, job("a", length))
            coverage = Coverage(spec, length)
            for key, _ in blocks:
                key.check(spec, length)
                coverage.claim(key)
            assert coverage.gap() is None
            assert sum(block.nbytes for _, block in blocks) == spec.bytes(length)


def test_slots_are_waited_for_and_come_back(states: Runner) -> None:
    """Four slots for nine requests whose pages would all fit: every later one lives in the slot of an earlier one."""
    jobs = [job(f"j{i}", 20 + i, new=3 + i % 3, seed=i) for i in range(9)]
    with decode_worker(states, max_queue=16) as worker:
        total = worker.status().state_slots_total
        assert total == worker.status().state_slots_free == 4
        alone = [run_local(worker, j)[0] for j in jobs]
        sinks = [Recorder() for _ in jobs]
        for j, sink in zip(jobs, sinks, strict=True):
            worker.reserve(j, sink)
        eventually(lambda: sum(bool(s.of(Admitted)) for s in sinks) == total)
        assert worker.status().state_slots_free == 0 and worker.status().waiting == len(jobs) - total
        for j, sink in zip(jobs, sinks, strict=True):
            sink.wait(Admitted)
            worker.prefill_local(j.ticket)
        for sink, expected in zip(sinks, alone, strict=True):
            assert sink.end() == Finished("length")
            assert_same(expected, sink, tolerance=1e-3)  # prompts that share a step


def test_a_slot_of_an_aborted_request_starts_empty_for_the_next(states: Runner) -> None:
    """Class D: a state that is left over would go on in somebody else's recurrence."""
    with decode_worker(states) as decodes, prefill_worker(states) as prefills:
        (expected,) = run_local(decodes, job("a", 70, new=4))
        for i in range(6):
            sink = Recorder()
            decodes.reserve(job(f"gone{i}", 100, new=50, seed=i), sink)
            sink.wait(Admitted)
            decodes.prefill_local(f"gone{i}")
            sink.wait(Committed if i % 2 else Admitted)
            decodes.abort(f"gone{i}")
            sink.end()
            (again,) = run_local(decodes, job("a", 70, new=4)) if i % 3 else run_remote(prefills, decodes, job("a", 70, new=4))
            assert_same(expected, again)


def test_meshes_of_the_two_sides_may_differ(states: Runner) -> None:
    wide = make_runner(dataclasses.replace(states.options, mesh="data:2,model:2"))
    jobs = [job(f"j{n}", n, new=4) for n in (1, 25, 3 * CHUNK + 5)]
    with decode_worker(states) as one, decode_worker(wide) as four, prefill_worker(states) as from_one, prefill_worker(wide) as from_four:
        expected = [run_local(one, j)[0] for j in jobs]
        for got in (run_local(four, *jobs), run_remote(from_one, four, *jobs), run_remote(from_four, one, *jobs)):
            for a, b in zip(expected, got, strict=True):
                assert_same(a, b, tolerance=1e-3)


def test_a_state_of_another_length_fails_its_request_only(states: Runner) -> None:
    """It would be exact for another prompt."""
    group = next(g for g, group in enumerate(states.spec.groups) if group.cache.kind == "state")
    tensor = states.spec.groups[group].cache.tensors[0]
    with decode_worker(states) as worker:
        bad, done = Recorder(), Done()
        worker.reserve(job("bad", 20), bad)
        bad.wait(Admitted)
        key = SegmentKey(group, 0, (0, 1), (18, 19), (0, tensor.heads))
        block = np.zeros(key.shape(states.spec), np.float32)
        with pytest.raises(InvalidInput, match=r"segment\.heads"):
            worker.ingest("bad", dataclasses.replace(key, heads=(0, 99)), block, done)
        worker.ingest("bad", key, block, done)
        error = bad.end()
        assert isinstance(error, Failed) and "segment.tokens" in str(error.error)
        worker.commit("bad", Token(1, 0.0))
    assert done.calls == 1

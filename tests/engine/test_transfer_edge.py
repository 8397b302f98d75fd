"""What leaves an engine and what enters one, beyond the cache as it is: codecs, and prefixes that the receiver holds."""

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from engine_harness import (
    CHUNK,
    SMALL,
    Done,
    Recorder,
    assert_same,
    decode_worker,
    eventually,
    job,
    make_runner,
    prefill,
    prefill_worker,
    run_remote,
)

from prfaas_jax.engine.api import Admitted, PrefillDone, SegmentReady
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.runner import Runner
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import SCALE_BYTES, CacheCodec
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.transfer.coverage import Coverage

ELEMENTS = {"int8": (np.int8, 127.0), "fp8": (ml_dtypes.float8_e4m3fn, 448.0)}
CODECS = [CacheCodec.parse(text) for text in ("paged=int8,window=fp8,state=bf16", "paged=fp8,window=int8", "state=bf16")]
LENGTH = 2 * CHUNK + 9


@pytest.fixture(scope="module", params=["gated_delta_toy", "mimo_toy"])
def coded(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """A warm Runner with programs for every codec: states beside pages, and windows beside pages."""
    yield make_runner(dataclasses.replace(SMALL, checkpoint=f"random:{request.param}", codecs="int8,fp8,bf16"))


def plain(wire: np.ndarray, codec: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, the most that each may be off) of a block as a codec writes it."""
    if codec == "none":
        return wire, np.zeros_like(wire)
    if codec == "bf16":
        values = wire.view(ml_dtypes.bfloat16).astype(np.float32)
        return values, np.abs(values) * 2.0**-8
    dtype, largest = ELEMENTS[codec]
    scale = np.ascontiguousarray(wire[..., -SCALE_BYTES:]).view(ml_dtypes.bfloat16).astype(np.float32)
    elements = wire[..., :-SCALE_BYTES].view(dtype).astype(np.float32)
    # int8: half a step, and what the largest loses to a scale that was rounded down; fp8: three bits of mantissa, or half a smallest step.
    off = np.maximum(0.5, np.abs(elements) * 2.0**-7) if codec == "int8" else np.maximum(np.abs(elements) * 2.0**-4, 2.0**-10)
    assert np.abs(elements).max() <= largest
    return elements * scale, off * scale


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_what_leaves_is_the_cache_within_the_codecs_error(coded: Runner, codec: CacheCodec) -> None:
    asked = job("a", LENGTH)
    with prefill_worker(coded) as prefills:
        exact, done = prefill(prefills, asked)
        written, same = prefill(prefills, dataclasses.replace(asked, codec=codec))
    wire = codec.wire_spec(coded.spec)
    assert sum(block.nbytes for _, block in written) == wire.bytes(LENGTH)
    assert [key for key, _ in written] == [key for key, _ in exact]
    assert done.first.token == same.first.token
    np.testing.assert_array_equal(done.first.logits, same.first.logits)
    for (key, expected), (_, block) in zip(exact, written, strict=True):
        assert block.shape == key.shape(wire)
        values, off = plain(block, codec.of(coded.spec.groups[key.group].cache.kind))
        assert (np.abs(values - expected) <= off * 1.001).all(), key


def in_pool(runner: Runner, key: SegmentKey, held) -> np.ndarray:  # type: ignore[no-untyped-def]
    """What lies in the pools at a key of a request, `[layers, tokens, heads, width]`."""
    group = runner.spec.groups[key.group]
    pool, per_layer = np.array(runner.pools[key.group][key.tensor]), runner.geometry.per_layer(group)
    out = np.zeros(key.shape(runner.spec), np.float32)
    for i, layer in enumerate(range(*key.layers)):
        for j, token in enumerate(range(*key.tokens)):
            if group.cache.kind == "state":
                out[i, j] = pool[:, layer * per_layer + held.slot].reshape(out.shape[2:])
                continue
            paged = group.cache.kind == "paged"
            size = runner.geometry.page_size if paged else group.cache.window
            page = held.pages[token // size] if paged else held.slot
            out[i, j] = pool[:, layer * per_layer + page, token % size]
    return out


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_what_enters_is_decoded_into_the_pools_bit_by_bit(coded: Runner, codec: CacheCodec) -> None:
    asked = dataclasses.replace(job("a", LENGTH), codec=codec)
    with prefill_worker(coded) as prefills, decode_worker(coded) as decodes:
        blocks, done = prefill(prefills, asked)
        sink, releases = Recorder(), [Done() for _ in blocks]
        decodes.reserve(asked, sink)
        assert sink.wait(Admitted) == [Admitted(held_tokens=0)]
        for (key, block), release in zip(blocks, releases, strict=True):
            decodes.ingest("a", key, block, release)
        eventually(lambda: all(release.calls for release in releases))
        held = decodes._requests["a"].held
        for key, block in blocks:
            values, _ = plain(block, codec.of(coded.spec.groups[key.group].cache.kind))
            np.testing.assert_array_equal(in_pool(coded, key, held), values)
        decodes.commit("a", done.first)
        sink.end()
        assert len(sink.tokens) == asked.sampling.max_new_tokens


def test_rows_of_one_step_leave_as_each_asked_and_nothing_compiles(coded: Runner) -> None:
    """Two prompts share every step; one engine serves jobs with and without codecs."""
    assert coded._warm_count is not None
    coded._warm_count += coded.compiles_after_warmup()
    jobs = [dataclasses.replace(job(f"j{i}", LENGTH - i, seed=i), codec=codec) for i, codec in enumerate([CODECS[0], CacheCodec()])]
    with prefill_worker(coded) as prefills, decode_worker(coded) as decodes:
        for length in (3, LENGTH):
            for codec in (CacheCodec(), *CODECS):
                run_remote(prefills, decodes, dataclasses.replace(job("a", length), codec=codec))
        alone = [prefill(prefills, j)[0] for j in jobs]
    with prefill_worker(coded, start=False) as prefills:
        sinks = [Recorder() for _ in jobs]
        for j, sink in zip(jobs, sinks, strict=True):
            prefills.submit(j, sink)
        prefills.start()
        for j, sink, expected in zip(jobs, sinks, alone, strict=True):
            sink.wait(PrefillDone)
            segments = [event.segment for event in sink.of(SegmentReady)]
            wire = j.codec.wire_spec(coded.spec)
            assert all(len(s.payload) == s.key.nbytes(wire) for s in segments)
            assert {s.key for s in segments} == {key for key, _ in expected}
        assert prefills.status().compiles_after_warmup == 0


@pytest.mark.parametrize("held", [1, CHUNK - 1, CHUNK, CHUNK + 30, LENGTH - 1, LENGTH])
def test_what_the_receiver_holds_stays_at_home(coded: Runner, held: int) -> None:
    asked = job("a", LENGTH)
    with prefill_worker(coded) as prefills:
        whole, done = prefill(prefills, asked)
        rest, same = prefill(prefills, dataclasses.replace(asked, held_tokens=held))
    assert done.first.token == same.first.token
    assert sum(block.nbytes for _, block in rest) == coded.spec.bytes(LENGTH, held)
    coverage = Coverage(coded.spec, LENGTH)
    for g, group in enumerate(coded.spec.groups):
        kept = group.cache.kept(LENGTH)[0], group.cache.kept(LENGTH, held)[0]
        for t, tensor in enumerate(group.cache.tensors):
            if kept[0] < kept[1]:
                coverage.claim(SegmentKey(g, t, (0, len(group.layers)), kept, (0, tensor.heads)))
    for key, block in rest:
        coverage.claim(key)
        like = ((k, b) for k, b in whole if k.tokens[1] == key.tokens[1] and dataclasses.replace(k, tokens=key.tokens) == key)
        ((other, expected),) = like
        np.testing.assert_array_equal(block, expected[:, key.tokens[0] - other.tokens[0] :])
    assert coverage.gap() is None


def test_without_a_codec_every_bit_arrives(coded: Runner) -> None:
    """Beside programs for codecs, and whatever other jobs asked for."""
    with prefill_worker(coded) as prefills, decode_worker(coded) as decodes:
        j = job("a", LENGTH)
        (first,) = run_remote(prefills, decodes, j)
        run_remote(prefills, decodes, dataclasses.replace(job("b", LENGTH), codec=CODECS[0]))
        (again,) = run_remote(prefills, decodes, j)
    assert_same(first, again)


def test_jobs_that_an_engine_has_no_programs_for_are_refused(runner: Runner, sender: Runner) -> None:
    with prefill_worker(sender) as prefills, decode_worker(runner) as decodes:
        lossy = dataclasses.replace(job("a", 10), codec=CacheCodec(paged="int8"))
        for refuse in (prefills.submit, decodes.reserve):
            with pytest.raises(InvalidInput, match="codec"):
                refuse(lossy, Recorder())
            for held in (-1, 11):
                with pytest.raises(InvalidInput, match="held_tokens"):
                    refuse(dataclasses.replace(job("a", 10), held_tokens=held), Recorder())
        # The model has no states, so what states would travel as is nothing to it.
        prefill(prefills, dataclasses.replace(job("b", 10), codec=CacheCodec(state="bf16")))


def test_a_block_in_another_form_than_its_jobs_is_named(coded: Runner) -> None:
    with decode_worker(coded) as decodes:
        asked = dataclasses.replace(job("a", 20), codec=CacheCodec(paged="int8"))
        decodes.reserve(asked, sink := Recorder())
        sink.wait(Admitted)
        group = next(g for g, group in enumerate(coded.spec.groups) if group.cache.kind == "paged")
        key = SegmentKey(group, 0, (0, 1), (0, 20), (0, coded.spec.groups[group].cache.tensors[0].heads))
        wire = asked.codec.wire_spec(coded.spec)
        for block in (np.zeros(key.shape(coded.spec), np.float32), np.zeros(key.shape(wire), np.float32)):
            with pytest.raises(InvalidInput, match="block shape"):
                decodes.ingest("a", key, block, Done())
        decodes.ingest("a", key, np.zeros(key.shape(wire), np.uint8), done := Done())
        eventually(lambda: done.calls == 1)
        decodes.abort("a")
        sink.end()


@pytest.mark.parametrize("codecs", ["int4", "int8,", "none", "int8,paged"])
def test_unknown_codecs_are_named(codecs: str) -> None:
    with pytest.raises(InvalidInput, match="codecs"):
        EngineOptions("random:qwen3_toy", codecs=codecs)

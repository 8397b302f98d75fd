"""The two engines without a model against each other: what one makes of a job the other checks byte by byte."""

import dataclasses
import queue

import ml_dtypes
import numpy as np
import pytest

from prfaas_jax.engine.api import Admitted, Failed, Finished, Job, PrefillDone, SamplingParams, SegmentReady
from prfaas_jax.errors import InvalidInput, TransferError
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.kvcache.segments import CARRIER, SegmentKey
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.testing.fake_decode import FakeDecodeEngine, FakeDecodeOptions
from prfaas_jax.testing.profiled import ProfiledPrefillEngine, profiled_block

SPEC = CacheSpec(
    (
        CacheGroup(LayerCache("paged", (TensorSpec("k", 4, 8, "bfloat16"), TensorSpec("v", 4, 8, "bfloat16"))), (0, 2)),
        CacheGroup(LayerCache("window", (TensorSpec("k", 2, 8, "bfloat16"),), 20), (1, 3)),
        CacheGroup(LayerCache("state", (TensorSpec("recurrent", 4, 30, "float32"),)), (4, 5)),
    )
)
CODECS = ("none", "paged=int8,window=fp8,state=bf16", "paged=fp8")


def run(job: Job, held: int) -> tuple[object, int]:
    """The decode engine's last event and the bytes that went over, for a receiver that holds `held` tokens of every prompt."""
    prefill = ProfiledPrefillEngine(SPEC, "model", tokens_per_s=1e6, chunk=16)
    decode = FakeDecodeEngine(SPEC, "model", FakeDecodeOptions(vocab_size=32_000, held_tokens=held))
    decode.start()
    events: queue.Queue = queue.Queue()
    made: queue.Queue = queue.Queue()
    wire, moved = job.codec.wire_spec(SPEC), 0
    try:
        decode.reserve(job, events.put)
        assert events.get(timeout=10) == Admitted(min(held, len(job.prompt)))
        prefill.submit(job, made.put)
        while not isinstance(event := made.get(timeout=10), PrefillDone):
            assert not isinstance(event, Failed), event
            if isinstance(event, SegmentReady):
                key, payload = event.segment.key, event.segment.payload
                assert payload.nbytes == key.nbytes(wire)
                moved += payload.nbytes
                block = np.frombuffer(payload, CARRIER[key.tensor_spec(wire).dtype]).reshape(key.shape(wire))
                decode.ingest(job.ticket, key, block, lambda: None)
        decode.commit(job.ticket, event.first)
        while not isinstance(event := events.get(timeout=10), Finished | Failed):
            pass
        return event, moved
    finally:
        decode.close()
        prefill.close()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("held", [0, 1, 16, 39, 45, 99])
def test_what_is_held_and_what_comes_make_the_cache(codec: str, held: int) -> None:
    asked = Job("a", tuple(range(45)), SamplingParams(max_new_tokens=2), CacheCodec.parse(codec), min(held, 45))
    end, moved = run(asked, held)
    assert end == Finished("length")
    assert moved == asked.codec.wire_spec(SPEC).bytes(45, min(held, 45))


@pytest.mark.parametrize(("sent_from", "held"), [(16, 0), (0, 16)])
def test_a_gap_and_what_is_held_already_are_noticed(sent_from: int, held: int) -> None:
    end, _ = run(Job("a", tuple(range(45)), SamplingParams(max_new_tokens=2), held_tokens=sent_from), held)
    assert isinstance(end, Failed) and isinstance(end.error, TransferError)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_bytes_of_codecs_are_finite_and_do_not_depend_on_how_they_are_cut(codec: str) -> None:
    wire, prompt = CacheCodec.parse(codec).wire_spec(SPEC), tuple(range(45))
    key = SegmentKey(0, 0, (0, 2), (0, 45), (0, 4))
    whole = profiled_block(wire, key, prompt)
    assert whole.shape == (2, 45, 4, 10) and whole.dtype == np.uint8
    part = dataclasses.replace(key, layers=(1, 2), tokens=(7, 30), heads=(1, 2))
    np.testing.assert_array_equal(profiled_block(wire, part, prompt), whole[1:2, 7:30, 1:2])
    scale = np.ascontiguousarray(whole[..., -2:]).view(ml_dtypes.bfloat16).astype(np.float32)
    assert ((scale >= 2.0**-7) & (scale < 2.0**-5)).all()
    assert np.isfinite(whole[..., :-2].view(ml_dtypes.float8_e4m3fn).astype(np.float32)).all()
    assert len(np.unique(whole.reshape(-1, 10), axis=0)) > 0.98 * 2 * 45 * 4


def test_more_held_tokens_than_the_prompt_has_are_refused() -> None:
    engine = ProfiledPrefillEngine(SPEC, "model", tokens_per_s=1e6)
    with pytest.raises(InvalidInput, match="held_tokens"):
        engine.submit(Job("a", (1, 2), SamplingParams(), held_tokens=3), lambda event: None)
    engine.close()

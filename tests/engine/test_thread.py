"""What an engine thread owes its callers when a step, or what mends a failed step, raises."""

import threading

import pytest
from engine_harness import Recorder, job

from prfaas_jax.engine.api import Admitted, Event, Failed, Finished
from prfaas_jax.errors import EngineFailed
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.testing.fake_decode import FakeDecodeEngine, FakeDecodeOptions

SPEC = CacheSpec((CacheGroup(LayerCache("paged", (TensorSpec("k", 1, 4, "bfloat16"),)), (0,)),))


def engine(engine_class=FakeDecodeEngine) -> FakeDecodeEngine:
    made = engine_class(SPEC, "model", FakeDecodeOptions(vocab_size=1000, max_queue=2))
    made.start()
    return made


def test_a_failed_step_leaves_the_count_of_waiting_jobs_right():
    """Jobs that were still in the inbox were counted out twice, and the queue took more than its bound ever after."""
    worker, entered, go_on = engine(), threading.Event(), threading.Event()

    def fail(event: Event) -> None:
        if isinstance(event, Admitted):
            entered.set()
            assert go_on.wait(10)
            raise RuntimeError("a step that fails")

    first, second = Recorder(fail), Recorder()
    worker.reserve(job("first", 5), first)
    assert entered.wait(10)
    worker.reserve(job("second", 5), second)
    go_on.set()
    assert isinstance(first.end(), Failed)
    worker.prefill_local("second")
    assert isinstance(second.end(), Finished)
    assert worker.status().waiting == 0
    worker.close()


def test_an_engine_that_cannot_recover_fails_what_it_has_and_refuses_what_comes():
    """It died in silence: outstanding jobs heard nothing, and new ones went into an inbox that nobody read."""

    class Lost(FakeDecodeEngine):
        def _reset(self) -> None:
            raise MemoryError("no room for new pools")

    def fail(event: Event) -> None:
        if isinstance(event, Admitted):
            raise RuntimeError("a step that fails")

    worker, sink = engine(Lost), Recorder(fail)
    worker.reserve(job("a", 5), sink)
    (failed,) = sink.wait(Failed)
    assert "a step that fails" in str(failed.error)
    worker._thread.join(10)
    for refused in (lambda: worker.reserve(job("b", 5), Recorder()), worker.status):
        with pytest.raises(EngineFailed, match="no room for new pools"):
            refused()
    worker.abort("a")
    worker.close()

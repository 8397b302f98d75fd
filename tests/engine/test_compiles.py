"""After warm-up nothing compiles, whatever the load."""

import numpy as np
import pytest
from engine_harness import Recorder, decode_worker, eventually, job, prefill_worker, run_remote

from prfaas_jax.engine.api import Admitted, Failed, Finished, PrefillDone, Token
from prfaas_jax.engine.runner import Runner
from prfaas_jax.errors import Exhausted


@pytest.mark.smoke
def test_no_compile_event_over_a_mixed_load(runner: Runner, sender: Runner) -> None:
    rng = np.random.default_rng(0)
    assert runner._warm_count is not None
    # Other tests of this process compile too (oracles): count from here.
    runner._warm_count += runner.compiles_after_warmup()
    with decode_worker(runner, max_queue=64) as worker, prefill_worker(sender) as prefills:
        sinks: dict[str, Recorder] = {}
        for i in range(40):
            length, new = int(rng.integers(1, 601)), int(rng.integers(1, 20))
            sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9} if i % 2 else {}
            j = job(f"j{i}", length, new=new, seed=i, return_logits=i % 3 == 0, **sampling)
            if i % 4 == 3:
                eventually(lambda: not worker.status().waiting)
                run_remote(prefills, worker, j)
                continue
            local, ticket = i % 8 != 0, j.ticket

            def on_event(event: object, ticket: str = ticket, local: bool = local) -> None:
                if isinstance(event, Admitted) and local:
                    worker.prefill_local(ticket)
                elif isinstance(event, Admitted) or (isinstance(event, Token) and ticket.endswith("5")):
                    worker.abort(ticket)

            sinks[ticket] = Recorder(on_event)
            try:
                worker.reserve(j, sinks[ticket])
            except Exhausted:
                del sinks[ticket]
        ends = [s.end() for s in sinks.values()]
        assert not [e for e in ends if isinstance(e, Failed)]
        assert {e.reason for e in ends if isinstance(e, Finished)} >= {"length", "cancelled"}
        status = worker.status()
        assert status.compiles_after_warmup == 0
        assert status.tokens_decoded > 50 and status.tokens_prefilled > 1000 and status.local_prefills > 10


def test_the_counter_sees_a_compilation(runner: Runner) -> None:
    import jax

    before = runner.compiles_after_warmup()
    jax.jit(lambda x: x * 3 + runner.shards)(np.float32(1)).block_until_ready()
    assert runner.compiles_after_warmup() > before


def test_prefill_alone_stays_compiled(sender: Runner) -> None:
    assert sender._warm_count is not None
    sender._warm_count += sender.compiles_after_warmup()
    with prefill_worker(sender, max_queue=64) as worker:
        jobs = [job(f"j{i}", n, seed=i, return_logits=bool(i % 2)) for i, n in enumerate([1, 64, 65, 300, 128, 7])]
        sinks = [Recorder() for _ in jobs]
        for j, sink in zip(jobs, sinks, strict=True):
            worker.submit(j, sink)
        for sink in sinks:
            sink.wait(PrefillDone)
        assert worker.status().compiles_after_warmup == 0

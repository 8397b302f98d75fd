"""What does not fit together is said before any weight is loaded; what fits comes up warm."""

import dataclasses

import pytest
from engine_harness import SMALL, Recorder, job, run_local

from configs.models import load_model_config
from prfaas_jax.engine import build
from prfaas_jax.engine.api import PrefillDone
from prfaas_jax.engine.build import build_decode, build_prefill, build_runner
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.runner import Runner
from prfaas_jax.errors import InvalidInput


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mesh": "model:3"}, "mesh"),
        ({"mesh": "rows:2"}, "mesh"),
        ({"mesh": "data:64"}, "mesh"),
        ({"max_length": 5000}, "max_length"),
        ({"paged_attention": "none"}, "paged_attention"),
        ({"checkpoint": "/nowhere"}, "checkpoint"),
        ({"checkpoint": "random:none"}, "model"),
        ({"dtype": "float16"}, "dtype"),
        ({"max_rows": 4}, "decode_rows"),
        ({"mesh": "data:2", "max_prefill_rows": 3}, "prefill_rows"),
    ],
)
def test_what_does_not_fit_is_named_before_weights_are_loaded(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, change: dict, field: str
) -> None:
    """With `runner`, jax is in use and has its four devices."""
    monkeypatch.setattr(build, "load", lambda *args, **kwargs: pytest.fail("weights were loaded first"))
    with pytest.raises(InvalidInput, match=field):
        build_runner(dataclasses.replace(SMALL, **change), load_model_config)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"chunk": 100}, "chunk"),
        ({"page_size": 24}, "page_size"),
        ({"pages": 1}, "pages"),
        ({"max_rows": 0}, "max_rows"),
        ({"attention": "x"}, "attention"),
    ],
)
def test_options_check_themselves(change: dict, field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        dataclasses.replace(SMALL, **change)


def test_pools_default_to_what_all_rows_may_need() -> None:
    options = EngineOptions("random:qwen3_toy", max_length=100, max_rows=8, page_size=16)
    assert options.pages_per_shard(1) == 1 + 8 * 7 and options.pages_per_shard(2) == 1 + 4 * 7


def test_built_engines_run_and_share_a_fingerprint() -> None:
    decodes, loaded = build_decode(SMALL, load_model_config)
    prefills, _ = build_prefill(SMALL, load_model_config)
    try:
        assert decodes.fingerprint == prefills.fingerprint == loaded.fingerprint
        assert decodes.spec.fingerprint() == prefills.spec.fingerprint()
        (sink,) = run_local(decodes, job("a", 70, new=2))
        assert len(sink.tokens) == 2
        prefills.submit(job("a", 70), sink := Recorder())
        sink.wait(PrefillDone)
    finally:
        decodes.close()
        prefills.close()

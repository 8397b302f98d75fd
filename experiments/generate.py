"""Greedy or sampled generation for a batch of prompts, colocated or disaggregated.

    python -m experiments.generate --checkpoint=DIR --prompt_tokens=prompts.json --max_new_tokens=16 --path=disaggregated

--path=colocated runs one engine (on --decode_mesh, with --decode_page_size) in this process. --path=disaggregated starts a prefill
server and a decode server as processes; every prompt's KV crosses gRPC, and the run is INVALID unless every byte did.
The last line is JSON; ttft_s and parts are means over the prompts.
"""

import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
from absl import flags

from prfaas_jax.engine.api import Job, SamplingParams, check_job
from prfaas_jax.engine.inputs import read_prompts
from prfaas_jax.engine.offline import Completion, complete
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "HF directory, .gguf file, our Orbax checkpoint, or random:<config>", required=True)
PROMPTS = flags.DEFINE_string("prompt_tokens", None, "JSON file: list of token-id lists", required=True)
PATH = flags.DEFINE_enum("path", "disaggregated", ["colocated", "disaggregated"], "one engine in this process, or two processes")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 16, "tokens per prompt; generation ends earlier at --stop_token_ids only")
DUMP = flags.DEFINE_string("dump_logits", None, "npz file to write: tokens_{i} [n] and logits_{i} [n, V] float32")
PREFILL_MESH = flags.DEFINE_string("prefill_mesh", "data:1,model:1", "mesh of the prefill server")
DECODE_MESH = flags.DEFINE_string("decode_mesh", "data:1,model:1", "mesh of the decode server")
PREFILL_ATTENTION = flags.DEFINE_enum("prefill_attention", "sharded", ["sharded", "replicated"], "heads over the model axis, or whole")
DECODE_ATTENTION = flags.DEFINE_enum("decode_attention", "sharded", ["sharded", "replicated"], "heads over the model axis, or whole")
PREFILL_PAGE = flags.DEFINE_integer("prefill_page_size", 64, "tokens per page of the prefill server")
DECODE_PAGE = flags.DEFINE_integer("decode_page_size", 16, "tokens per page of the decode server")
CHUNK = flags.DEFINE_integer("prefill_chunk", 256, "prompt tokens per row and prefill step")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "weights, activations and cache; default: the checkpoint's")
KERNEL = flags.DEFINE_string("paged_attention", None, "implementation of decode attention; default: the platform's")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
TOP_K = flags.DEFINE_integer("top_k", 0, "0 keeps every token")
TOP_P = flags.DEFINE_float("top_p", 1.0, "1 keeps every token")
SEED = flags.DEFINE_integer("seed", 0, "sampling seed")
STOP = flags.DEFINE_list("stop_token_ids", [], "token ids that end a generation")
WARMUP = flags.DEFINE_boolean("warmup", True, "compile before the first prompt, so that times hold no compilation")
TIMEOUT_S = flags.DEFINE_float("timeout_s", 600.0, "bound on the whole generation")
WORKDIR = flags.DEFINE_string("workdir", None, "where to keep config, environment, summary and server logs")


def _token_ids(field: str, values: list[str]) -> tuple[int, ...]:
    bad = [value for value in values if not value.strip().isdecimal()]
    if bad:
        raise InvalidInput(field, ",".join(values), "token ids separated by commas, such as 0,2")
    return tuple(int(value) for value in values)


def _sampling() -> SamplingParams:
    return SamplingParams(
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        stop_token_ids=_token_ids("stop_token_ids", STOP.value),
        return_logits=DUMP.value is not None,
    )


def _check(prompts: list[list[int]], sampling: SamplingParams) -> None:
    """Everything that needs no weights, before any process starts."""
    from configs.models import load_model_config
    from prfaas_jax.models.source import read_config
    from prfaas_jax.sharding import MeshSpec, check_divides

    config = read_config(CHECKPOINT.value, DTYPE.value, load_model_config)
    for i, prompt in enumerate(prompts):
        check_job(Job(f"prompt_tokens[{i}]", tuple(prompt), sampling), config.vocab_size, config.max_position)
    for flag, attention in ((PREFILL_MESH, PREFILL_ATTENTION), (DECODE_MESH, DECODE_ATTENTION)):
        mesh = MeshSpec.parse(flag.value, flag.name)
        check_divides(config.axis_sizes(), mesh, attention.value, flag.name)  # type: ignore[arg-type]  # an enum flag
    if DUMP.value and not pathlib.Path(DUMP.value).absolute().parent.is_dir():
        raise InvalidInput("dump_logits", DUMP.value, "a file in a folder that exists")


def _options(role: str, prompts: list[list[int]]) -> EngineOptions:
    prefill = role == "prefill"
    longest = max(map(len, prompts)) + MAX_NEW_TOKENS.value
    page = (PREFILL_PAGE if prefill else DECODE_PAGE).value
    # One size for many prompt lengths, so that compiled programs are found again.
    max_length = -(-longest // 1024) * 1024
    from configs.models import load_model_config
    from prfaas_jax.models.source import read_config

    limit = read_config(CHECKPOINT.value, DTYPE.value, load_model_config).max_position
    return EngineOptions(
        checkpoint=CHECKPOINT.value,
        mesh=(PREFILL_MESH if prefill else DECODE_MESH).value,
        attention=(PREFILL_ATTENTION if prefill else DECODE_ATTENTION).value,  # type: ignore[arg-type]  # an enum flag
        dtype=DTYPE.value,
        page_size=page,
        chunk=CHUNK.value,
        max_length=min(max_length, limit),
        max_rows=8 if len(prompts) <= 8 else 32,
        max_queue=max(64, len(prompts)),
        paged_attention=KERNEL.value,
        warmup=WARMUP.value,
    )


def _colocated(prompts: list[list[int]], sampling: SamplingParams) -> tuple[list[Completion], dict[str, int]]:
    from configs.models import load_model_config
    from prfaas_jax.engine.build import build_decode

    engine, _ = build_decode(_options("decode", prompts), load_model_config)
    try:
        done = complete(engine, prompts, sampling, TIMEOUT_S.value)
    finally:
        engine.close()
    return done, {"kv_bytes_moved": 0, "kv_bytes_expected": 0, "tokens_recomputed": 0}


def _disaggregated(prompts: list[list[int]], sampling: SamplingParams, logs: pathlib.Path) -> tuple[list[Completion], dict[str, int]]:
    from prfaas_jax.serving.pair import Pair

    with Pair(_options("prefill", prompts), _options("decode", prompts), logs) as pair:
        answers = pair.generate(prompts, sampling, TIMEOUT_S.value)
    usages = [usage for _, usage in answers]
    totals = {name: sum(getattr(u, name) for u in usages) for name in ("kv_bytes_moved", "kv_bytes_expected", "tokens_recomputed")}
    return [completion for completion, _ in answers], totals


def main(argv: list[str]) -> None:
    """Flags to one call of either path, its result to files and the headline."""
    del argv
    prompts, sampling = read_prompts(PROMPTS.value), _sampling()
    _check(prompts, sampling)
    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    with tempfile.TemporaryDirectory(prefix="prfaas-") as scratch:
        if PATH.value == "colocated":
            done, totals = _colocated(prompts, sampling)
        else:
            done, totals = _disaggregated(prompts, sampling, workdir.path if workdir else pathlib.Path(scratch))
    if DUMP.value:
        arrays: dict[str, Any] = {f"tokens_{i}": np.asarray(c.tokens, np.int32) for i, c in enumerate(done)}
        arrays |= {f"logits_{i}": c.logits for i, c in enumerate(done)}
        np.savez(DUMP.value, **arrays)
    parts = {name: float(np.mean([c.parts.get(name, 0.0) for c in done])) for name in {p: None for c in done for p in c.parts}}
    result = {"tokens": [c.tokens for c in done], **totals, "ttft_s": float(np.mean([c.ttft_s for c in done])), "parts": parts}
    if workdir:
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_summary(result)
    invalid = totals["kv_bytes_moved"] != totals["kv_bytes_expected"] or totals["tokens_recomputed"] != 0
    if invalid:
        print(f"INVALID: moved and expected bytes differ, or tokens were recomputed: {totals}", file=sys.stderr)
    headline(result)
    if invalid:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)

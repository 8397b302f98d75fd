"""A real model answers two questions: the short prompt is prefilled where it is decoded, the long one in another process across a WAN.

    make demo                  (or: python -m experiments.demo [--model=smollm2] [--workdir=runs/demo])
    make demo MODEL=hybrid     (random weights: KDA and MLA layers through the same path; prompts and answers are token ids)

Fetches SmolLM2-135M-Instruct once, starts prefill server, decode server and router on free loopback ports with a relay of 1 Gbit/s and
20 ms round trip between the clusters, and streams both answers. The last line is JSON; INVALID and exit 1 unless every byte of the long
prompt's KV crossed the link and nothing was computed twice. Leaves requests.csv, timeline.json, timeline.png and the logs in --workdir.
"""

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from absl import flags, logging

from experiments import dataclass_flags
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main
from prfaas_jax.transfer.security import Security

if TYPE_CHECKING:
    from prfaas_jax.serving.proto.generation_pb2 import GenerateRequest, Usage
    from prfaas_jax.testing.cluster import ClusterOptions
    from prfaas_jax.testing.demo import Answer

dataclass_flags.define(Security)
flags.adopt_module_key_flags(dataclass_flags)
MODEL = flags.DEFINE_string("model", "smollm2", "smollm2 (real weights), or hybrid (random ones)")
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "where results and logs go; an earlier demo there is overwritten")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 48, "most tokens per answer", lower_bound=2, upper_bound=256)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 2000, "length of the long prompt", lower_bound=600, upper_bound=2048)
THRESHOLD_TOKENS = flags.DEFINE_integer("threshold_tokens", 512, "longer prompts are prefilled remotely", lower_bound=64)
GBPS = flags.DEFINE_float("gbps", 1.0, "rate of the link between the clusters, Gbit/s", lower_bound=0.001)
RTT_MS = flags.DEFINE_float("rtt_ms", 20.0, "round trip between the clusters, ms", lower_bound=0)

SHORT_QUESTION = "What is the moon? Answer in two sentences."
PREAMBLE = "This is the beginning of Hamlet by William Shakespeare.\n\n"
INSTRUCTION = "What happens in this scene?"
INVALID_EXIT, INTERRUPTED_EXIT = 1, 130


HYBRID = "hybrid_bench"


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model that the demo knows.

    Attributes:
        about: said before anything starts.
        fetch: makes its checkpoint and says where it is.
        has_text: it has a tokenizer; otherwise prompts and answers are token ids.
        prefill_attention: how the prefill mesh of two devices takes its heads.
    """

    about: str
    fetch: Callable[[], str]
    has_text: bool
    prefill_attention: Literal["sharded", "replicated"]


def _fetch_smollm2() -> str:
    from prfaas_jax.models import smollm2

    return str(smollm2.fetch())


# SmolLM2 has 9 query and 3 key-value heads: two devices share its MLP and vocabulary, and each computes the attention whole.
_MODELS = {
    "smollm2": _Model("fetching and converting it, the first time (93 MB to download)", _fetch_smollm2, True, "replicated"),
    "hybrid": _Model(f"{HYBRID} with RANDOM weights (no trained hybrid exists yet)", lambda: f"random:{HYBRID}", False, "sharded"),
}


def main(argv: list[str]) -> None:
    """Fetch, start, ask twice, account."""
    del argv
    if MODEL.value not in _MODELS:
        raise InvalidInput("model", MODEL.value, f"one of {', '.join(_MODELS)}")
    # Two servers on one machine: the CPU, unless something else is asked for. Set before anything imports jax.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # The servers' logs are files; on the terminal checkpoint and plotting libraries would talk between the lines.
    logging.set_verbosity(logging.WARNING)
    begun = time.monotonic()
    workdir = Workdir(WORKDIR.value, overwrite=True)
    try:
        result, broken = _run(workdir, _MODELS[MODEL.value])
    except KeyboardInterrupt:
        print("\ninterrupted: every process has been stopped", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)
    result["seconds"] = round(time.monotonic() - begun, 1)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result["cpu_seconds"] = round(sum(u.ru_utime + u.ru_stime for u in usage), 1)
    workdir.write_summary(result)
    for why in broken:
        print(f"INVALID: {why}", file=sys.stderr)
    headline(result)
    sys.exit(INVALID_EXIT if broken else 0)


def _run(workdir: Workdir, model: _Model) -> tuple[dict[str, Any], list[str]]:
    """The headline, and why the run does not count, if it does not."""
    _step(f"model {MODEL.value}: {model.about}")
    checkpoint = model.fetch()
    from configs.models import load_model_config
    from prfaas_jax.kvcache.spec import cache_spec
    from prfaas_jax.models.source import read_config
    from prfaas_jax.serving.report import usages_table
    from prfaas_jax.serving.timeline import draw
    from prfaas_jax.testing import demo
    from prfaas_jax.testing.cluster import Cluster, LinkTrace
    from prfaas_jax.testing.status_line import StatusLine

    options = _options(checkpoint, model)
    workdir.write_config(options)
    workdir.write_env()
    config = read_config(checkpoint, options.prefill.dtype, load_model_config)
    spec = cache_spec(config)
    _step(f"KV cache of {config.name}: {spec.bytes_per_token:,} bytes per token and {spec.fixed_bytes:,} bytes fixed, in {config.dtype}")
    short_prompt, long_prompt = _prompts(checkpoint, config.vocab_size, model.has_text)

    _step(f"starting prefill server (2 devices), decode server and router; logs in {workdir.path}/")
    starting = Cluster(options, workdir.path)
    with StatusLine(starting.startup) as status, starting as cluster:
        status.end()
        _step(f"router {cluster.address} -> decode {cluster.decode_address} -> {_link()} -> prefill {cluster.control.address}")

        def ask(prompt: _Prompt, waiting: Callable[[], str]) -> demo.Answer:
            print(f"\n> {prompt.shown}\n", flush=True)
            with StatusLine(waiting) as status:

                def show(text: str) -> None:
                    status.end()
                    print(text, end="", flush=True)

                answer = demo.ask(cluster.address, prompt.request, show, security=options.security)
            print(flush=True)
            return answer

        short = ask(short_prompt, lambda: "prefilling")
        with LinkTrace(cluster.lane) as trace:
            long = ask(long_prompt, lambda: f"prefilling remotely, {trace.passed / 1e6:.0f} MB of KV have crossed the link")
        decode, prefill = cluster.decode_status(), cluster.prefill_status()
        _step("stopping all processes")

    usages = {"short": short.usage, "long": long.usage}
    print(f"\n{usages_table(usages)}\n")
    rows = {name: _row(usage) for name, usage in usages.items()}
    workdir.write_requests([{"name": name, **row, **row.pop("parts")} for name, row in ((n, dict(r)) for n, r in rows.items())])
    timeline = workdir.write_json(
        "timeline.json",
        {"requests": [_timeline("short", short), _timeline("long", long) | {"link": [[t - long.arrived_at, n] for t, n in trace.samples]}]},
    )
    draw(timeline, workdir.path / "timeline.png")
    _step(f"timeline in {workdir.path / 'timeline.png'}")
    broken = demo.violations(
        short.usage, long.usage, spec.bytes(long.usage.prompt_tokens), decode.engine.tokens_prefilled, trace.passed
    )
    compiles = decode.engine.compiles_after_warmup + prefill.engine.compiles_after_warmup
    kv = {"kv_bytes_per_token": spec.bytes_per_token, "kv_bytes_fixed": spec.fixed_bytes}
    link = {"link_bytes": trace.passed, "compiles_after_warmup": compiles}
    return {"model": MODEL.value, "weights": "real" if model.has_text else "random", "valid": not broken, **kv, **rows, **link}, broken


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A request, and what the terminal shows of it."""

    shown: str
    request: "GenerateRequest"


def _prompts(checkpoint: str, vocab_size: int, has_text: bool) -> tuple[_Prompt, _Prompt]:
    """The short and the long prompt: questions, or for a model without a tokenizer random ids."""
    from prfaas_jax.testing import demo
    from prfaas_jax.testing.passages import hamlet

    new = MAX_NEW_TOKENS.value
    if not has_text:
        import numpy as np

        rng = np.random.default_rng(0)
        draws = (rng.integers(0, vocab_size, n).tolist() for n in (40, PROMPT_TOKENS.value))
        short, long = (_Prompt(f"[{len(ids)} random token ids]", demo.token_prompt(ids, new)) for ids in draws)
        return short, long
    from prfaas_jax.models.tokenizer import Tokenizer

    question = demo.question_about(PREAMBLE + hamlet(), INSTRUCTION, PROMPT_TOKENS.value, Tokenizer.load(Path(checkpoint)))
    shown = f"[the first {question.count(chr(10)) - 3} lines of Hamlet] {INSTRUCTION}"
    return _Prompt(SHORT_QUESTION, demo.chat(SHORT_QUESTION, new)), _Prompt(shown, demo.chat(question, new))


def _options(checkpoint: str, model: _Model) -> "ClusterOptions":
    """Few buckets, so that little is compiled: 2 programs for the prefill server, 5 for the decode server."""
    from prfaas_jax.engine.options import EngineOptions
    from prfaas_jax.testing.cluster import ClusterOptions

    # On a CPU bfloat16 dots are several times slower than float32.
    shared = EngineOptions(checkpoint, dtype="float32", chunk=256, max_length=2304, max_rows=8, max_prefill_rows=1)
    two_requests = 2 * shared.max_length
    sizes = {"prefill": 64, "decode": 16}
    engines = {role: dataclasses.replace(shared, page_size=size, pages=1 + two_requests // size) for role, size in sizes.items()}
    return ClusterOptions(
        prefill=dataclasses.replace(engines["prefill"], mesh="data:1,model:2", attention=model.prefill_attention),
        decode=engines["decode"],
        threshold_tokens=THRESHOLD_TOKENS.value,
        tokenizer=checkpoint if model.has_text else None,
        gbps=GBPS.value,
        rtt_ms=RTT_MS.value,
        platform=os.environ["JAX_PLATFORMS"],
        security=dataclass_flags.read(Security),
    )


def _row(usage: "Usage") -> dict[str, Any]:
    """What the headline and requests.csv say of a request."""
    from prfaas_jax.serving.report import tokens_per_s, usage_dict

    fields = usage_dict(usage)
    names = ("placement", "reason", "prompt_tokens", "output_tokens", "kv_bytes_moved", "kv_bytes_expected", "tokens_recomputed")
    more = ("fallbacks", "ttft_s", "parts", "itl_p50_s", "itl_p99_s")
    return {name: fields[name] for name in (*names, *more)} | {"tokens_per_s": tokens_per_s(usage)}


def _timeline(name: str, answer: "Answer") -> dict[str, Any]:
    from prfaas_jax.serving.report import usage_dict

    fields = usage_dict(answer.usage)
    kept = {key: fields[key] for key in ("placement", "prompt_tokens", "ttft_s", "spans")}
    return {"name": name, **kept, "route_s": fields["parts"]["route"]}


def _link() -> str:
    return f"[link of {GBPS.value:g} Gbit/s, {RTT_MS.value:g} ms]"


def _step(text: str) -> None:
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    run_main(main)

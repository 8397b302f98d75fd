"""Checks and measures the engine on the accelerator that is here.

    python -m experiments.device_check                       (writes results/<device>/*.json)
    python -m experiments.device_check --models=qwen3_0_6b   (measures only this model)

Each op implementation and device codec against a float64 reference, colocated against exported and ingested KV in float32 and bfloat16,
bytes through pinned host memory, codecs, recurrences and experts by form, prefill tokens/s with MFU and decode tokens/s with the share of
memory bandwidth. On a CPU only ops and the equivalence of toys are run; what is skipped, and why, is in the headline. Exit code 1 when a
check fails.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags, logging

from configs.models import load_model_config
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

WORKDIR = flags.DEFINE_string("workdir", None, "where to write; default: results/<device>")
MODELS = flags.DEFINE_list("models", ["smollm2_135m", "qwen3_0_6b", "qwen3_8b", "hybrid_bench"], "models to measure, in bfloat16")
CONTEXT = flags.DEFINE_integer("context", 2048, "prompt tokens per request when measuring")
BATCH = flags.DEFINE_integer("batch", 32, "decode rows when measuring")

_CHUNK = 256
# Dense, and the caches of every kind: states and latents, windows.
_TOYS = ("qwen3_toy", "kimi_linear_toy", "mimo_toy")
# Between the toys, whose shapes no kernel takes, and the real ones: two layers of a real width.
_SMALL = "qwen3_0_6b"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _equivalence(platform: str) -> list[dict[str, Any]]:
    from prfaas_jax.testing.device_engine import check_equivalence

    chunk = 64 if platform == "cpu" else _CHUNK
    lengths = [1, 17, chunk - 1, chunk + 1, 3 * chunk + 5]
    configs = [load_model_config(name) for name in _TOYS]
    if platform != "cpu":
        small = load_model_config(_SMALL)
        configs.append(dataclasses.replace(small, layers=small.layers[:2]))
    found = []
    for config in configs:
        for dtype in ("float32", "bfloat16"):
            _say(f"equivalence: {config.name} {dtype}")
            found.append(check_equivalence(dataclasses.replace(config, dtype=dtype), lengths, chunk))
    return found


# The experts of a published model that fit a device, at prefill's and decode's numbers of tokens.
_EXPERTS_OF, _EXPERT_TOKENS = "kimi_linear_48b", (1, 8, 32, 512, 2048)


def _forms(platform: str) -> dict[str, Any]:
    """Speed of recurrences and of experts by form."""
    from prfaas_jax.models.layer_config import MoeConfig
    from prfaas_jax.testing import ops_bench

    _say("forms: recurrences and experts")
    recurrences = ops_bench.summary(list(ops_bench.measure((512, 4096), repeats=3)))
    config = load_model_config(_EXPERTS_OF)
    moe = next(layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeConfig))
    names = ("ragged", "grouped", "pallas_gpu") if platform == "gpu" else ("ragged", "grouped")
    experts = ops_bench.experts(moe, config.hidden_size, names, _EXPERT_TOKENS, repeats=5)
    return {"recurrences": recurrences, "experts": {"of": _EXPERTS_OF, "by_tokens": experts}}


def _weights(config: ModelConfig) -> tuple[Any, str]:
    """Parameters in bfloat16 and what they are."""
    from prfaas_jax.models import checkpoint, smollm2
    from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh
    from prfaas_jax.testing.device_engine import random_params

    if config.name == smollm2.NAME:
        try:
            path = smollm2.fetch()
        except smollm2.DownloadError as error:
            logging.warning("random weights of SmolLM2's shape instead: %s", error)
            return random_params(config), "random, as the checkpoint could not be downloaded"
        return checkpoint.load(str(path), Sharder(make_mesh(MeshSpec()), "decode"), config.dtype).params, "SmolLM2-135M-Instruct"
    return random_params(config), "random"


def _engines(device: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """(measurements, what was skipped and why)."""
    from prfaas_jax.engine.targets import chip_of
    from prfaas_jax.testing.device_engine import bench_options, measure, needed_bytes

    if device.platform == "cpu":
        return [], [f"engine {name}: a CPU's rates say nothing about an accelerator" for name in MODELS.value]
    measured, skipped = [], []
    chip = chip_of(device.device_kind)
    if chip is None:
        skipped.append(f"MFU and bandwidth share: peaks of {device.device_kind} are not known (prfaas_jax/engine/targets.py)")
    memory = (device.memory_stats() or {}).get("bytes_limit")
    for name in MODELS.value:
        config = dataclasses.replace(load_model_config(name), dtype="bfloat16")
        needed = needed_bytes(config, bench_options(config, CONTEXT.value, BATCH.value, 512))
        if memory is not None and needed > 0.9 * memory:
            skipped.append(f"engine {name}: needs {needed / 2**30:.1f} GiB of the device's {memory / 2**30:.1f} GiB")
            continue
        _say(f"engine: {name}")
        params, weights = _weights(config)
        measured.append({**measure(config, params, chip, CONTEXT.value, BATCH.value), "weights": weights})
    return measured, skipped


def draw(workdir: Path) -> None:
    """Writes figure.png from forms.json and engine.json: recurrences and experts by form, what engines reach of the device's peaks."""
    import json

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    forms, engines = (json.loads((workdir / name).read_text()) for name in ("forms.json", "engine.json"))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for kind, rates in forms["recurrences"].items():
        for form, style in (("chunkwise", "o-"), ("recurrent", "s:")):
            left.loglog([int(t) for t in rates], [r[f"{form}_tok_s"] for r in rates.values()], style, label=f"{kind} {form}")
        left.set_xticks([int(t) for t in rates], list(rates))
    left.set(title="linear attention", xlabel="tokens", ylabel="tokens/s")
    left.minorticks_off()
    by_tokens = forms["experts"]["by_tokens"]
    for form in next(iter(by_tokens.values())):
        middle.loglog([int(t) for t in by_tokens], [1e3 * r[form]["seconds"] for r in by_tokens.values()], "o-", label=form)
    middle.set(title=f"experts of {forms['experts']['of']}", xlabel="tokens", ylabel="ms per layer")
    shares = [("prefill, of peak flops", "mfu"), ("decode, of peak bandwidth", "bandwidth_share")]
    for shift, (label, key) in enumerate(shares):
        values = [100 * (e[key] or 0) for e in engines["measured"]]
        right.bar([i + 0.4 * shift for i in range(len(values))], values, width=0.4, label=label)
    right.set(title="engines, bfloat16", ylabel="%")
    right.margins(y=0.4)
    names = [e["model"] for e in engines["measured"]]
    right.set_xticks([i + 0.2 for i in range(len(names))], names, rotation=20, fontsize=8)
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
    figure.suptitle(json.loads((workdir / "env.json").read_text())["devices"][0]["kind"])
    figure.savefig(workdir / "figure.png", dpi=120)


def main(argv: list[str]) -> None:
    """All checks, their files and the headline."""
    del argv
    import jax

    from prfaas_jax.engine.build import enable_compile_cache
    from prfaas_jax.testing import device_codecs
    from prfaas_jax.testing.device_ops import check_ops, check_staging

    device = jax.devices()[0]
    name = re.sub(r"[^a-z0-9]+", "_", device.device_kind.lower().removeprefix("nvidia")).strip("_")
    workdir = Workdir(WORKDIR.value or Path("results") / name, overwrite=WORKDIR.value is None)
    enable_compile_cache()
    workdir.write_env()

    _say(f"ops on {device.device_kind}")
    ops, skipped = check_ops(device.platform)
    workdir.write_json("ops.json", {"checks": ops, "skipped": skipped})
    staging = None
    codecs: list[dict[str, Any]] = []
    forms: dict[str, Any] = {}
    if device.platform == "cpu":
        skipped.append("staging: the CPU's memory is host memory")
        skipped.append("speed of codecs: codec_quality is for CPUs")
        skipped.append("speed of forms: bench_engine --ops is for CPUs")
    else:
        forms = _forms(device.platform)
        workdir.write_json("forms.json", forms)
        staging = check_staging(device)
        workdir.write_json("staging.json", staging)
        _say("codecs")
        codecs = device_codecs.measure()
        workdir.write_json("codecs.json", codecs)
    equivalence = _equivalence(device.platform)
    workdir.write_json("equivalence.json", equivalence)
    engines, not_measured = _engines(device)
    skipped += not_measured
    workdir.write_json("engine.json", {"measured": engines, "skipped": not_measured})

    failed = [f"{r['op']} {r['dtype']} {r['shape']}: {r['max_error']}" for r in ops if not r["ok"]]
    failed += [f"equivalence {e['model']} {e['dtype']} {m}" for e in equivalence for m in e["mismatches"]]
    failed += ["staging: bytes differ"] if staging and not staging["ok"] else []
    rates = ("prefill_tok_s", "mfu", "decode_tok_s", "bandwidth_share", "weights")
    summary: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "ops": len(ops),
        "equivalence": {f"{e['model']} {e['dtype']}": {k: e[k] for k in ("max_logit_diff", "bit_equal")} for e in equivalence},
        "staging_bytes_per_s": staging["bytes_per_s"] if staging else None,
        "codecs": codecs,
        **forms,
        "engine": {e["model"]: {k: e[k] for k in rates} for e in engines},
        "failed": failed,
        "skipped": skipped,
    }
    workdir.write_summary(summary)
    headline(summary)
    if forms:
        draw(workdir.path)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)

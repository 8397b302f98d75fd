"""What each codec saves and costs: bytes, time, and what a model predicts from a cache that went through it.

    python -m experiments.codec_quality [--models=smollm2_135m,hybrid_bench] [--tokens=20480] [--workdir=results/codec_quality]

Per window the first --prefix tokens are prefilled, their cache is encoded and decoded, and the --scored tokens that follow run over it,
teacher-forced, beside the same over the exact cache. SmolLM2-135M-Instruct (real weights, fetched once) reads eight chapters of Persuasion;
any other model has random weights and random ids, of which there is no perplexity worth a name. Rates are medians on this machine: device
codecs on all its cores, zstd on one. The last line is JSON; INVALID and exit code 1 when int8 changes SmolLM2's perplexity by 0.5 % or more
(upper end of the 95 % interval), or makes its bytes less than 1.9 times fewer than bfloat16's.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

if TYPE_CHECKING:
    import numpy as np

    from prfaas_jax.models.checkpoint import Loaded
    from prfaas_jax.sharding import Sharder

REAL = "smollm2_135m"
MODELS = flags.DEFINE_list("models", [REAL, "hybrid_bench"], f"{REAL} (real weights), or model configs (random ones)")
TOKENS = flags.DEFINE_integer("tokens", 20480, "tokens scored with real weights", lower_bound=2)
RANDOM_TOKENS = flags.DEFINE_integer("random_tokens", 4096, "tokens scored with random weights", lower_bound=2)
PREFIX = flags.DEFINE_integer("prefix", 512, "tokens whose cache goes through the codec", lower_bound=1)
SCORED = flags.DEFINE_integer("scored", 512, "tokens that follow each prefix", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "seed of random weights and ids")
WORKDIR = flags.DEFINE_string("workdir", None, "where to keep windows, rows, summary and the picture")

_PERPLEXITIES = ("perplexity", "perplexity_change", "low", "high")


def draw(workdir: Path) -> None:
    """Writes figure.png from rows.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in json.loads((workdir / "rows.json").read_text()) if row["encode_gb_s"]]
    names = [f"{row['model']}  {row['codec']}" for row in rows]
    figure, (kl, perplexity, rates, links) = plt.subplots(1, 4, figsize=(15, 0.35 * len(rows) + 1.4), sharey=True, layout="constrained")
    for at, row in enumerate(rows):
        if row["kl"]:
            kl.plot(row["kl"], at, "oC0")
        if row["perplexity"]:
            low, change, high = (100 * row[key] for key in ("low", "perplexity_change", "high"))
            perplexity.errorbar(change, at, xerr=[[change - low], [high - change]], fmt="oC0", capsize=3)
    pairs = (rates, "encode_gb_s", "encode"), (rates, "decode_gb_s", "decode")
    limits = (links, "break_even_gbps", "in sequence"), (links, "break_even_overlapped_gbps", "overlapped")
    for (axis, key, label), marker in zip((*pairs, *limits), "osos", strict=True):
        axis.semilogx([row[key] for row in rows], range(len(rows)), marker, label=label)
        axis.legend(fontsize=8)
    perplexity.axvline(0, color="gray", lw=0.8)
    kl.set(title="divergence (none: exact)", xlabel="mean KL, nats", xscale="log", ylim=(len(rows) - 0.5, -0.5))
    kl.set_yticks(range(len(rows)), names, fontsize=8)
    perplexity.set(title="perplexity, 95 % intervals", xlabel="change, %")
    rates.set(title="rates on this machine", xlabel="GB/s of cache")
    links.set(title="pays on links slower than", xlabel="Gbit/s")
    figure.savefig(workdir / "figure.png", dpi=110)


def _load(model: str, shard: "Sharder") -> tuple["Loaded", "np.ndarray"]:
    """The model, and the ids that it is given."""
    import numpy as np

    from configs.models import load_model_config
    from prfaas_jax.models import checkpoint, smollm2
    from prfaas_jax.models.tokenizer import Tokenizer
    from prfaas_jax.testing.passages import persuasion

    scored = TOKENS.value if model == REAL else RANDOM_TOKENS.value
    count = PREFIX.value + -(-scored // SCORED.value) * SCORED.value + 1
    if model == REAL:
        path = smollm2.fetch()
        ids = np.array(Tokenizer.load(path).encode(persuasion()))
        if len(ids) < count:
            raise InvalidInput("tokens", scored, f"at most {len(ids) - PREFIX.value - 1}, which the text has behind the first prefix")
        return checkpoint.load(path, shard), ids[:count]
    loaded = checkpoint.load(f"random:{model}@{SEED.value}", shard, random_config=load_model_config)
    return loaded, np.random.default_rng(SEED.value).integers(0, loaded.config.vocab_size, count)


def main(argv: list[str]) -> None:
    """Measures each model, judges int8 on the real one."""
    del argv
    logging.set_verbosity(logging.WARNING)
    import jax

    from prfaas_jax.sharding import MeshSpec, Sharder, make_mesh
    from prfaas_jax.testing.codec_report import JUDGED, measure, text_table, violations

    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    shard = Sharder(make_mesh(MeshSpec(), jax.devices()[:1]), "prefill")
    rows: list[dict[str, Any]] = []
    for model in MODELS.value:
        loaded, ids = _load(model, shard)
        table, windows = measure(loaded.config, loaded.params, ids, PREFIX.value, SCORED.value, shard)
        print(text_table(model, table, model == REAL), file=sys.stderr)
        if model != REAL:
            table = [row | dict.fromkeys(_PERPLEXITIES) for row in table]
        rows += [{"model": model, **row} for row in table]
        if workdir:
            workdir.write_rows(f"windows_{model}.csv", [dataclasses.asdict(w) for w in windows])
    broken = [why for row in rows if (row["model"], row["codec"]) == (REAL, JUDGED) for why in violations(row)]
    for why in broken:
        print(f"INVALID: {why}", file=sys.stderr)
    result = {"passed": not broken, "rows": rows}
    if workdir:
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_json("rows.json", rows)
        draw(workdir.path)
        workdir.write_summary(result)
    headline(result)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    run_main(main)

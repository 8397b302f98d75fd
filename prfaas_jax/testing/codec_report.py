"""One table per model: what each codec saves, what it takes, what it costs, and the link that it pays for."""

import dataclasses
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.sharding import Sharder
from prfaas_jax.testing.codec_quality import Quality, WindowQuality, codecs_of, evaluate, run, windows
from prfaas_jax.testing.codec_rates import Measured, device_codec, host_zstd, in_bfloat16_bytes, nbytes

# What int8 must hold on real weights.
JUDGED = "paged=int8"
MAX_PERPLEXITY_CHANGE, MIN_RATIO_BF16 = 0.005, 1.9

Row = dict[str, Any]


def measure(
    config: ModelConfig, params: nnx.State, ids: np.ndarray, prefix: int, scored: int, shard: Sharder
) -> tuple[list[Row], list[WindowQuality]]:
    """(a row per codec, every codec's windows); a progress bar on stderr.

    zstd is exact (`host_zstd` compares every byte), so its quality is that of "none". "zstd of bfloat16" is of the same cache in bfloat16.
    Rates are in GB/s of the cache, break-even link rates in Gbit/s; None for "none", which has nothing to do.

    Args:
        config: the model.
        params: its parameters, placed as `shard` says.
        ids: a text's ids [n].
        prefix: tokens per window whose cache goes through the codec; what is measured about bytes is measured on the first of them.
        scored: tokens per window that follow.
        shard: the mesh.

    Raises InvalidInput for ids that are too few for two windows.
    """
    rows, codecs = windows(ids, prefix, scored), codecs_of(cache_spec(config))
    _, added = run(config, params, rows[:1, :prefix], shard)
    measured = [device_codec(codec, cache_spec(config), added) for codec in codecs] + [host_zstd("zstd", added)]
    if config.dtype != "bfloat16":
        measured.append(host_zstd("zstd of bfloat16", jax.tree.map(lambda x: x.astype(jnp.bfloat16), added)))

    found: dict[str, list[WindowQuality]] = defaultdict(list)
    for window in tqdm(evaluate(config, params, rows, prefix, codecs, shard), desc=config.name, total=len(rows), unit="window"):
        for one in window:
            found[one.codec].append(one)
    exact = Quality.over([w.exact() for w in found[str(codecs[0])]])
    none = {"codec": "none", "ratio": 1.0, "ratio_bf16": in_bfloat16_bytes(added) / nbytes(added)} | dict.fromkeys(_RATES)
    table = [none | dataclasses.asdict(exact)]
    for m in measured:
        quality = exact if m.rate.name not in found else Quality.over(found[m.rate.name])
        table.append(_bytes_and_rates(m) | dataclasses.asdict(quality))
    return table, [w for ws in found.values() for w in ws]


_RATES = ("encode_gb_s", "decode_gb_s", "break_even_gbps", "break_even_overlapped_gbps")


def _bytes_and_rates(m: Measured) -> Row:
    rates = m.rate.encode_bytes_per_s / 1e9, m.rate.decode_bytes_per_s / 1e9
    limits = (m.rate.break_even_bytes_per_s(overlapped) * 8e-9 for overlapped in (False, True))
    return {"codec": m.rate.name, "ratio": m.rate.ratio, "ratio_bf16": m.ratio_bf16} | dict(zip(_RATES, (*rates, *limits), strict=True))


def text_table(model: str, rows: list[Row], perplexities: bool) -> str:
    """For a terminal; perplexities only where they mean something."""
    sizes, rates = f"{'ratio':>6} {'bf16':>6} {'encode':>7} {'decode':>7}", f"{'pays below':>11} {'overlapped':>11}"
    head = f"{model:<24} {sizes} {rates} {'max logit':>10} {'KL':>9} {'top-1':>7}"
    lines = [head + ("  perplexity" if perplexities else "")]
    for row in rows:
        values = [f"{row['codec']:<24} {row['ratio']:>6.2f} {row['ratio_bf16']:>6.2f}"]
        if row["encode_gb_s"] is None:
            values.append(f"{'-':>7} {'-':>7} {'-':>11} {'-':>11}")
        else:
            values.append(f"{row['encode_gb_s']:>7.2f} {row['decode_gb_s']:>7.2f}")
            values.append(f"{row['break_even_gbps']:>6.3g} Gb/s {row['break_even_overlapped_gbps']:>6.3g} Gb/s")
        values.append(f"{row['max_logit_error']:>10.3g} {row['kl']:>9.2g} {100 * row['top1_agreement']:>6.2f}%")
        if perplexities:
            change, low, high = (100 * row[key] for key in ("perplexity_change", "low", "high"))
            values.append(f" {row['perplexity']:.3f} {change:+.3f}% [{low:+.3f}, {high:+.3f}]")
        lines.append(" ".join(values))
    return "\n".join(lines)


def violations(row: dict[str, Any]) -> list[str]:
    """What int8 does not hold on real weights, of its `measure` row; the far end of the interval is judged."""
    found = []
    if max(-row["low"], row["high"]) >= MAX_PERPLEXITY_CHANGE:
        found.append(
            f"{JUDGED} changes perplexity by {row['low']:.3%} to {row['high']:.3%}: less than {MAX_PERPLEXITY_CHANGE:.1%} expected"
        )
    if row["ratio_bf16"] < MIN_RATIO_BF16:
        found.append(f"{JUDGED} makes bfloat16 {row['ratio_bf16']:.3f} times smaller: at least {MIN_RATIO_BF16} expected")
    return found

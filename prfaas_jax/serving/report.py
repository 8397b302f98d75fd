"""A usage for people (a table) and for programs (JSON)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf import json_format

from prfaas_jax.serving.proto import generation_pb2

_COUNTS = ("prompt_tokens", "output_tokens", "fallbacks", "tokens_recomputed")
_BYTES = ("kv_bytes_moved", "kv_bytes_skipped", "kv_bytes_resent", "kv_bytes_expected", "kv_bytes_wire")
PARTS = tuple(field.name for field in generation_pb2.TtftParts.DESCRIPTOR.fields)


def itl_percentiles(usage: generation_pb2.Usage) -> tuple[float, float]:
    """p50 and p99 of the seconds between tokens; nan when there was one token."""
    if not usage.itl_s:
        return float("nan"), float("nan")
    p50, p99 = np.percentile(usage.itl_s, (50, 99))
    return float(p50), float(p99)


def usage_dict(usage: generation_pb2.Usage) -> dict[str, Any]:
    """JSON-ready: every field under its own name, numbers as numbers, plus itl_p50_s and itl_p99_s (None when there was one token)."""
    fields = json_format.MessageToDict(usage, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    # proto JSON writes 64-bit integers as strings
    fields |= {name: getattr(usage, name) for name in (*_COUNTS, *_BYTES)}
    fields["parts"] = {name: getattr(usage.parts, name) for name in PARTS}
    p50, p99 = itl_percentiles(usage) if usage.itl_s else (None, None)
    return fields | {"itl_p50_s": p50, "itl_p99_s": p99}


def usage_table(usage: generation_pb2.Usage) -> str:
    """What was done and why, what it moved, and TTFT as its sum."""
    p50, p99 = itl_percentiles(usage)
    rows = [
        ("placement", f"{usage.placement} {usage.prefill_address}".strip()),
        ("reason", usage.reason),
        ("tokens", f"{usage.prompt_tokens} in, {usage.output_tokens} out ({usage.finish_reason})"),
    ]
    if usage.placement == "remote":
        skipped_resent = f"{usage.kv_bytes_skipped:,} skipped, {usage.kv_bytes_resent:,} sent again"
        rows.append(("KV bytes", f"{usage.kv_bytes_moved:,} moved of {usage.kv_bytes_expected:,}; {skipped_resent}"))
    rows.append(("recomputed", f"{usage.tokens_recomputed} tokens, {usage.fallbacks} fallbacks"))
    rows.append(("TTFT", f"{usage.ttft_s * 1e3:10.1f} ms ="))
    rows += [("", f"{getattr(usage.parts, name) * 1e3:10.1f} ms {name.replace('_', ' ')}") for name in PARTS]
    rows.append(("ITL", f"{p50 * 1e3:.1f} ms p50, {p99 * 1e3:.1f} ms p99" if usage.itl_s else "one token only"))
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def usages_table(usages: Mapping[str, generation_pb2.Usage]) -> str:
    """Several requests side by side, a column each under its name; TTFT as its sum."""
    columns = {name: _column(usage) for name, usage in usages.items()}
    titles = list(next(iter(columns.values()), {}))
    rows = [["", *columns], *([title, *(column[title] for column in columns.values())] for title in titles)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def tokens_per_s(usage: generation_pb2.Usage) -> float | None:
    """Tokens after the first, over the time they took; None when there was one token."""
    return len(usage.itl_s) / sum(usage.itl_s) if usage.itl_s else None


def _column(usage: generation_pb2.Usage) -> dict[str, str]:
    """One request's cells by row title; every request has the same rows."""
    p50, p99 = itl_percentiles(usage)
    rate = tokens_per_s(usage)
    rows = {
        "placement": usage.placement,
        "reason": usage.reason,
        "prompt tokens": f"{usage.prompt_tokens:,}",
        "output tokens": f"{usage.output_tokens:,} ({usage.finish_reason})",
        "KV moved": f"{usage.kv_bytes_moved / 1e6:,.3f} of {usage.kv_bytes_expected / 1e6:,.3f} MB",
        "recomputed": f"{usage.tokens_recomputed} tokens, {usage.fallbacks} fallbacks",
        "TTFT": f"{usage.ttft_s * 1e3:9.1f} ms, the sum of",
    }
    rows |= {f"  {name.replace('_', ' ')}": f"{getattr(usage.parts, name) * 1e3:9.1f} ms" for name in PARTS}
    rows["ITL p50 / p99"] = f"{p50 * 1e3:.1f} / {p99 * 1e3:.1f} ms" if usage.itl_s else "one token only"
    rows["tokens/s"] = f"{rate:.1f}" if rate is not None else "one token only"
    return rows

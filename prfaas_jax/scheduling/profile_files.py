"""Profiles from plain data and from the files that the measuring experiments write; no jax, so a planner needs none.

`instance_from_dict` reads the profile form, which the files under configs/profiles return and which may be stored as JSON:

    {name, model, basis, prefill: {start_s, linear_s, quadratic_s, max_tokens} | {tokens, seconds},
     decode: {base_s, per_request_s, per_kv_token_s} | {batches, seconds} | null, max_batch, kv_memory_gib, nic_gbps, cost_per_hour}

`read_profile` also takes what bench_engine, device_check and compile_for leave behind. An instance is then what that run had: one engine
on its device, or all chips of its target; give `cost_per_hour` for that.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profiles import DecodeTime, FittedDecode, FittedPrefill, Instance, MeasuredDecode, MeasuredPrefill, PrefillTime
from prfaas_jax.scheduling.topology import GBPS

GIB = 2**30

_FIELDS = ("name", "prefill", "model", "basis", "decode", "max_batch", "kv_memory_gib", "nic_gbps", "cost_per_hour")
_REQUIRED = ("name", "prefill")

# What marks each kind of file.
_FORMS = {
    "a profile": "name and prefill",
    "bench_engine's summary.json": "prefill_tok_s and decode_tok_s by size",
    "device_check's engine.json": "measured",
    "device_check's summary.json": "device and engine",
    "compile_for's summary.json": "target, chips, prefill and decode",
}


def instance_from_dict(profile: Mapping[str, Any]) -> Instance:
    """Reads the profile form; absent fields have Instance's defaults, and `model` is for the reader only.

    Raises:
        InvalidInput: unknown or missing fields, values of another type or out of range.
    """
    _mapping("profile", profile)
    _fields("profile", profile, _FIELDS, _REQUIRED)
    name = profile["name"]
    if not isinstance(name, str) or not name:
        raise InvalidInput("profile.name", name, "a name")
    where = f"profile {name}"
    for field in ("model", "basis"):
        if not isinstance(profile.get(field, ""), str):
            raise InvalidInput(f"{where}.{field}", profile[field], "text")
    decode = profile.get("decode")
    memory, nic = (_number(f"{where}.{f}", profile[f]) if profile.get(f) is not None else math.inf for f in ("kv_memory_gib", "nic_gbps"))
    return Instance(
        name,
        _prefill(f"{where}.prefill", profile["prefill"]),
        None if decode is None else _decode(f"{where}.decode", decode),
        _count(f"{where}.max_batch", profile.get("max_batch", 1)),
        memory * GIB,
        nic * GBPS,
        _number(f"{where}.cost_per_hour", profile.get("cost_per_hour", 1.0)),
        profile.get("basis", "fitted"),
    )


def read_profile(path: str | os.PathLike[str], efficiency: float | None = None, model: str | None = None, **changes: Any) -> Instance:
    """An instance from a JSON file, told by its keys: a profile, or what bench_engine, device_check or compile_for wrote.

    Args:
        path: the file.
        efficiency: for compile_for's files, which need it: the share (0, 1] of the roofline that the real steps are taken to reach.
        model: which model of a device_check file with several.
        changes: fields of the profile form that replace what the file says, such as `cost_per_hour=2` or `kv_memory_gib=80`.

    Raises:
        InvalidInput: no such file, not JSON, none of these forms, arguments that its form does not take, values out of range.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput("profile file", str(path), f"a readable JSON file ({error})") from error
    keys = set(found) if isinstance(found, dict) else set()
    if {"target", "chips", "prefill", "decode"} <= keys:
        if efficiency is None:
            raise InvalidInput("efficiency", None, f"a share of the roofline, 0 < efficiency <= 1: {path} was compiled, not run")
        profile = bound_profile(found, efficiency, path.parent)
    else:
        if efficiency is not None:
            raise InvalidInput("efficiency", efficiency, f"none: {path} is no summary of compile_for")
        readers: tuple[tuple[bool, Callable[[], dict[str, Any]]], ...] = (
            ({"prefill_tok_s", "decode_tok_s"} <= keys, lambda: bench_profile(found)),
            ("measured" in keys, lambda: device_profile(found["measured"], model)),
            ({"device", "engine"} <= keys, lambda: device_profile(_summary_rows(found, path.parent), model)),
            ({"name", "prefill"} <= keys, lambda: dict(found)),
        )
        reader = next((read for matches, read in readers if matches), None)
        if reader is None:
            looked = "; ".join(f"{what} with {marks}" for what, marks in _FORMS.items())
            raise InvalidInput("profile file", str(path), f"one of: {looked}; it has {sorted(map(str, keys)) or type(found).__name__}")
        profile = reader()
    if model is not None and profile.get("model") != model:
        raise InvalidInput("model", model, f"{profile.get('model')!r}, which {path} measures")
    return instance_from_dict({**profile, **changes})


def bench_profile(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The profile form of bench_engine's summary.json.

    Prefill: one prompt of each measured length. Decode: a step of each measured batch, every row behind a prompt of 512 tokens, so the
    table knows nothing of longer contexts. `max_batch` is the largest batch that was measured.
    """
    prefill = _by_size("prefill_tok_s", summary["prefill_tok_s"])
    decode = _by_size("decode_tok_s", summary["decode_tok_s"])
    model = str(summary.get("checkpoint", "")).removeprefix("random:")
    return {
        "name": f"bench_engine {model}".strip(),
        "model": model,
        "basis": "measured",
        "prefill": _table("tokens", [(size, size / rate) for size, rate in prefill]),
        "decode": _table("batches", [(size, size / rate) for size, rate in decode]),
        "max_batch": decode[-1][0],
    }


def device_profile(measured: object, model: str | None = None) -> dict[str, Any]:
    """The profile form of one row of device_check's engine.json (its list `measured`).

    It holds one length and one batch: prefill time is taken as proportional to the prompt up to that length, which is where the profile
    ends; a decode step takes the time of the measured batch behind contexts of that length, also where fewer rows decode.
    """
    rows = measured if isinstance(measured, list) else []
    by_model = {row.get("model"): row for row in rows if isinstance(row, dict)}
    if model is None and len(by_model) != 1:
        raise InvalidInput("model", None, f"one of the models that were measured: {sorted(map(str, by_model)) or 'none was'}")
    row = by_model.get(model) if model is not None else next(iter(by_model.values()))
    if row is None:
        raise InvalidInput("model", model, f"one of {sorted(map(str, by_model))}")
    name = row.get("model")
    for field in ("prefill_tok_s", "decode_tok_s"):
        if not 0 < _number(f"engine {name}.{field}", row.get(field)) < math.inf:
            raise InvalidInput(f"engine {name}.{field}", row[field], "finite tokens/s above zero")
    context, batch = (_count(f"engine {name}.{field}", row.get(field)) for field in ("context", "batch"))
    return {
        "name": f"device_check {name}",
        "model": name,
        "basis": "measured",
        "prefill": {"start_s": 0.0, "linear_s": 1e4 / row["prefill_tok_s"], "max_tokens": context},
        "decode": {"batches": [batch], "seconds": [batch / row["decode_tok_s"]]},
        "max_batch": batch,
    }


def bound_profile(summary: Mapping[str, Any], efficiency: float, folder: Path) -> dict[str, Any]:
    """The profile form of compile_for's summary.json: nothing of it was run.

    Seconds are roofline / `efficiency`. compile_for bounds one prefill step, the last chunks of prompts of --context tokens, one for each
    data shard: every token is taken to cost what the step's do, which is on the high side for early ones. A decode step is that of --batch
    rows behind --context tokens each. What the summary does not say of the three sizes is in config.json beside it.
    """
    if not 0 < _number("efficiency", efficiency) <= 1:
        raise InvalidInput("efficiency", efficiency, "a share of the roofline, 0 < efficiency <= 1")
    steps = {name: _mapping(f"compile_for {name}", summary[name]) for name in ("prefill", "decode")}
    seconds = {}
    for name, step in steps.items():
        if "roofline_s" not in step:
            raise InvalidInput(f"compile_for {name}.roofline_s", None, f"a step that fits: {step.get('message', 'it has no roofline')}")
        seconds[name] = _number(f"compile_for {name}.roofline_s", step["roofline_s"]) / efficiency
        if not seconds[name] > 0:
            raise InvalidInput(f"compile_for {name}.roofline_s", step["roofline_s"], "seconds above zero")
    config: Mapping[str, Any] = {}
    if (folder / "config.json").is_file():
        config = _mapping("compile_for config.json", json.loads((folder / "config.json").read_text(encoding="utf-8")))
    prefill, decode = steps["prefill"], steps["decode"]
    tokens = _count("compile_for tokens of a prefill step", prefill.get("tokens", config.get("chunk")))
    batch = _count("compile_for rows of a decode step", decode.get("rows", config.get("batch")))
    context = _count("compile_for context, in config.json beside the summary", config.get("context"))
    return {
        "name": f"{summary['target']} {summary.get('model', '')} at {efficiency:g} of its roofline",
        "model": summary.get("model", ""),
        "basis": "bound",
        "prefill": {"start_s": 0.0, "linear_s": seconds["prefill"] / tokens * 1e4, "max_tokens": context},
        "decode": {"batches": [batch], "seconds": [seconds["decode"]]},
        "max_batch": batch,
    }


def _summary_rows(summary: Mapping[str, Any], folder: Path) -> object:
    """device_check's summary has the rates; context and batch are in engine.json beside it."""
    beside = folder / "engine.json"
    if not beside.is_file():
        raise InvalidInput("profile file", str(folder), "engine.json beside the summary: it has the context and batch of the rates")
    rows = json.loads(beside.read_text(encoding="utf-8")).get("measured", [])
    return [row for row in rows if row.get("model") in summary["engine"]]


def _prefill(where: str, table: object) -> PrefillTime:
    table = _mapping(where, table)
    if "tokens" in table:
        _fields(where, table, ("tokens", "seconds"), ("tokens", "seconds"))
        return MeasuredPrefill(_counts(f"{where}.tokens", table["tokens"]), _numbers(f"{where}.seconds", table["seconds"]))
    _fields(where, table, ("start_s", "linear_s", "quadratic_s", "max_tokens"), ("start_s", "linear_s"))
    times = {f: _number(f"{where}.{f}", table[f]) for f in ("start_s", "linear_s", "quadratic_s") if f in table}
    return FittedPrefill(**times, max_tokens=_count(f"{where}.max_tokens", table.get("max_tokens", 131_072)))


def _decode(where: str, table: object) -> DecodeTime:
    table = _mapping(where, table)
    if "batches" in table:
        _fields(where, table, ("batches", "seconds"), ("batches", "seconds"))
        return MeasuredDecode(_counts(f"{where}.batches", table["batches"]), _numbers(f"{where}.seconds", table["seconds"]))
    _fields(where, table, ("base_s", "per_request_s", "per_kv_token_s"), ("base_s",))
    return FittedDecode(**{f: _number(f"{where}.{f}", value) for f, value in table.items()})


def _by_size(field: str, rates: object) -> list[tuple[int, float]]:
    """(size, tokens/s) by ascending size."""
    found = []
    for size, rate in _mapping(field, rates).items():
        if not str(size).isdecimal() or not _number(f"{field}[{size}]", rate) > 0:
            raise InvalidInput(f"{field}[{size}]", rate, "tokens/s above zero by a whole number")
        found.append((int(size), float(rate)))
    if not found:
        raise InvalidInput(field, rates, "rates of some sizes")
    return sorted(found)


def _table(sizes: str, rows: list[tuple[int, float]]) -> dict[str, Any]:
    return {sizes: [size for size, _ in rows], "seconds": [seconds for _, seconds in rows]}


def _mapping(field: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInput(field, value, "fields by name")
    return value


def _fields(where: str, found: Mapping[str, Any], known: tuple[str, ...], required: tuple[str, ...]) -> None:
    if unknown := sorted(set(map(str, found)) - set(known)):
        raise InvalidInput(where, unknown, f"only the fields {', '.join(known)}")
    if missing := [field for field in required if field not in found]:
        raise InvalidInput(where, sorted(map(str, found)), f"also the fields {', '.join(missing)}")


def _number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(field, value, "a number")
    return float(value)


def _count(field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(field, value, "a whole number >= 1")
    return value


def _list(field: str, value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InvalidInput(field, value, "a list")
    return list(value)


def _numbers(field: str, value: object) -> tuple[float, ...]:
    return tuple(_number(field, v) for v in _list(field, value))


def _counts(field: str, value: object) -> tuple[int, ...]:
    return tuple(_count(field, v) for v in _list(field, value))

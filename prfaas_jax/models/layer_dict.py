"""Layers from the plain mappings of a config file, and back. No jax here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.layer_config import MIXERS, MLPS, Layer, Rope, RopeScaling


def layer_to_dict(layer: Layer) -> dict[str, Any]:
    """JSON-ready form, each part with its kind; `layer_from_dict` reads it back."""
    return {
        "mixer": {"kind": layer.mixer.kind, **dataclasses.asdict(layer.mixer)},
        "mlp": {"kind": layer.mlp.kind, **dataclasses.asdict(layer.mlp)},
        "mixer_scales": list(layer.mixer_scales),
        "mlp_scales": list(layer.mlp_scales),
    }


def layer_from_dict(field: str, fields: Mapping[str, Any]) -> Layer:
    """One entry of a config's "blocks".

    Raises:
        InvalidInput: no mapping, unknown or missing fields, unknown kinds, impossible values; names the entry, starting with `field`.
    """
    _check_mapping(field, fields)
    if unknown := sorted(set(fields) - {f.name for f in dataclasses.fields(Layer)}):
        raise InvalidInput(field, unknown, "only mixer, mlp, mixer_scales and mlp_scales")
    if missing := sorted({"mixer", "mlp"} - set(fields)):
        raise InvalidInput(field, dict(fields), f"also {missing}")
    mixer = _part(f"{field}.mixer", MIXERS, fields["mixer"])
    mlp = _part(f"{field}.mlp", MLPS, fields["mlp"])
    scales = {key: tuple(fields[key]) for key in ("mixer_scales", "mlp_scales") if key in fields}
    for key, pair in scales.items():
        if len(pair) != 2:
            raise InvalidInput(f"{field}.{key}", pair, "two numbers, alpha and beta")
    return Layer(mixer, mlp, **scales)


def rope_scaling_from_dict(field: str, fields: Mapping[str, Any]) -> RopeScaling:
    """A RopeScaling; raises InvalidInput naming `field` for anything but its fields."""
    return _build(field, RopeScaling, fields)


def _part(field: str, known: Mapping[str, type], fields: Mapping[str, Any]) -> Any:
    """One mixer or feed-forward part."""
    _check_mapping(field, fields)
    values = dict(fields)
    cls = known.get(values.pop("kind", None))
    if cls is None:
        raise InvalidInput(f"{field}.kind", fields.get("kind"), f"one of {sorted(known)}")
    if values.get("rope") is not None:
        values["rope"] = _rope(f"{field}.rope", values["rope"])
    return _build(field, cls, values)


def _rope(field: str, fields: Mapping[str, Any]) -> Rope:
    _check_mapping(field, fields)
    values = dict(fields)
    if values.get("scaling") is not None:
        values["scaling"] = rope_scaling_from_dict(f"{field}.scaling", values["scaling"])
    return _build(field, Rope, values)


def _build(field: str, cls: type, fields: Mapping[str, Any]) -> Any:
    """`cls(**fields)` with unknown and missing fields refused by name."""
    _check_mapping(field, fields)
    accepted = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - set(accepted)):
        raise InvalidInput(field, unknown, f"only the fields {sorted(accepted)}")
    if missing := [n for n, f in accepted.items() if f.default is dataclasses.MISSING and n not in fields]:
        raise InvalidInput(field, dict(fields), f"also the fields {missing}")
    return cls(**fields)


def _check_mapping(field: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise InvalidInput(field, value, "a mapping of fields")

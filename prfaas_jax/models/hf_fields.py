"""Reading the fields of a Hugging Face config.json, with errors that name them. No jax."""

from collections.abc import Mapping
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.layer_config import Rope, RopeScaling


class Fields:
    """The fields of a config.json, or of an object in it; a null is as good as absent, and every refusal names the field."""

    def __init__(self, values: Mapping[str, Any], scope: str = ""):
        self._values, self._scope = values, scope

    def get(self, *spellings: str, default: Any = None) -> Any:
        """The first of several spellings of a field that the file has, else `default`."""
        return next((self._values[name] for name in spellings if self._values.get(name) is not None), default)

    def need(self, *spellings: str) -> Any:
        """As `get`, of a field that must be there."""
        value = self.get(*spellings)
        if value is None:
            raise self.refusal(" or ".join(spellings), None, "a value (the field is missing)")
        return value

    def count(self, *spellings: str) -> int:
        """As `need`, of a positive integer."""
        value = self.need(*spellings)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(" or ".join(spellings), value, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number; one that must be there without `default`."""
        value = self.get(name, default=default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refusal(name, value, "a number")
        return float(value)

    def only(self, allowed: Mapping[str, Any]) -> None:
        """Refuses any field that has another value than the one that is computed."""
        for name, value in allowed.items():
            if self.get(name, default=value) != value:
                raise self.refusal(name, self.get(name), f"{value!r} (nothing else is implemented)")

    def per_layer(self, name: str, *kinds: Any) -> list[Any]:
        """A list with one of `kinds` for every layer."""
        listed, layers = self.need(name), self.count("num_hidden_layers")
        if not isinstance(listed, list) or len(listed) != layers:
            raise self.refusal(name, listed, f"a list of {layers} entries, one per layer")
        if other := [kind for kind in listed if kind not in kinds]:
            raise self.refusal(name, sorted({str(kind) for kind in other}), f"only {' and '.join(map(str, kinds))}")
        return listed

    def child(self, name: str) -> "Fields":
        """A nested object, empty when there is none."""
        value = self.get(name, default={})
        if not isinstance(value, Mapping):
            raise self.refusal(name, value, "an object")
        return Fields(value, f"{self._scope}{name}.")

    def refusal(self, name: str, value: Any, expected: str) -> InvalidInput:
        """The error that names a field."""
        return InvalidInput(f"config.json {self._scope}{name}", value, expected)


def read_rope(
    fields: Fields,
    width: int,
    *,
    layer_type: str | None = None,
    theta: str = "rope_theta",
    base: float = 10_000.0,
    scaled: bool = True,
    partial: float | None = None,
) -> Rope:
    """Rotary embedding, from transformers 5 (`rope_parameters`) or older (`rope_theta`, `rope_scaling`) spelling.

    Args:
        fields: config.json.
        width: elements of a head.
        layer_type: entry of `rope_parameters`, where it has one for each type of layer.
        theta: the older spelling's name of the base.
        base: the base when the file has none.
        scaled: whether the older spelling's `rope_scaling` is meant for these layers.
        partial: the part of a head that rotates when the file does not say; None where the class rotates whole heads.
    """
    if fields.get("rope_parameters") is None:
        values = fields.child("rope_scaling") if scaled else Fields({})
    else:
        values = fields.child("rope_parameters")
        if layer_type is not None:
            values.need(layer_type)
            values = values.child(layer_type)
    factor = values.get("partial_rotary_factor", default=fields.get("partial_rotary_factor", default=partial or 1.0))
    if partial is None and factor != 1.0:
        raise values.refusal("partial_rotary_factor", factor, "1.0 (every pair rotates)")
    values.only({"mscale_all_dim": None, "attention_factor": None})
    scaling: RopeScaling | None = None
    match values.get("rope_type", "type", default="default"):
        case "default":
            pass
        case "linear":
            scaling = RopeScaling("linear", values.number("factor"))
        case "llama3":
            original = values.count("original_max_position_embeddings")
            scaling = RopeScaling(
                "llama3", values.number("factor"), values.number("low_freq_factor"), values.number("high_freq_factor"), original
            )
        case kind:
            raise values.refusal("rope_type", kind, "default, linear or llama3")
    dims = int(width * factor)
    return Rope(values.number("rope_theta", fields.number(theta, base)), None if dims == width else dims, scaling)

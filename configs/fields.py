"""Fields of a config as plain data: what is absent has its default, what is wrong is named as it is written on the command line."""

import contextlib
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from prfaas_jax.errors import InvalidInput

T = TypeVar("T")


def fields(where: str, found: object, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`found` over `defaults`; a field has the type of its default (any where that is None), and a number may be whole.

    Raises:
        InvalidInput: a field that is not among the defaults, or of another type.
    """
    if not isinstance(found, Mapping):
        raise InvalidInput(where, found, "fields by name")
    for name in found:
        if name not in defaults:
            raise InvalidInput(f"{where}.{name}", found[name], f"only the fields {', '.join(defaults)}")
    return {name: _typed(f"{where}.{name}", found.get(name, default), default) for name, default in defaults.items()}


def _typed(field: str, value: Any, default: object) -> Any:
    match default:
        case None | inspect.Parameter.empty:
            return value
        case bool():
            right, what = isinstance(value, bool), "true or false"
        case int():
            right, what = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        case float():
            right, what = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        case str():
            right, what = isinstance(value, str), "text"
        case tuple():
            right, what = isinstance(value, tuple | list), "a list"
        case _:
            right, what = isinstance(value, Mapping), "fields by name"
    if not right:
        raise InvalidInput(field, value, what)
    return tuple(value) if isinstance(default, tuple) else value


def _one_of(field: str, value: object, types: tuple[type, ...]) -> None:
    taken = (*types, int) if float in types else types
    if not isinstance(value, taken):
        raise InvalidInput(field, value, " or ".join(t.__name__ for t in types))


def positive(field: str, value: float, or_zero: bool = False) -> float:
    """A finite number above zero, or from it on; raises InvalidInput for others."""
    if not (0 < value < math.inf or (or_zero and value == 0)):
        raise InvalidInput(field, value, "a finite number >= 0" if or_zero else "a finite number above zero")
    return float(value)


def at_least(field: str, value: int, least: int) -> int:
    """A whole number not under `least`; raises InvalidInput for others."""
    if value < least:
        raise InvalidInput(field, value, f"at least {least}")
    return value


@contextlib.contextmanager
def within(where: str, strip: str = "") -> Iterator[None]:
    """Names what is refused inside as a field of `where`, without the prefix `strip`."""
    try:
        yield
    except InvalidInput as error:
        if error.field.startswith("config"):
            raise
        raise InvalidInput(f"{where}.{error.field.removeprefix(strip)}", error.value, error.expected) from error


def options(where: str, cls: Callable[..., T], found: Mapping[str, Any], placed: tuple[str, ...] = (), **more: Any) -> T:
    """An options dataclass of `found` and `more`.

    Raises:
        InvalidInput: a field that the class does not have, that is among those `placed` by whoever starts it, that is of another type than
            its default, or that the class refuses.
    """
    known = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items() if name not in placed}
    hints = typing.get_type_hints(cls)
    for name, value in found.items():
        if name not in known:
            raise InvalidInput(f"{where}.{name}", value, f"only the fields {', '.join(known)}")
        if known[name] is not None:
            _typed(f"{where}.{name}", value, known[name])
        elif value is not None:
            _one_of(f"{where}.{name}", value, typing.get_args(hints[name]))
    with within(where):
        return cls(**found, **more)

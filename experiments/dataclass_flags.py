"""Flags from the options dataclasses of the library: one per field, helped by the field's line in the docstring."""

import dataclasses
import inspect
import re
import typing
from typing import Any, TypeVar

from absl import flags

FLAGS = flags.FLAGS
T = TypeVar("T")

_DEFINE: dict[type, Any] = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def define(cls: type, prefix: str = "") -> None:
    """Defines a flag, its name after `prefix`, for every field of an options dataclass; required ones for fields without a default."""
    hints, helps = typing.get_type_hints(cls), _attribute_docs(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        required = field.default is dataclasses.MISSING
        default: Any = None if required else field.default
        kind = next(k for k in (typing.get_args(hints[field.name]) or (hints[field.name],)) if k is not type(None))
        if typing.get_origin(hints[field.name]) is typing.Literal:
            flags.DEFINE_enum(name, default, typing.get_args(hints[field.name]), helps[field.name])
        else:
            _DEFINE[kind](name, default, helps[field.name])
        if required:
            flags.mark_flag_as_required(name)


def read(cls: type[T], prefix: str = "") -> T:
    """The dataclass as the parsed flags have it; raises InvalidInput as its own checks do."""
    return cls(**{field.name: FLAGS[prefix + field.name].value for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _attribute_docs(cls: type) -> dict[str, str]:
    """Field name -> its text in the "Attributes:" section of the class that has it, or of one that this class derives from."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
        docs |= {name: re.sub(r"\s+", " ", text) for name, text in entries}
    return docs

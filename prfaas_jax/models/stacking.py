"""Tensors of somebody else's file -> this model's stacked arrays, checked before a byte is read."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.params import abstract, flat_names

Shape = tuple[int, ...]
Take = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """What one tensor gives to one parameter.

    Attributes:
        name: the parameter.
        index: where in its leading axes: the repeat of the body, the expert.
        take: selects from the tensor's values, which are then reshaped to the place; None takes all of them.
    """

    name: str
    index: Shape = ()
    take: Take | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor of a file.

    Attributes:
        names: its name; several where files spell it differently, the usual one first.
        parts: what becomes of it.
        shapes: the shapes that it may have; none means that of its only part.
    """

    names: tuple[str, ...]
    parts: tuple[Part, ...]
    shapes: tuple[Shape, ...] = ()


def layer_place(config: ModelConfig, layer: int) -> tuple[str, Shape]:
    """Prefix of the names of a layer's parameters, and its index in their leading axis (params.py), e.g. ("body/1", (5,))."""
    pattern = config.pattern
    if layer < pattern.head:
        return f"head/{layer}", ()
    repeat, position = divmod(layer - pattern.head, pattern.period) if pattern.repeats else (0, 0)
    if repeat < pattern.repeats:
        number, run = next((n, run) for n, run in enumerate(config.body_runs) if position in run)
        return f"body/{number}", (repeat * len(run) + position - run.start,)
    return f"tail/{layer - pattern.head - pattern.body_layers}", ()


def stack(
    config: ModelConfig,
    sources: Sequence[Source],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Reads each tensor once, into preallocated arrays named as in params.py, of the dtypes that they have there.

    Args:
        config: the model that the tensors must fit.
        sources: the tensors that make up its parameters.
        shapes: tensor name -> its shape, for every tensor that the file holds.
        read: tensor name -> its values, in any dtype that numpy can cast.
        progress: show a progress bar on stderr.

    Raises InvalidInput naming the first tensor that is missing, misshapen or unexpected.
    """
    leaves = flat_names(abstract(config)[1])
    _check_complete(sources, {name: leaf.shape for name, leaf in leaves.items()})
    found = {source: next((name for name in source.names if name in shapes), source.names[0]) for source in sources}
    if unexpected := sorted(set(shapes) - set(found.values())):
        raise InvalidInput("checkpoint tensors", unexpected[:4], f"only the tensors of this architecture ({len(sources)} tensors)")
    for source, name in found.items():
        accepted = source.shapes or (leaves[source.parts[0].name].shape[len(source.parts[0].index) :],)
        if name not in shapes:
            raise InvalidInput("checkpoint tensors", f"no {name}", f"a tensor {name} of shape {accepted[0]}")
        if tuple(shapes[name]) not in accepted:
            raise InvalidInput(f"checkpoint tensor {name} shape", tuple(shapes[name]), " or ".join(map(str, accepted)))

    arrays = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    for source, name in tqdm(found.items(), desc="weights", unit="tensor", disable=not progress):
        values = read(name)
        for part in source.parts:
            target = arrays[part.name][part.index]
            target[...] = (values if part.take is None else part.take(values)).reshape(target.shape)
    return arrays


def _check_complete(sources: Sequence[Source], leaves: Mapping[str, Shape]) -> None:
    """Every element of every parameter has exactly one source, so that nothing stays as it was allocated."""
    places = Counter((part.name, part.index) for source in sources for part in source.parts)
    filled: Counter[str] = Counter()
    for (name, index), times in places.items():
        filled[name] += times * math.prod(leaves.get(name, ())[len(index) :])
    if wrong := sorted(n for n in {*leaves, *filled} if n not in leaves or filled[n] != math.prod(leaves[n])):
        raise InvalidInput("checkpoint parameters", wrong[:4], "parameters of this model, each read from exactly one place of the file")

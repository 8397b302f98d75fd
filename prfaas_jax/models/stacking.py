"""Per-layer tensors of somebody else's file -> this model's stacked arrays, checked before a byte is read."""

from collections.abc import Callable, Mapping

import numpy as np
from tqdm import tqdm

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.params import abstract, flat_names

Shape = tuple[int, ...]


def stack(
    config: ModelConfig,
    names: Mapping[str, str],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Copies each source tensor once, into preallocated arrays of `config.dtype` named as in params.py.

    Args:
        config: the model that the tensors must fit.
        names: parameter name -> source tensor name, with "{}" where the layer number stands.
        shapes: source tensor name -> its shape, for every tensor that the file holds.
        read: source tensor name -> its values, in any dtype that numpy can cast.
        progress: show a progress bar on stderr.

    Raises InvalidInput naming the first tensor that is missing, misshapen or unexpected.
    """
    _, state = abstract(config)
    leaves = flat_names(state)
    sources = {name: _sources(config, names[name], leaf.shape) for name, leaf in leaves.items()}
    expected = {source: shape for entries in sources.values() for source, shape in entries}
    if unexpected := sorted(set(shapes) - set(expected)):
        raise InvalidInput("checkpoint tensors", unexpected[:4], f"only the tensors of this architecture ({len(expected)} tensors)")
    for source, shape in expected.items():
        if source not in shapes:
            raise InvalidInput("checkpoint tensors", f"no {source}", f"a tensor {source} of shape {shape}")
        if tuple(shapes[source]) != shape:
            raise InvalidInput(f"checkpoint tensor {source} shape", tuple(shapes[source]), f"{shape}")

    arrays = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    with tqdm(total=len(expected), desc="weights", unit="tensor", disable=not progress) as bar:
        for name, entries in sources.items():
            stacked = "{}" in names[name]
            for layer, (source, _) in enumerate(entries):
                target = arrays[name][layer] if stacked else arrays[name]
                target[...] = read(source)
                bar.update()
    return arrays


def _sources(config: ModelConfig, pattern: str, shape: Shape) -> list[tuple[str, Shape]]:
    """The source tensors, with their shapes, that make up one parameter."""
    if "{}" not in pattern:
        return [(pattern, shape)]
    return [(pattern.format(layer), shape[1:]) for layer in range(config.num_layers)]

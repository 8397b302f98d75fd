"""Parameters as a pytree: abstract shapes, shardings and random initialisation, all derived from the module's declarations."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.transformer import Transformer
from prfaas_jax.sharding import Sharder

# Names are paths joined by "/", e.g. "layers/attention/q_proj/weight"; leaves are stacked over layers.
FlatParams = Mapping[str, np.ndarray | jax.Array]


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph and its parameters as ShapeDtypeStructs; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))), nnx.Param, ...)[:2]
    return graph, state


def flat_names(state: nnx.State) -> dict[str, nnx.Variable]:
    """Leaves by name."""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def shardings(state: nnx.State, shard: Sharder) -> nnx.State:
    """A NamedSharding per parameter, read from its logical axes."""
    return jax.tree.map(lambda p: p.replace(shard(*p.axes)), state, is_leaf=lambda p: isinstance(p, nnx.Variable))


def init_random(config: ModelConfig, seed: int, shard: Sharder) -> nnx.State:
    """Random parameters, created directly on the mesh (no host copy, no unsharded copy)."""
    _, state = abstract(config)
    # On CPU, unrolled threefry costs LLVM's higher levels three to six times the compile time and gains nothing at run time.
    options = {"xla_backend_optimization_level": 1} if shard.mesh.devices.flat[0].platform == "cpu" else None
    place = shardings(state, shard)
    create = jax.jit(lambda: nnx.state(Transformer(config, nnx.Rngs(seed)), nnx.Param), out_shardings=place, compiler_options=options)
    return create()


def check_flat(config: ModelConfig, arrays: FlatParams) -> None:
    """Raises InvalidInput naming the first tensor that is missing, unknown or misshapen for this model."""
    expected = flat_names(abstract(config)[1])
    if unknown := sorted(set(arrays) - set(expected)):
        raise InvalidInput("checkpoint tensors", unknown, f"only the tensors of {config.name}")
    for name, leaf in expected.items():
        if name not in arrays:
            raise InvalidInput("checkpoint tensors", f"no {name}", f"a tensor {name} of shape {leaf.shape}")
        if arrays[name].shape != leaf.shape:
            raise InvalidInput(f"checkpoint tensor {name} shape", arrays[name].shape, f"{leaf.shape}")


def from_placed(config: ModelConfig, arrays: Mapping[str, jax.Array]) -> nnx.State:
    """The model's parameters from arrays by name that are already where they belong, in the model's dtype."""
    state = abstract(config)[1]
    return nnx.from_flat_state([(path, leaf.replace(arrays["/".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)])


def from_flat(config: ModelConfig, arrays: FlatParams, shard: Sharder) -> nnx.State:
    """Places named host arrays on the mesh as the model's parameters.

    Raises InvalidInput naming the first tensor that is missing, unknown or misshapen, before anything is placed.
    """
    check_flat(config, arrays)
    leaves = flat_names(abstract(config)[1])
    # copy=False: a second host copy of a large model may not fit.
    placed = {n: jax.device_put(np.asarray(arrays[n]).astype(leaf.dtype, copy=False), shard(*leaf.axes)) for n, leaf in leaves.items()}
    return from_placed(config, placed)

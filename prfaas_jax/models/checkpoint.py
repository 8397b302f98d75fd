"""Checkpoints: our own Orbax directory (params, tokenizer, manifest), and one `load` for every format that is understood.

Layout of a saved directory: `params/` (Orbax, committed atomically), `tokenizer.json` and `chat.json` when there is a
tokenizer, and last of all the manifest, so that an interrupted save is never taken for a checkpoint.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.digest import weights_digest
from prfaas_jax.models.hf_config import read_hf_eos_ids
from prfaas_jax.models.params import FlatParams, abstract, check_flat, flat_names, from_flat, from_placed, init_random
from prfaas_jax.models.source import MANIFEST, Manifest, RandomConfig, open_gguf, read_config, read_manifest, resolve
from prfaas_jax.sharding import MeshSpec, Sharder, check_divides

if TYPE_CHECKING:
    from prfaas_jax.models.tokenizer import Tokenizer

__all__ = ["Loaded", "load", "read_config", "save"]

# A restoring host reads whole chunks, so a chunk bounds what it must hold beside its own shard.
_CHUNK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, ready to run.

    Attributes:
        config: its shape, with the dtype that the parameters have.
        params: its parameters, on the mesh.
        tokenizer_path: what `Tokenizer.load` takes; None when the checkpoint has no tokenizer.
        eos_ids: token ids that end a generation; may be empty.
        fingerprint: hex digest of shape and weights; two servers that exchange KV must have the same.
    """

    config: ModelConfig
    params: nnx.State
    tokenizer_path: Path | None
    eos_ids: tuple[int, ...]
    fingerprint: str


def save(
    path: Path | str,
    config: ModelConfig,
    params: nnx.State | FlatParams,
    tokenizer: "Tokenizer | None" = None,
    eos_ids: tuple[int, ...] | None = None,
) -> None:
    """Writes a checkpoint and waits until it is on disk.

    Args:
        path: a directory that does not exist yet, or is empty.
        config: the model's shape; its dtype must be that of the parameters.
        params: the parameters, as a state or as arrays by name.
        tokenizer: saved beside the parameters.
        eos_ids: ids that end a generation; the tokenizer's when None.

    Raises InvalidInput for an occupied path, and for tensors that do not fit `config`.
    """
    path = Path(path).absolute()
    arrays = _arrays(params) if isinstance(params, nnx.State) else params
    check_flat(config, arrays)
    leaves = flat_names(abstract(config)[1])
    if other := {n: str(a.dtype) for n, a in arrays.items() if str(a.dtype) != str(leaves[n].dtype)}:
        raise InvalidInput("checkpoint tensor dtypes", other, f"{config.dtype}, as in the model config (decay and bias terms float32)")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidInput("checkpoint", str(path), "a new or empty directory to save into")
    if eos_ids is None:
        eos_ids = tokenizer.eos_ids if tokenizer else ()
    tree = _nested(arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", tree, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree))
        checkpointer.wait_until_finished()
    manifest = Manifest(config, weights_digest(arrays), eos_ids)
    if jax.process_index() == 0:
        if tokenizer:
            tokenizer.save(path)
        partial = path / f"{MANIFEST}.partial"
        partial.write_text(manifest.to_json(), encoding="utf-8")
        os.replace(partial, path / MANIFEST)


def load(
    path: Path | str, shard: Sharder, dtype: str | None = None, random_config: RandomConfig | None = None, progress: bool = False
) -> Loaded:
    """Loads a model onto a mesh.

    Args:
        path: an Orbax directory written by `save`, a Hugging Face directory, a .gguf file, or "random:<config>[@seed]".
        shard: mesh and sharding table. Orbax arrays are restored shard by shard; the other formats pass through host memory once.
        dtype: casts the parameters; None keeps what the checkpoint names.
        random_config: resolves <config> in "random:<config>"; None refuses random weights.
        progress: show a progress bar on stderr where loading takes long.

    Raises InvalidInput naming what does not fit: the path, an option of the model, a tensor, the mesh.
    """
    source = resolve(path)
    # Parsing a GGUF's vocabulary takes seconds, so the file is opened once.
    gguf = open_gguf(source.path) if source.kind == "gguf" else None
    config = gguf.config(dtype) if gguf else read_config(path, dtype, random_config)
    check_divides(config.axis_sizes(), MeshSpec(**shard.mesh.shape), shard.attention)
    if source.kind == "random":
        # The seed stands for the weights: their last bits may differ between platforms.
        params = init_random(config, source.seed, shard)
        return Loaded(config, params, None, (), _fingerprint(config, f"random {source.seed}"))
    if gguf:
        params, eos_ids = from_flat(config, gguf.weights(config, progress), shard), gguf.eos_ids()
    elif source.kind == "hf":
        from prfaas_jax.models.hf import read_hf  # safetensors is an optional dependency

        params, eos_ids = from_flat(config, read_hf(source.path, dtype)[1], shard), read_hf_eos_ids(source.path)
    else:
        params, eos_ids = _restore(source.path, config, shard), read_manifest(source.path).eos_ids
    has_tokenizer = gguf is not None or (source.path / "tokenizer.json").exists()
    digest = weights_digest(_arrays(params))
    if source.kind == "orbax":
        _check_digest(source.path, config, digest)
    return Loaded(config, params, source.path if has_tokenizer else None, eos_ids, _fingerprint(config, digest))


def _restore(path: Path, config: ModelConfig, shard: Sharder) -> nnx.State:
    leaves = flat_names(abstract(config)[1])
    target = _nested({n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shard(*leaf.axes)) for n, leaf in leaves.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            tree = checkpointer.restore(path.absolute() / "params", target)
        except (OSError, ValueError, KeyError) as e:
            raise InvalidInput("checkpoint", str(path), f"parameters that fit its own {MANIFEST} ({e})") from e
    return from_placed(config, {n: _at(tree, n) for n in leaves})


def _check_digest(path: Path, config: ModelConfig, digest: str) -> None:
    """Bit rot or a hand-made mixture of directories shows here; after a cast the digest is another one, so not then."""
    manifest = read_manifest(path)
    if config.dtype == manifest.config.dtype and digest != manifest.weights_digest:
        raise InvalidInput("checkpoint", str(path), f"weights with the digest that {MANIFEST} names, not {digest}")


def _fingerprint(config: ModelConfig, weights: str) -> str:
    return hashlib.sha256(f"{config.fingerprint()} {weights}".encode()).hexdigest()[:32]


def _arrays(params: nnx.State) -> dict[str, jax.Array]:
    return {name: leaf[...] for name, leaf in flat_names(params).items()}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Names split at "/" into nested dictionaries, which is what Orbax stores."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _at(tree: Mapping[str, Any], name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree

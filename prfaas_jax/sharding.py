"""ONE table: logical axis -> mesh axes, with a prefill and a decode reading of it.

A mesh has three axes. "data" splits the batch: each data shard owns its rows and its own pages, so attention never crosses it.
"model" splits heads, feed-forward width and vocabulary (tensor parallelism). "expert" splits the experts of a mixture, and joins
"model" everywhere else, so that no device repeats another one's work. Every token is on all devices of its data shard: experts need
no all-to-all, only the sum that tensor parallelism takes anyway.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prfaas_jax.errors import InvalidInput

Mode = Literal["prefill", "decode"]
AttentionSharding = Literal["sharded", "replicated"]

MESH_AXES = ("data", "expert", "model")
TENSOR = ("expert", "model")

MeshAxes = tuple[str, ...] | str | None

# logical axis: (mesh axes when reading for prefill, when reading for decode)
TABLE: dict[str, tuple[MeshAxes, MeshAxes]] = {
    "batch": ("data", "data"),
    "pages": ("data", "data"),
    "heads": (TENSOR, TENSOR),
    "kv_heads": (TENSOR, TENSOR),
    "mlp": (TENSOR, TENSOR),
    "vocab": (TENSOR, TENSOR),
    "experts": ("expert", "expert"),
    "expert_mlp": ("model", "model"),
    # A prefill chunk is long enough to split its residual stream between layers; a single token is not.
    "seq": (TENSOR, None),
    "embed": (None, None),
    "layers": (None, None),
    "head_dim": (None, None),
    "latent": (None, None),
}

# Logical axes that hold heads: whole on every device when attention is replicated.
HEAD_AXES = ("heads", "kv_heads")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """A mesh shape, e.g. data:1,model:2 or data:1,expert:4,model:2."""

    data: int = 1
    model: int = 1
    expert: int = 1

    @classmethod
    def parse(cls, text: str, field: str = "mesh") -> "MeshSpec":
        """Reads "data:1,model:2" (any axis may be left out); raises InvalidInput naming `field`."""
        expected = "axis:size pairs such as data:1,model:2 (axes: data, expert, model)"
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.strip().partition(":")
            if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1 or axis in sizes:
                raise InvalidInput(field, text, expected)
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.tensor

    @property
    def tensor(self) -> int:
        """Devices that share the heads: the expert and model axes together."""
        return self.expert * self.model

    def __str__(self) -> str:
        return f"data:{self.data},{f'expert:{self.expert},' if self.expert > 1 else ''}model:{self.model}"


def make_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays `spec` over the first devices; raises InvalidInput when there are too few."""
    devices = jax.devices() if devices is None else devices
    if len(devices) < spec.size:
        raise InvalidInput("mesh", str(spec), f"at most {len(devices)} devices, which is what there is (on CPU: jax_num_cpu_devices)")
    grid = np.array(devices[: spec.size]).reshape(spec.data, spec.expert, spec.model)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@dataclasses.dataclass(frozen=True)
class Sharder:
    """The table, read for one mode on one mesh.

    `attention="replicated"` keeps heads and kv heads whole on every device (for models whose heads the mesh does not divide); MLP and
    vocabulary stay sharded.

    A logical name may end in the number of heads that its axis holds, as in "kv_heads/4": heads fewer than the devices that share them
    are whole on every one of these (`copies` says how often), and `spread` lays out the copies.
    """

    mesh: Mesh
    mode: Mode
    attention: AttentionSharding = "sharded"

    def axis(self, logical: str | None) -> MeshAxes:
        """Mesh axes of a logical axis, None when replicated."""
        if logical is None:
            return None
        name, _, heads = logical.partition("/")
        if self.attention == "replicated" and name in HEAD_AXES:
            return None
        if heads and self.copies(int(heads)) > 1:
            return None
        axes = TABLE[name][self.mode == "decode"]
        return "model" if axes == TENSOR and self.mesh.shape["expert"] == 1 else axes

    def spec(self, *logical: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose axes carry these logical names; two may not land on one mesh axis."""
        axes = [self.axis(name) for name in logical]
        used = [a for entry in axes if entry is not None for a in ((entry,) if isinstance(entry, str) else entry)]
        if len(set(used)) != len(used):
            raise ValueError(f"logical axes {logical} put two array axes on one mesh axis: {axes}")
        return PartitionSpec(*axes)

    def __call__(self, *logical: str | None) -> NamedSharding:
        """NamedSharding of an array whose axes carry these logical names."""
        return NamedSharding(self.mesh, self.spec(*logical))

    def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """with_sharding_constraint by logical names."""
        return jax.lax.with_sharding_constraint(x, self(*logical))

    def size(self, logical: str) -> int:
        """Number of shards of a logical axis."""
        axes = self.axis(logical)
        return math.prod(self.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))

    def copies(self, heads: int) -> int:
        """How many devices hold each of `heads` heads: more than 1 when there are fewer heads than devices that share them."""
        shards = self.size("kv_heads")
        return 1 if heads % shards == 0 else shards // heads

    def spread(self, x: jax.Array, heads: int, axis: int) -> jax.Array:
        """Repeats each of `heads` heads along `axis`, once per device that holds it; nothing changes where one device does."""
        copies = self.copies(heads)
        return x if copies == 1 else jnp.repeat(x, copies, axis=axis)


def check_divides(sizes: Iterable[tuple[str, int]], mesh: MeshSpec, attention: AttentionSharding, field: str = "mesh") -> None:
    """Raises InvalidInput unless the mesh divides every logical axis that the table shards.

    kv heads may also divide the devices that share them: each then lives on several. `sizes` holds (logical axis, size) pairs, e.g.
    `ModelConfig.axis_sizes()`; `field` names the flag in the error.
    """
    for logical, size in sizes:
        is_attention = logical in HEAD_AXES
        if is_attention and attention == "replicated":
            continue
        axes = TABLE[logical][0]
        names = (axes,) if isinstance(axes, str) else axes or ()
        shards = math.prod(getattr(mesh, name) for name in names)
        if size % shards == 0 or (logical == "kv_heads" and shards % size == 0):
            continue
        hint = " (or attention=replicated, which shards only MLP and vocabulary)" if is_attention else ""
        axis = "a model axis" if mesh.expert == 1 and names != ("expert",) else f"axes {' x '.join(names)}"
        raise InvalidInput(field, str(mesh), f"{axis} that divides {logical}={size}{hint}")

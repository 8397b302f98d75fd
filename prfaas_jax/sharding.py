"""ONE table: logical axis -> mesh axis, with a prefill and a decode reading of it.

A mesh has two axes. "data" splits the batch: each data shard owns its rows and its own pages, so attention never crosses it.
"model" splits heads, MLP and vocabulary (tensor parallelism).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prfaas_jax.errors import InvalidInput

Mode = Literal["prefill", "decode"]
AttentionSharding = Literal["sharded", "replicated"]

# logical axis: (mesh axis when reading for prefill, when reading for decode)
TABLE: dict[str, tuple[str | None, str | None]] = {
    "batch": ("data", "data"),
    "pages": ("data", "data"),
    "heads": ("model", "model"),
    "kv_heads": ("model", "model"),
    "mlp": ("model", "model"),
    "vocab": ("model", "model"),
    # A prefill chunk is long enough to split its residual stream between layers; a single token is not.
    "seq": ("model", None),
    "embed": (None, None),
    "layers": (None, None),
    "head_dim": (None, None),
}


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """A mesh shape, e.g. data:1,model:2."""

    data: int = 1
    model: int = 1

    @classmethod
    def parse(cls, text: str, field: str = "mesh") -> "MeshSpec":
        """Reads "data:1,model:2" (either axis may be left out); raises InvalidInput naming `field`."""
        expected = "axis:size pairs such as data:1,model:2"
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.strip().partition(":")
            if axis not in ("data", "model") or not size.isdecimal() or int(size) < 1 or axis in sizes:
                raise InvalidInput(field, text, expected)
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.model

    def __str__(self) -> str:
        return f"data:{self.data},model:{self.model}"


def make_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays `spec` over the first devices; raises InvalidInput when there are too few."""
    devices = jax.devices() if devices is None else devices
    if len(devices) < spec.size:
        raise InvalidInput("mesh", str(spec), f"at most {len(devices)} devices, which is what there is (on CPU: jax_num_cpu_devices)")
    grid = np.array(devices[: spec.size]).reshape(spec.data, spec.model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


@dataclasses.dataclass(frozen=True)
class Sharder:
    """The table, read for one mode on one mesh.

    `attention="replicated"` keeps heads and kv heads whole on every device (for models whose heads the model axis does not
    divide); MLP and vocabulary stay sharded.
    """

    mesh: Mesh
    mode: Mode
    attention: AttentionSharding = "sharded"

    def axis(self, logical: str | None) -> str | None:
        """Mesh axis of a logical axis, None when replicated."""
        if logical is None or (self.attention == "replicated" and logical in ("heads", "kv_heads")):
            return None
        return TABLE[logical][self.mode == "decode"]

    def spec(self, *logical: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose axes carry these logical names; two may not land on one mesh axis."""
        axes = [self.axis(name) for name in logical]
        used = [a for a in axes if a is not None]
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
        axis = self.axis(logical)
        return 1 if axis is None else self.mesh.shape[axis]


def check_divides(sizes: Mapping[str, int], mesh: MeshSpec, attention: AttentionSharding, field: str = "mesh") -> None:
    """Raises InvalidInput unless the model axis divides every logical axis that the table puts on it.

    `sizes` maps logical axis to its size, e.g. `ModelConfig.axis_sizes()`; `field` names the flag in the error.
    """
    for logical, size in sizes.items():
        is_attention = logical in ("heads", "kv_heads")
        if is_attention and attention == "replicated":
            continue
        if "model" in TABLE[logical] and size % mesh.model:
            hint = " (or attention=replicated, which shards only MLP and vocabulary)" if is_attention else ""
            raise InvalidInput(field, str(mesh), f"a model axis that divides {logical}={size}{hint}")

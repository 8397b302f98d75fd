"""Accelerators that programs can be compiled for without having them: published figures and how to name a topology.

Free of jax at import: `prepare_environment` must run before jax is imported.
"""

import dataclasses
import importlib.util
import os
import shutil
import sys

from prfaas_jax.errors import InvalidInput


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip, as the vendor gives them (GB = 1e9 bytes); peaks that real programs stay below.

    Attributes:
        hbm_bytes: memory.
        bf16_flops: dense bfloat16 flops per second.
        float32_flops: float32 flops per second at the precision that float32 models run with.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second that it can send to its neighbours, one direction, all links together.
        source: where the figures stand.
    """

    hbm_bytes: float
    bf16_flops: float
    float32_flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    source: str

    def peak_flops(self, dtype: str) -> float:
        """Flops per second for a model of this dtype."""
        return self.float32_flops if dtype == "float32" else self.bf16_flops


def _tpu(hbm: float, flops: float, bandwidth: float, ici: float, page: str) -> Chip:
    """float32 at highest precision takes six bfloat16 passes; `ici` is bidirectional, half of it goes out."""
    return Chip(hbm * 1e9, flops * 1e12, flops * 1e12 / 6, bandwidth * 1e9, ici * 1e9 / 2, f"https://cloud.google.com/tpu/docs/{page}")


CHIPS = {
    "tpu": {
        "v5e": _tpu(16, 197, 819, 400, "v5e"),
        "v5p": _tpu(95, 459, 2765, 1200, "v5p"),
        "v6e": _tpu(32, 918, 1638, 800, "v6e"),
    },
    "gpu": {
        # SXM; float32 without TF32; NVLink 900 GB/s bidirectional.
        "h200": Chip(141e9, 989e12, 67e12, 4.8e12, 450e9, "https://www.nvidia.com/en-us/data-center/h200/"),
    },
}

# What XLA would ask of a GPU that is there.
GPU_TARGET_CONFIG = {
    "h200": """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
}

# No metadata server off the cloud, and no complaint about it; the names stand for no machine, the topology comes with each compilation.
# No TPU is opened, so several processes may compile at once.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

_PLUGINS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins.xla_cuda13", "cuda")}


@dataclasses.dataclass(frozen=True)
class Target:
    """A described topology, e.g. tpu:v5e:4x4 or gpu:h200:1x1x8 (partitions x hosts x GPUs per host)."""

    kind: str
    chip_name: str
    topology: str

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Reads "kind:chip:AxB[xC]"; raises InvalidInput naming what is known."""
        names = ", ".join(f"{kind}:{chip}:AxB" for kind, chips in CHIPS.items() for chip in chips)
        kind, _, rest = text.partition(":")
        chip, _, topology = rest.partition(":")
        sizes = topology.split("x")
        if chip not in CHIPS.get(kind, {}) or not all(n.isdecimal() and int(n) > 0 for n in sizes) or (kind == "gpu" and len(sizes) != 3):
            raise InvalidInput("target", text, f"one of {names} with positive sizes (GPUs: partitions x hosts x GPUs per host)")
        return cls(kind, chip, topology)

    def __str__(self) -> str:
        return f"{self.kind}:{self.chip_name}:{self.topology}"

    @property
    def chip(self) -> Chip:
        """Figures of its chips."""
        return CHIPS[self.kind][self.chip_name]

    @property
    def platform(self) -> str:
        """jax's name of the platform that programs are lowered for."""
        return "cuda" if self.kind == "gpu" else self.kind

    @property
    def chips(self) -> int:
        """Number of chips."""
        total = 1
        for n in self.topology.split("x"):
            total *= int(n)
        return total

    def missing(self) -> str | None:
        """What must be installed before this target can be compiled for, or None."""
        module, extra = _PLUGINS[self.kind]
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            pinned = "pip install --no-deps -r third_party/requirements-compile.txt"
            return f"the module {module}: pip install 'prfaas_jax[{extra}]' ({pinned} is enough to compile)"
        if self.kind == "gpu" and shutil.which("ptxas") is None:
            return "ptxas on PATH (in the wheel nvidia-cuda-nvcc under nvidia/cu13/bin)"
        return None

    def check_installed(self) -> None:
        """Raises InvalidInput saying what to install when the compiler is missing."""
        if reason := self.missing():
            raise InvalidInput("target", str(self), f"its compiler to be installed, which lacks {reason}")


def prepare_environment() -> None:
    """Keeps jax on the CPU and libtpu off the network; must come before the first import of jax in this process."""
    if "jax" in sys.modules:
        raise RuntimeError("prepare_environment must run before jax is imported")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def chip_of(device_kind: str) -> Chip | None:
    """Figures of a device that is here, by jax's `device_kind`; None when they are not known."""
    names = {"TPU v5 lite": ("tpu", "v5e"), "TPU v5e": ("tpu", "v5e"), "TPU v5p": ("tpu", "v5p"), "TPU v5": ("tpu", "v5p")}
    names |= {"TPU v6 lite": ("tpu", "v6e"), "TPU v6e": ("tpu", "v6e"), "NVIDIA H200": ("gpu", "h200")}
    found = names.get(device_kind)
    return CHIPS[found[0]][found[1]] if found else None

"""Settings that must stand before jax is imported: CPU, four devices (the largest mesh that a test builds), compiled programs kept."""

import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Two workers on two busy cores: a process that is alive may have to wait for seconds.
os.environ.setdefault("PRFAAS_PING_TIMEOUT_S", "5")
# Tiny models take longer to compile than to run. `experiments.check_equivalence` compiles as users do; .ci/run calls it too.
# XLA ends the process at a flag that it does not have, and newer ones may lose the second.
os.environ["XLA_FLAGS"] = " ".join((
    "--xla_backend_optimization_level=1",
    *(("--xla_cpu_use_fusion_emitters=false",) if importlib.metadata.version("jaxlib").startswith("0.10.") else ()),
    os.environ.get("XLA_FLAGS", ""),
))  # fmt: skip

from hypothesis import settings

# A busy machine is no reason to fail; a failure must come back with the same seed.
settings.register_profile("prfaas", deadline=None, derandomize=True)
settings.load_profile("prfaas")

"""Settings that must stand before jax is imported: CPU, four devices (the largest mesh that a test builds)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

from hypothesis import settings

# A busy machine is no reason to fail; a failure must come back with the same seed.
settings.register_profile("prfaas", deadline=None, derandomize=True)
settings.load_profile("prfaas")

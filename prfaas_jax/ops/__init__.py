"""Kernels, each with a plain-jnp reference and named implementations for the platforms that have one."""

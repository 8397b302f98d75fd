"""Model shapes; `get_config()` returns the fields of `prfaas_jax.models.config.ModelConfig`."""

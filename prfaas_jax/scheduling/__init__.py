"""Pure decisions, free of jax: which rows a prefill step takes, where a request is placed."""

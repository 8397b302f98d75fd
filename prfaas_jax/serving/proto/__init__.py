"""Control-plane messages. `python -m prfaas_jax.serving.proto.generate` rewrites the generated modules from the .proto files."""

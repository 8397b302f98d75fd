"""Prefill-as-a-Service in pure JAX: prefill long prompts on one cluster, decode them on another, move the KV cache over gRPC."""

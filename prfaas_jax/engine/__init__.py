"""Jitted work behind plain seams: chunked sharded prefill, paged decode, continuous batching, sampling."""

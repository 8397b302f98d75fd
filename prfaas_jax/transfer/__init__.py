"""KV over gRPC: wire format, outbox, lanes, puller. Knows bytes, not models."""

"""How a server reaches the control plane of another one."""

from typing import Any

from prfaas_jax.transfer.channel import CHANNEL_OPTIONS
from prfaas_jax.transfer.security import Security, open_aio_channel

# A server that comes back is found within a second; the default backs off to two minutes.
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 1000), ("grpc.max_reconnect_backoff_ms", 1000))


def control_channel(address: str, security: Security) -> Any:
    """A grpc.aio channel to another server's control plane; it connects on first use and reconnects by itself."""
    return open_aio_channel(address, (*CHANNEL_OPTIONS, *_RECONNECT), security)

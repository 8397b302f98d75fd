"""Addresses that servers listen on and peers are told."""

import ipaddress
from typing import Any

from prfaas_jax.errors import InvalidInput


def parse_address(field: str, text: str, *, allow_zero: bool = False) -> tuple[str, int]:
    """Splits "host:port" ("[::1]:50051" for IPv6); raises InvalidInput naming `field`. Port 0 ("any free one") only where allowed."""
    host, colon, port = text.rpartition(":")
    lowest = 0 if allow_zero else 1
    if not colon or not host or not port.isdecimal() or not lowest <= int(port) <= 65535 or any(c.isspace() for c in host):
        raise InvalidInput(field, text, f"host:port with a port in [{lowest}, 65535]")
    return host, int(port)


def check_listen(field: str, text: str, insecure: bool) -> tuple[str, int]:
    """Like `parse_address` for an address to listen on: port 0 is fine, a host that others can reach only with `insecure`.

    There is no TLS yet, and KV can be inverted to its prompt: whoever can read the link can read the prompts.
    """
    host, port = parse_address(field, text, allow_zero=True)
    if not insecure and not _is_loopback(host):
        raise InvalidInput(field, text, "a loopback address: there is no TLS yet, so anything wider must be asked for with --insecure")
    return host, port


def bind(server: Any, field: str, text: str) -> str:
    """Adds an insecure port to a grpc server and returns its address, with the port that port 0 became.

    Raises InvalidInput when the address cannot be bound, e.g. because its port is in use.
    """
    host, _ = parse_address(field, text, allow_zero=True)
    expected = "an address of this machine whose port is free"
    try:
        port = server.add_insecure_port(text)
    except RuntimeError as error:
        raise InvalidInput(field, text, f"{expected} ({error})") from error
    if not port:
        raise InvalidInput(field, text, expected)
    return f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

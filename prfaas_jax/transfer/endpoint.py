"""Addresses that servers listen on and peers are told."""

import ipaddress

from prfaas_jax.errors import InvalidInput


def parse_address(field: str, text: str, *, allow_zero: bool = False) -> tuple[str, int]:
    """Splits "host:port" ("[::1]:50051" for IPv6); raises InvalidInput naming `field`. Port 0 ("any free one") only where allowed."""
    host, colon, port = text.rpartition(":")
    lowest = 0 if allow_zero else 1
    if not colon or not host or not port.isdecimal() or not lowest <= int(port) <= 65535 or any(c.isspace() for c in host):
        raise InvalidInput(field, text, f"host:port with a port in [{lowest}, 65535]")
    return host, int(port)


def parse_advertised(field: str, text: str) -> dict[str, tuple[str, int]]:
    """Where peers reach something, by who they are: "host:port" for all of them, "site=host:port" for those of a site, joined by commas.

    Returns (host, port) by site, "" being all others; raises InvalidInput naming `field` for a malformed part or a site that comes twice.
    """
    found: dict[str, tuple[str, int]] = {}
    for part in text.split(","):
        site, _, address = part.rpartition("=")
        if site in found:
            raise InvalidInput(field, text, "one host:port, and one site=host:port for each site")
        found[site] = parse_address(field, address)
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host, as `parse_address` returns it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

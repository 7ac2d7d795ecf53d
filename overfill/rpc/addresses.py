"""Addresses of this system: ``host:port``, and which hosts only this machine can reach. Resolves no names."""

from __future__ import annotations

import ipaddress


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` in two; an IPv6 host keeps its brackets. Raises ValueError when there is no port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"an address is host:port, such as 127.0.0.1:7600; got {address!r}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``, an IP address or name. Names are not resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

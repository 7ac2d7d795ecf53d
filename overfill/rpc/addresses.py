"""Parses ``host:port`` addresses and recognises loopback hosts. Resolves no names."""

from __future__ import annotations

import ipaddress
from functools import lru_cache


def split_address(address: str) -> tuple[str, int]:
    """Splits ``host:port``; an IPv6 host keeps its brackets. Raises ValueError when the port is missing."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"expected an address host:port, such as 127.0.0.1:7600; got {address!r}")
    return host, int(port)


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Returns True if only this machine can reach ``host``: ``localhost`` or a loopback IP address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Returns True if ``host`` is a wildcard address, such as 0.0.0.0, on which a server accepts every interface."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def instead_of_wildcard(address: str, host: str) -> str:
    """Returns ``address`` (``host:port``), with ``host`` in place of a wildcard host."""
    listens, port = split_address(address)
    return f"{host}:{port}" if is_wildcard(listens) else address


def reachable(host: str) -> str:
    """Returns the address at which processes on this machine reach a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]", "::1": "[::1]"}.get(host, host)

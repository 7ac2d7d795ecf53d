"""Parses ``host:port`` addresses and recognises loopback hosts. Resolves no names."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import lru_cache

_SCHEME = re.compile("(dns|ipv4|ipv6):(//[^/]*/)?")


def split_address(address: str) -> tuple[str, int]:
    """Splits ``host:port``; an IPv6 host keeps its brackets. Raises ValueError when the port is missing."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"expected an address host:port, such as 127.0.0.1:7600; got {address!r}")
    return host, int(port)


def socket_host(host: str) -> tuple[str, socket.AddressFamily]:
    """Returns ``host`` as sockets take it, without the brackets of an IPv6 address, and its address family."""
    bare = host.strip("[]")
    return bare, socket.AF_INET6 if ":" in bare else socket.AF_INET


def split_addresses(address: str) -> list[str]:
    """Splits a comma-separated list. Raises ValueError if an entry is empty, is a URL or has no port."""
    addresses = [part.strip() for part in address.split(",")]
    if url := next((a for a in addresses if a.lower().startswith(("http://", "https://"))), None):
        raise ValueError(
            f"{url!r} is a URL; an address is HOST:PORT with the router's gRPC port, such as 127.0.0.1:7600. "
            "Only OpenAI's and Anthropic's clients use the URL of the HTTP endpoint"
        )
    if bare := next((a for a in addresses if a and ":" not in a), None):
        raise ValueError(f"{bare!r} has no port; an address is HOST:PORT, such as {bare}:7600")
    if not all(addresses):
        raise ValueError(
            f"{address!r} has an empty entry; an address is host:port or unix:path, or several separated by commas"
        )
    return addresses


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


def target_host(target: str) -> str:
    """Returns the host of a gRPC target, such as ``HOST:PORT`` or ``dns:///HOST:PORT``; loopback for a Unix socket."""
    address = target[scheme.end() :] if (scheme := _SCHEME.match(target)) else target
    try:
        return split_address(address)[0]
    except ValueError:
        return "127.0.0.1"


def reachable(host: str) -> str:
    """Returns the address at which processes on this machine reach a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]", "::1": "[::1]"}.get(host, host)


def announced(bound: str, advertise: str) -> str:
    """Returns the address to announce: ``bound`` (``host:port``) with the host, or host and port, of ``advertise``."""
    if not advertise:
        return bound
    if re.fullmatch(r"(\[.*\]|[^:]+):\d+", advertise):
        return advertise
    host = f"[{advertise}]" if ":" in advertise and not advertise.startswith("[") else advertise
    return f"{host}:{split_address(bound)[1]}"

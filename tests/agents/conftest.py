"""Agents run in a network namespace that has nothing but a loopback device."""

from __future__ import annotations

import fcntl
import socket
import struct

import pytest

_SET_FLAGS, _UP = 0x8914, 0x1
"""SIOCSIFFLAGS and IFF_UP of Linux."""


@pytest.fixture(scope="session", autouse=True)
def alone() -> None:
    """Brings up the loopback device. Skips every test where another device leads to a network."""
    if {name for _, name in socket.if_nameindex()} != {"lo"}:
        pytest.skip("agents run in a network namespace of their own: make test-agents makes it")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh", b"lo", _UP))

"""Where processes listen, read from the kernel's tables."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import ExitStack
from pathlib import Path

LISTEN = "0A"


def owned(pids):
    """Returns inodes of the sockets that these processes have open."""
    inodes = set()
    for pid in pids:
        try:
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    target = os.readlink(descriptor)
                except OSError:
                    continue  # closed since the listing
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        except OSError:
            continue  # the process has ended
    return inodes


def address(text):
    """Parses ``0100007F:1DB0`` of /proc/net/tcp, or its longer form of tcp6."""
    host, _, port = text.partition(":")
    words = [int(host[i : i + 8], 16).to_bytes(4, "little") for i in range(0, len(host), 8)]
    found = ipaddress.ip_address(b"".join(words))
    return (getattr(found, "ipv4_mapped", None) or found), int(port, 16)


def listening(pids):
    """Returns (protocol, IP address, port) of every listening TCP and bound UDP socket of the processes."""
    inodes, found = owned(pids), set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and (fields[3] == LISTEN or table.startswith("udp")):
                found.add((table, *address(fields[1])))
    return found


def own_address():
    """Returns an address of this machine that others can reach; None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return None
        name = probe.getsockname()[0]
    return None if ipaddress.ip_address(name).is_loopback else name


def free_ports(count):
    """Returns the first of ``count`` free loopback ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, ExitStack() as others:
            port = first.getsockname()[1]
            try:
                for number in range(port + 1, port + count):
                    others.enter_context(socket.create_server(("127.0.0.1", number)))
            except OSError:
                continue
            return port

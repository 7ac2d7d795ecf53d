"""TCP ports of a stack on this machine: chooses free ones, and reports those in use before anything starts."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections.abc import Sequence
from pathlib import Path

from overfill.rpc.addresses import socket_host
from overfill.stack.child import StartFailed
from overfill.stack.spec import ROUTER, StackSpec

_NEAR = 100  # number of ports after a used one that are tried as a replacement
_MAX_CHOICE = 10_000  # number of ports among which free ones are chosen
_RANDOM = random.SystemRandom()  # two stacks that start at once choose different ports


def free_ports(host: str, count: int) -> list[int]:
    """Returns ports that are free now.

    If possible, the kernel gives none of them to a connection. A worker listens only after it has loaded its model,
    which takes minutes on a busy machine, and some connection would have got the port by then.
    """
    first = _first_ephemeral_port()
    choice = range(max(1024, first - _MAX_CHOICE), first)
    sockets: list[socket.socket] = []
    try:
        for port in _RANDOM.sample(choice, len(choice)):
            if len(sockets) == count:
                break
            with contextlib.suppress(OSError):
                sockets.append(_bind(host, port))
        while len(sockets) < count:
            sockets.append(_bind(host, 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _first_ephemeral_port() -> int:
    """The lowest port that the kernel gives to connections by itself."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):  # not Linux
        return 49152  # the standard's (RFC 6335)


def fill_ports(spec: StackSpec) -> StackSpec:
    """Returns ``spec`` with ports that are free now in place of those that are 0."""
    router = spec.router
    free = iter(free_ports(spec.router_config().host, router.ports.count(0) + router.http_ports.count(0)))
    filled = {
        "ports": tuple(port or next(free) for port in router.ports),
        "http_ports": tuple(port or next(free) for port in router.http_ports),
    }
    return spec.model_copy(update={"router": router.model_copy(update=filled)})


def check_ports(spec: StackSpec) -> None:
    """Raises StartFailed if a port of ``spec`` is in use, naming the port and the flag of ``up`` that changes it."""
    try:
        spec.check_apart(metrics=True)
    except ValueError as error:
        raise StartFailed(str(error)) from error
    router, config = spec.router, spec.router_config()
    _check_free("--grpc", [(config.host, port) for port in router.ports], "or 0 to pick free ports")
    _check_free("--http", [(config.host, port) for port in router.http_ports], "or off to disable the OpenAI endpoint")
    metrics = [
        (config.metrics_host if name == ROUTER else spec.worker_config(name).metrics_host, port)
        for name, ports in spec.metrics_ports.items()
        for port in ports
        if isinstance(port, int) and port
    ]
    _check_free("--metrics-port", metrics, "or 0 to pick free ports, or off")


def _check_free(flag: str, servers: Sequence[tuple[str, int]], otherwise: str) -> None:
    """Raises StartFailed if a port is in use. ``servers`` has host and port of each; port 0 means any free one."""
    for host, port in servers:
        try:
            _bind(host, port).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise StartFailed(f"cannot listen on {host}:{port}: {error.strerror}; choose with {flag}") from error
            free = _free_run(host, servers[0][1], len(servers))
            raise StartFailed(
                f"port {port} of {host} is in use: stop the process that uses it, or give {flag} {free} ({otherwise})"
            ) from error


def _free_run(host: str, after: int, count: int) -> int:
    """Returns the first of ``count`` consecutive free ports after ``after``; 0 (pick any) if none are near."""
    for first in range(after + 1, min(after + _NEAR, 65536 - count)):
        with contextlib.suppress(OSError):
            for port in range(first, first + count):
                _bind(host, port).close()
            return first
    return 0


def _bind(host: str, port: int) -> socket.socket:
    bare, family = socket_host(host)
    s = socket.socket(family)
    try:
        # As servers do, so that connections in TIME_WAIT from an earlier run do not block the port.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((bare, port))
    except OSError:
        s.close()
        raise
    return s

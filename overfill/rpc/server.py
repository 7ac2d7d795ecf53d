"""gRPC server of every process: health, reflection, access control, error mapping, and TLS off loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from overfill.errors import Unavailable
from overfill.rpc.access import AccessPolicy
from overfill.rpc.addresses import is_loopback, socket_host, split_address
from overfill.rpc.channel import server_options
from overfill.rpc.health import Health
from overfill.rpc.interceptors import ErrorInterceptor
from overfill.rpc.tls import ServerTls, TlsError

_HEALTH = "grpc.health.v1.Health"
_AddServicer = Callable[[Any, Any], None]


class RpcServer:
    """A gRPC server: add servicers, then ``start``, then ``set_ready``. Use it from one event loop.

    Args:
        tls: certificate and key; None serves without TLS, on loopback only.
        max_concurrent_rpcs: limit on concurrent RPCs; further ones end with RESOURCE_EXHAUSTED. Callers have shares of
            it (``RpcShares``). None means no limit.
        access: access policy; None admits every caller to every listed RPC.
        condition: returns True while the process can do its work. Health checks report ready only while it does. None
            means always.
        share_port: let other processes listen on the same port; the kernel divides the connections among them.
        max_connection_age: seconds after which a connection takes no new RPCs and closes when its RPCs have ended. None
            means no limit.
    """

    def __init__(
        self,
        tls: ServerTls | None = None,
        max_concurrent_rpcs: int | None = None,
        access: AccessPolicy | None = None,
        condition: Callable[[], bool] | None = None,
        share_port: bool = False,
        max_connection_age: float | None = None,
    ) -> None:
        self._options = server_options(share_port, max_connection_age)
        self._tls = tls
        self._max_concurrent_rpcs = max_concurrent_rpcs
        self._access = access
        self._health = Health(condition)
        self._servicers: list[tuple[_AddServicer, Any, str]] = []
        self._server: grpc.aio.Server | None = None
        self.add(health_pb2_grpc.add_HealthServicer_to_server, self._health, _HEALTH)

    def add(self, add_servicer: _AddServicer, servicer: Any, service: str) -> None:
        """Adds a servicer, before the server starts.

        Args:
            add_servicer: the generated ``add_..._to_server``.
            service: full name, such as ``decode_pb2.DESCRIPTOR.services_by_name["Decode"].full_name``.

        Raises:
            RuntimeError: the server has already started.
        """
        if self._server is not None:
            raise RuntimeError("the server has started: add servicers before start()")
        self._servicers.append((add_servicer, servicer, service))
        self._health.add(service)

    async def start(self, address: str) -> str:
        """Listens on ``host:port`` or ``unix:path`` and returns the address in use. Port 0 picks a free one.

        Raises:
            TlsError: the host is not loopback and TLS is not configured, or a TLS file cannot be read.
            Unavailable: the address cannot be bound, usually because the port is in use.
            ValueError: ``address`` has neither form.
        """
        is_unix = address.startswith("unix:")
        host = "localhost" if is_unix else split_address(address)[0]
        if self._tls is None and not is_loopback(host):
            raise TlsError(
                f"refusing to listen on {address} without TLS, because other machines can reach {host}: "
                "configure a TLS certificate and key, or listen on 127.0.0.1"
            )
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor(self._access, self._wants_certificates, self._max_concurrent_rpcs)],
            options=self._options,
            maximum_concurrent_rpcs=self._max_concurrent_rpcs,
        )
        for add_servicer, servicer, _ in self._servicers:
            add_servicer(servicer, server)
        names = [service for _, _, service in self._servicers]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        try:
            if self._tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._tls.credentials())
        except RuntimeError as error:
            raise Unavailable(
                f"cannot listen on {address}: the port is in use, or the host is not an address of this machine"
            ) from error
        await server.start()
        self._server = server
        return address if is_unix else f"{host}:{port}"

    @property
    def _wants_certificates(self) -> bool:
        return self._tls is not None and self._tls.client_ca is not None

    def set_ready(self, ready: bool) -> None:
        """Sets the answer of health checks, for the process ("") and every service, while ``condition`` holds."""
        self._health.set_ready(ready)

    async def stop(self, grace: float | None = None) -> None:
        """Refuses new RPCs, and cancels running ones after ``grace`` seconds; None cancels them at once."""
        self._health.close()
        if self._server is not None:
            await self._server.stop(grace)


async def until_free(address: str) -> None:
    """Returns once a server can listen on ``host:port``. The port is in use for a moment after a server has stopped."""
    host, port = split_address(address)
    bare, family = socket_host(host)
    while True:
        try:
            socket.create_server((bare, port), family=family).close()
        except OSError:
            await asyncio.sleep(0.01)
        else:
            return

"""A gRPC server with what every process here needs: health, reflection, error mapping, a guarded bind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from overfill.errors import Unavailable
from overfill.rpc.access import AccessPolicy
from overfill.rpc.addresses import is_loopback, split_address
from overfill.rpc.channel import server_options
from overfill.rpc.health import Health
from overfill.rpc.interceptors import ErrorInterceptor
from overfill.rpc.tls import ServerTls, TlsError

_HEALTH = "grpc.health.v1.Health"
_AddServicer = Callable[[Any, Any], None]


class RpcServer:
    """Servicers are added, then the server starts, then it is set ready. Use it from one event loop.

    Args:
        tls: certificate and key; None serves in the clear, on loopback only.
        max_concurrent_rpcs: more than these are refused with RESOURCE_EXHAUSTED; None means no limit.
        access: who may call what; None: everybody what is in the table.
        interceptors: see every RPC; what they raise, or have a method raise, is mapped as usual.
        condition: holds while the process, once it was set ready, can do its work; None: always.
    """

    def __init__(
        self,
        tls: ServerTls | None = None,
        max_concurrent_rpcs: int | None = None,
        access: AccessPolicy | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
        condition: Callable[[], bool] | None = None,
    ) -> None:
        self._tls = tls
        self._max_concurrent_rpcs = max_concurrent_rpcs
        self._access = access
        self._interceptors = tuple(interceptors)
        self._health = Health(condition)
        self._servicers: list[tuple[_AddServicer, Any, str]] = []
        self._server: grpc.aio.Server | None = None
        self.add(health_pb2_grpc.add_HealthServicer_to_server, self._health, _HEALTH)

    def add(self, add_servicer: _AddServicer, servicer: Any, service: str) -> None:
        """Registers ``servicer`` with the generated ``add_..._to_server``.

        ``service`` is its full name, such as ``decode_pb2.DESCRIPTOR.services_by_name["Decode"].full_name``.

        Raises:
            RuntimeError: the server has started.
        """
        if self._server is not None:
            raise RuntimeError("servicers are added before the server starts")
        self._servicers.append((add_servicer, servicer, service))
        self._health.add(service)

    async def start(self, address: str) -> str:
        """Listens on ``host:port`` (port 0: any free one) or ``unix:path``; returns the address in use.

        Raises:
            TlsError: the host is not loopback and there is no TLS, or TLS files cannot be read.
            Unavailable: the address cannot be bound, most often because the port is taken.
            ValueError: ``address`` has neither form.
        """
        is_unix = address.startswith("unix:")
        host = "localhost" if is_unix else split_address(address)[0]
        if self._tls is None and not is_loopback(host):
            raise TlsError(
                f"refusing to listen on {address} in the clear: {host} can be reached from other machines; "
                "configure a TLS certificate and key, or listen on 127.0.0.1"
            )
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor(self._access, self._wants_certificates), *self._interceptors],
            options=server_options(),
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
            raise Unavailable(f"cannot listen on {address}: the address is taken or not this machine's") from error
        await server.start()
        self._server = server
        return address if is_unix else f"{host}:{port}"

    @property
    def _wants_certificates(self) -> bool:
        return self._tls is not None and self._tls.client_ca is not None

    def set_ready(self, ready: bool) -> None:
        """What health checks answer from now on while ``condition`` holds, for the process ("") and every service."""
        self._health.set_ready(ready)

    async def stop(self, grace: float | None = None) -> None:
        """Takes no new RPCs; running ones get ``grace`` seconds (None: none) before they are cancelled."""
        self._health.close()
        if self._server is not None:
            await self._server.stop(grace)

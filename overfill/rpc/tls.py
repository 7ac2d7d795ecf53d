"""TLS material for either end of a connection, read again when its files change. Knows no channels and no servers."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from overfill.rpc.reload import ReloadingValue

_CERTIFICATES = "the TLS certificates"
"""How log messages name what is read again."""


class TlsError(ValueError):
    """TLS is configured wrongly: a file is missing or unreadable, or half of a pair is absent."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """What a client needs to trust a server, and to prove itself when the server asks.

    Args:
        ca: PEM file with the certificates to trust; None trusts the system's.
        cert: PEM file with the client's certificate chain, for mutual TLS; goes with ``key``.
        key: PEM file with the private key of ``cert``.
        name: what the server's certificate has to be for; empty: the host that is connected to. Where addresses come
            and go, as in a cluster, all processes bear one name.

    Raises:
        TlsError: only one of ``cert`` and ``key`` is given.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise TlsError("a TLS client certificate needs both a certificate and a key; give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises TlsError naming the one that cannot be read."""
        if self.cert is not None and self.key is not None:
            _check_pair(self.cert, self.key, "client")
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca, "CA certificate") if self.ca else None,
            private_key=_read(self.key, "client key") if self.key else None,
            certificate_chain=_read(self.cert, "client certificate") if self.cert else None,
        )

    def reloaded(self) -> ReloadingValue[grpc.ChannelCredentials]:
        """The credentials, other ones whenever the files have changed. Raises TlsError."""
        return ReloadingValue((self.ca, self.cert, self.key), self.credentials, TlsError, _CERTIFICATES)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a process shows to the others of its stack.

    Args:
        tls: certificates; None talks in the clear.
        secret: of the stack; empty: there is none.
    """

    tls: ClientTls | None = None
    secret: str = ""

    def __repr__(self) -> str:
        return f"Credentials(tls={self.tls!r})"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """A server's certificate and key, and whose client certificates it demands.

    Args:
        cert: PEM file with the server's certificate chain.
        key: PEM file with the private key of ``cert``.
        client_ca: PEM file; when given, clients must show a certificate that it signed (mutual TLS).
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server; every handshake takes the files as they are. Raises TlsError naming the one at fault."""
        source = ReloadingValue((self.cert, self.key, self.client_ca), self._configuration, TlsError, _CERTIFICATES)
        first = source.value

        def changed() -> Any:
            """None tells gRPC that nothing has changed."""
            nonlocal first
            now = source.value
            if now is first:
                return None
            first = now
            return now

        return grpc.dynamic_ssl_server_credentials(
            first, changed, require_client_authentication=self.client_ca is not None
        )

    def contexts(self, client_certificates: bool = True) -> ReloadingValue[ssl.SSLContext]:
        """For a server on Python's sockets; take the value at each handshake. Raises TlsError."""

        def read() -> ssl.SSLContext:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                context.load_cert_chain(self.cert, self.key)
                if client_certificates and self.client_ca is not None:
                    context.load_verify_locations(self.client_ca)
                    context.verify_mode = ssl.CERT_REQUIRED
            except (OSError, ssl.SSLError) as error:
                raise TlsError(f"cannot read {self.cert}, {self.key} or {self.client_ca}: {error}") from error
            return context

        return ReloadingValue((self.cert, self.key, self.client_ca), read, TlsError, _CERTIFICATES)

    def _configuration(self) -> Any:
        _check_pair(self.cert, self.key, "server")
        return grpc.ssl_server_certificate_configuration(
            [(_read(self.key, "server key"), _read(self.cert, "server certificate"))],
            root_certificates=_read(self.client_ca, "client CA certificate") if self.client_ca else None,
        )


def names_of(peer: dict[str, Any] | None) -> list[str]:
    """Subject alternative names of a certificate as Python's ``getpeercert`` describes it."""
    names: Iterable[tuple[str, str]] = (peer or {}).get("subjectAltName", ())
    return [name for kind, name in names if kind in ("URI", "DNS")]


def _check_pair(cert: Path, key: Path, whose: str) -> None:
    """Raises TlsError unless the key is the certificate's: of a pair being replaced, one may be new and one old."""
    _read(key, f"{whose} key")
    _read(cert, f"{whose} certificate")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"the TLS {whose} key {key} is not that of {cert}, or one of them is damaged") from error


def _read(path: Path, what: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TlsError(f"cannot read the TLS {what} {path}: {error.strerror}") from error
    if b"-----BEGIN" not in data:
        raise TlsError(f"the TLS {what} {path} is not a PEM file")
    return data

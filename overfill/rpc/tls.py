"""TLS files of clients and servers, read again when they change. Knows nothing about channels and servers."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from overfill.process.permissions import refusal
from overfill.rpc.access import NAME, Role, role_dns
from overfill.rpc.reload import ReloadingValue

_CERTIFICATES = "the TLS certificates"
"""Name of the value in log messages about reloading."""
_CLIENT_CA = "client CA certificate"

_HANDSHAKE_TURNS = 4
"""Number of turns of each end in which a TLS handshake is complete."""


class TlsError(ValueError):
    """The TLS configuration is wrong: a file is missing or unreadable, or a certificate has no matching key."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """A client's TLS files: certificates to trust, and its own certificate for mutual TLS.

    Args:
        ca: PEM file with the certificates to trust; None trusts the system's.
        cert: PEM file with the client's certificate chain; requires ``key``.
        key: PEM file with the private key of ``cert``.
        name: DNS name that the server's certificate must have; empty means the host of the address. In a cluster,
            addresses change. There, "overfill" stands for the name of the server's role, such as
            ``router.role.overfill.internal``.

    Raises:
        TlsError: only one of ``cert`` and ``key`` is given.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise TlsError("a TLS client certificate needs a certificate and a key: give both, or neither")

    def expected(self, role: Role | None) -> str:
        """Returns the name that the certificate of a server of ``role`` must have; empty means the address's host."""
        return role_dns(role) if self.name == NAME else self.name

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises TlsError naming the file that cannot be read."""
        if self.cert is not None and self.key is not None:
            _check_pair(self.cert, self.key, "client")
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca, "CA certificate") if self.ca else None,
            private_key=_read(self.key, "client key") if self.key else None,
            certificate_chain=_read(self.cert, "client certificate") if self.cert else None,
        )

    def reloaded(self) -> ReloadingValue[grpc.ChannelCredentials]:
        """Returns the process's credentials, as a value that follows changes of the files.

        While the files do not fit each other, as during a renewal, a new channel uses those of the last good read.

        Raises:
            TlsError: the files cannot be read, and this process has not read them before.
        """
        return _reloaded(replace(self, name=""))


@functools.cache
def _reloaded(files: ClientTls) -> ReloadingValue[grpc.ChannelCredentials]:
    return ReloadingValue((files.ca, files.cert, files.key), files.credentials, TlsError, _CERTIFICATES)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Credentials that a process sends to the other processes of its stack.

    Args:
        tls: TLS files; None connects without TLS.
        secret: the stack's secret; empty means that there is none.
    """

    tls: ClientTls | None = None
    secret: str = ""

    def __repr__(self) -> str:
        return f"Credentials(tls={self.tls!r})"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """A server's certificate and key, and the CA of the client certificates that it requires.

    Args:
        cert: PEM file with the server's certificate chain.
        key: PEM file with the private key of ``cert``.
        client_ca: PEM file of a CA. If given, clients must have a certificate that it signed (mutual TLS).
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Returns server credentials that follow changes of the files. Raises TlsError naming the bad file."""
        source = ReloadingValue((self.cert, self.key, self.client_ca), self._configuration, TlsError, _CERTIFICATES)
        first = source.value

        def changed() -> Any:
            """Returns the new configuration; None tells gRPC that nothing has changed."""
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
        """Returns the context for a server on Python's sockets; read its value at each handshake. Raises TlsError."""

        def read() -> ssl.SSLContext:
            _check_pair(self.cert, self.key, "server")
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                context.load_cert_chain(self.cert, self.key)
                if client_certificates and self.client_ca is not None:
                    _read(self.client_ca, _CLIENT_CA)
                    context.load_verify_locations(self.client_ca)
                    context.verify_mode = ssl.CERT_REQUIRED
            except (OSError, ssl.SSLError) as error:
                raise TlsError(f"cannot read {self.cert}, {self.key} or {self.client_ca}: {error}") from error
            return context

        return ReloadingValue((self.cert, self.key, self.client_ca), read, TlsError, _CERTIFICATES)

    def check_name(self, client: ClientTls, host: str, role: Role) -> None:
        """Raises TlsError unless a client with ``client`` accepts this server at ``host`` as one of ``role``."""
        try:
            asks = ssl.create_default_context(cafile=client.ca)
        except OSError as error:
            raise TlsError(f"cannot read the TLS CA certificate {client.ca}: {error}") from error
        # As gRPC: Python is strict from 3.13 on, and trusts no certificate without its issuer before.
        asks.verify_flags &= ~ssl.VERIFY_X509_STRICT
        asks.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = client.expected(role) or host.strip("[]")
        ends = [
            asks.wrap_bio(to_client, to_server, server_hostname=name),
            self.contexts(client_certificates=False).value.wrap_bio(to_server, to_client, server_side=True),
        ]
        try:
            for end in ends * _HANDSHAKE_TURNS:
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        except ssl.SSLCertVerificationError as error:
            remedy = (
                f"give one of the role {role}, as `overfill certs` makes it"
                if client.name == NAME
                else "give the name that it has (--tls-name, tls_name), which is overfill with `overfill certs`"
            )
            raise TlsError(
                f"the TLS server certificate {self.cert} cannot be used at {name}: {error.verify_message.rstrip('.')}; "
                f"{remedy}, and the authority that signed it (--tls-ca, tls_ca)"
            ) from error

    def _configuration(self) -> Any:
        _check_pair(self.cert, self.key, "server")
        return grpc.ssl_server_certificate_configuration(
            [(_read(self.key, "server key"), _read(self.cert, "server certificate"))],
            root_certificates=_read(self.client_ca, _CLIENT_CA) if self.client_ca else None,
        )


def names_of(peer: dict[str, Any] | None) -> list[str]:
    """Returns the subject alternative names of a certificate as ``ssl.SSLSocket.getpeercert`` describes it."""
    names: Iterable[tuple[str, str]] = (peer or {}).get("subjectAltName", ())
    return [name for kind, name in names if kind in ("URI", "DNS")]


def _check_pair(cert: Path, key: Path, whose: str) -> None:
    """Raises TlsError unless ``key`` belongs to ``cert``. While both files are being replaced, only one may be new."""
    _read(key, f"{whose} key")
    _read(cert, f"{whose} certificate")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f"the TLS {whose} key {key} does not belong to the certificate {cert}, or one of the files is damaged"
        ) from error


def _read(path: Path, what: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = "; `overfill certs` makes certificates" if isinstance(error, FileNotFoundError) else ""
        raise TlsError(f"cannot read the TLS {what} {path}: {refusal(path) or error.strerror}{hint}") from error
    if b"-----BEGIN" not in data:
        raise TlsError(f"the TLS {what} {path} is not a PEM file")
    return data

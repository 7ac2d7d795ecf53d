"""TLS material for either end of a connection. Reads PEM files; knows nothing of channels or servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


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
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca, "CA certificate") if self.ca else None,
            private_key=_read(self.key, "client key") if self.key else None,
            certificate_chain=_read(self.cert, "client certificate") if self.cert else None,
        )


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
        """Reads the files. Raises TlsError naming the one that cannot be read."""
        return grpc.ssl_server_credentials(
            [(_read(self.key, "server key"), _read(self.cert, "server certificate"))],
            root_certificates=_read(self.client_ca, "client CA certificate") if self.client_ca else None,
            require_client_auth=self.client_ca is not None,
        )


def _read(path: Path, what: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TlsError(f"cannot read the TLS {what} {path}: {error.strerror}") from error
    if b"-----BEGIN" not in data:
        raise TlsError(f"the TLS {what} {path} is not a PEM file")
    return data

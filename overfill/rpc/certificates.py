"""Certificates for trials and small installations: two private certificate authorities, and a certificate per role.

One authority signs the certificates of the stack's processes (router, worker, scraper), the other those of its users
(client, operator). Workers trust only the first, so they refuse every certificate of a user at the handshake, even
one that claims a process's role. Routers trust both. A certificate names its role as a URI, for servers. That of a
server also names it as a DNS name, for clients, and only a router's names hosts: no worker can pose as a router.
``extendedKeyUsage`` says whether a server may use it.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from overfill.errors import InvalidRequest, OverfillError
from overfill.rpc.access import NAME, Role, role_dns, role_uri

PEERS_CA, CLIENTS_CA, BOTH_CA = "peers-ca.crt", "clients-ca.crt", "ca.crt"
_PEERS = (Role.ROUTER, Role.WORKER, Role.SCRAPER)
_SERVERS = (Role.ROUTER, Role.WORKER)
_CA_DAYS = 3650
_EARLY = timedelta(minutes=5)  # tolerates clocks that are behind


class CertificatesError(OverfillError):
    """A folder of certificates is missing, damaged, or not writable."""


@dataclass(frozen=True, slots=True)
class RoleFiles:
    """Certificate files of one process.

    Attributes:
        cert, key: the process's own certificate and private key.
        ca: certificates of the authorities that the process trusts.
    """

    cert: Path
    key: Path
    ca: Path


def role_files(folder: Path, role: Role) -> RoleFiles:
    """Returns the files that ``make`` wrote for ``role``. Raises CertificatesError when one is missing."""
    ca = BOTH_CA if role is Role.ROUTER else PEERS_CA
    files = RoleFiles(folder / f"{role}.crt", folder / f"{role}.key", folder / ca)
    missing = [path.name for path in (files.cert, files.key, files.ca) if not path.exists()]
    if missing:
        raise CertificatesError(f"{folder} lacks {', '.join(missing)}: make them with `overfill certs {folder}`")
    return files


def make(folder: Path, names: Sequence[str] = (), days: float = 90, roles: Sequence[Role] = tuple(Role)) -> list[Path]:
    """Writes certificates for ``roles`` to ``folder`` and returns the paths; makes missing authorities first.

    Existing certificates are replaced. Running processes read the new ones within seconds.

    Args:
        names: host names and IP addresses of routers, in addition to loopback's.
        days: validity of the certificates, in days.

    Raises:
        InvalidRequest: a name is neither a host name nor an IP address.
        CertificatesError: the folder is not writable, or an authority in it is damaged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        peers, clients = _authority(folder, PEERS_CA), _authority(folder, CLIENTS_CA)
        _write(folder / BOTH_CA, _pem(peers.certificate) + _pem(clients.certificate), 0o644)
        written = [folder / BOTH_CA]
        for role in roles:
            issuer = peers if role in _PEERS else clients
            certificate, key = issue(issuer, role, names, days)
            # Between these writes, key and certificate do not match; processes keep using the previous ones.
            _write(folder / f"{role}.key", key, 0o600)
            _write(folder / f"{role}.crt", certificate, 0o644)
            written += [folder / f"{role}.crt", folder / f"{role}.key"]
        return written
    except OSError as error:
        raise CertificatesError(f"cannot write certificates to {folder}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: its certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_authority(name: str) -> Authority:
    """Makes a self-signed certificate authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key, _CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs=True), critical=True)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def issue(issuer: Authority, role: Role, names: Sequence[str] = (), days: float = 90) -> tuple[bytes, bytes]:
    """Issues a certificate for ``role`` and returns it and its key, both PEM.

    Raises:
        InvalidRequest: a name is neither a host name nor an IP address.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{NAME}-{role}")])
    builder = _builder(subject, issuer.certificate.subject, key, days)
    serves = role in _SERVERS
    found = [role_dns(role), role_dns(None)] if serves else []
    if role is Role.ROUTER:
        found += [NAME, "localhost", "127.0.0.1", "::1", *names]
    alternatives = [x509.UniformResourceIdentifier(role_uri(role)), *(_general_name(name) for name in found)]
    builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs=False), critical=True)
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if serves else [])]
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False
    )
    return _pem(builder.sign(issuer.key, hashes.SHA256())), _key_pem(key)


def _authority(folder: Path, file: str) -> Authority:
    path = folder / file
    key_path = path.with_suffix(".key")
    if not path.exists():
        authority = new_authority(f"{NAME}-{path.stem}")
        _write(key_path, _key_pem(authority.key), 0o600)
        _write(path, _pem(authority.certificate), 0o644)
        return authority
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise CertificatesError(f"{path} or its key {key_path.name} is missing or damaged: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CertificatesError(f"{key_path} is not the key of {path}")
    return Authority(certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _EARLY)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise InvalidRequest("name", f"{name!r} is neither a host name nor an IP address") from error


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Writes the file atomically: under another name first, then renamed."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    new.replace(path)

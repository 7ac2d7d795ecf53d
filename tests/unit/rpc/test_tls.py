"""Tests that faults in TLS files are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from overfill.rpc.tls import ClientTls, ServerTls, TlsError


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"CA certificate .*/nothing\.pem: No such file"):
        ClientTls(ca=tmp_path / "nothing.pem").credentials()
    with pytest.raises(TlsError, match=r"server key .*/nothing\.pem"):
        ServerTls(cert=tmp_path / "c.pem", key=tmp_path / "nothing.pem").credentials()


def test_a_file_that_is_not_pem_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(b"hello")
    with pytest.raises(TlsError, match=r"ca\.pem is not a PEM file"):
        ClientTls(ca=path).credentials()


def test_a_client_certificate_needs_its_key(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match="both"):
        ClientTls(cert=tmp_path / "c.pem")

"""Tests TLS and mutual TLS between a server and a channel, with certificates made by the openssl program."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overfill.cli.health import health_command
from overfill.errors import Unavailable
from overfill.rpc.access import Role
from overfill.rpc.channel import open_channel, open_sync_channel
from overfill.rpc.server import RpcServer
from overfill.rpc.status import from_rpc_error
from overfill.rpc.tls import ClientTls, ServerTls, TlsError

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, and server and client certificates that it signed: NAME.pem and NAME.key."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)

    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    openssl(f"req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl(f"req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}")
        openssl(
            f"x509 -req -in {name}.csr -out {name}.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san"
        )
    return folder


@pytest.fixture(params=["tls", "mutual"])
def mutual(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "mutual")


@pytest.fixture
async def address(certificates: Path, mutual: bool) -> AsyncIterator[str]:
    tls = ServerTls(
        certificates / "server.pem",
        certificates / "server.key",
        client_ca=certificates / "ca.pem" if mutual else None,
    )
    server = RpcServer(tls)
    address = await server.start("127.0.0.1:0")
    server.set_ready(True)
    yield address
    await server.stop()


async def check(address: str, tls: ClientTls | None) -> None:
    """Makes a health check; raises Unavailable if the two ends do not trust each other."""
    async with open_channel(address, tls) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        except grpc.RpcError as error:
            raise from_rpc_error(error, address) from None


async def test_trusted_ends_talk(certificates: Path, address: str) -> None:
    tls = ClientTls(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")
    await check(address, tls)
    with open_sync_channel(address, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await asyncio.to_thread(stub.Check, health_pb2.HealthCheckRequest())


async def test_a_client_without_certificate_is_refused_by_mutual_tls_only(
    certificates: Path, address: str, mutual: bool
) -> None:
    tls = ClientTls(ca=certificates / "ca.pem")
    if mutual:
        with pytest.raises(Unavailable):
            await check(address, tls)
    else:
        await check(address, tls)


async def test_the_name_that_a_certificate_must_have_can_be_set(certificates: Path, address: str) -> None:
    _, _, port = address.rpartition(":")
    # In a cluster certificates have names and addresses are arbitrary; here the certificate has an address.
    server = ServerTls(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    server.check_name(ClientTls(certificates / "ca.pem"), "127.0.0.1", Role.ROUTER)
    for name, right in (("", False), ("127.0.0.1", True), ("other.internal", False)):
        tls = ClientTls(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key", name)
        if right:
            await check(f"localhost:{port}", tls)
            server.check_name(tls, "localhost", Role.ROUTER)
            continue
        with pytest.raises(TlsError, match=rf"server\.pem cannot be used at {name or 'localhost'}: .*mismatch"):
            server.check_name(tls, "localhost", Role.ROUTER)
        with pytest.raises(Unavailable, match=r"does not name this address.*--tls-name"):
            await check(f"localhost:{port}", tls)


async def test_the_health_command_shows_its_certificate(certificates: Path, address: str, mutual: bool) -> None:
    files = [f"--tls-ca={certificates}/ca.pem", f"--tls-cert={certificates}/client.pem"]
    files.append(f"--tls-key={certificates}/client.key")

    async def ask(*arguments: str) -> tuple[object, str]:
        result = await asyncio.to_thread(CliRunner().invoke, health_command, arguments, standalone_mode=False)
        return result.return_value, result.output

    assert await ask("--address", address, *files) == (0, "SERVING\n")
    code, output = await ask("--address", address)
    assert (code, "UNAVAILABLE" in output) == (1, True)
    if mutual:
        assert (await ask("--address", address, files[0]))[0] == 1

"""Tests which certificate is accepted where, and whether it is refused at the handshake or before the first message.

Real servers on loopback use the access rules of a router and of a worker; certificates are those of ``overfill certs``.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overfill.cli.main import main
from overfill.client import AsyncClient
from overfill.errors import InvalidRequest, Unavailable
from overfill.rpc import certificates
from overfill.rpc import reload as reload_module
from overfill.rpc.access import ROUTER_RPCS, WORKER_RPCS, AccessPolicy, Role, role_dns, role_uri, roles_of
from overfill.rpc.channel import open_channel, open_sync_channel
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import ClientTls, ServerTls, TlsError
from overfill.settings.config import RouterConfig
from overfill.v1 import admin_pb2, admin_pb2_grpc, decode_pb2, decode_pb2_grpc, inference_pb2, inference_pb2_grpc

Outcome = grpc.StatusCode | str


class AnsweringService(
    admin_pb2_grpc.AdminServicer, decode_pb2_grpc.DecodeServicer, inference_pb2_grpc.InferenceServicer
):
    """Answers every call that passes access control."""

    async def Status(self, request: admin_pb2.StatusRequest, context: object) -> admin_pb2.StatusResponse:
        return admin_pb2.StatusResponse()

    async def Describe(
        self, request: decode_pb2.DescribeDecodeRequest, context: object
    ) -> decode_pb2.DescribeDecodeResponse:
        return decode_pb2.DescribeDecodeResponse()

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: object
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a stack. ``other`` has those of another stack, ``expired`` has expired ones of this stack."""
    folder = tmp_path_factory.mktemp("certs")
    certificates.make(folder)
    certificates.make(folder / "other")
    expired = folder / "expired"
    expired.mkdir()
    for name in (certificates.PEERS_CA, certificates.CLIENTS_CA):
        for file in (name, name.replace(".crt", ".key")):
            (expired / file).write_bytes((folder / file).read_bytes())
    certificates.make(expired, days=-1)
    return folder


def client_tls(folder: Path, role: Role, **changes: Path | None) -> ClientTls:
    files = certificates.role_files(folder, role)
    return ClientTls(**({"ca": files.ca, "cert": files.cert, "key": files.key} | changes), name="overfill")  # type: ignore[arg-type]


async def serve(folder: Path, role: Role, trusted: Path | None = None) -> tuple[RpcServer, str]:
    files = certificates.role_files(folder, role)
    access = AccessPolicy(ROUTER_RPCS if role is Role.ROUTER else WORKER_RPCS)
    server = RpcServer(ServerTls(files.cert, files.key, trusted or files.ca), access=access)
    servicer = AnsweringService()
    server.add(admin_pb2_grpc.add_AdminServicer_to_server, servicer, "overfill.v1.Admin")
    server.add(decode_pb2_grpc.add_DecodeServicer_to_server, servicer, "overfill.v1.Decode")
    server.add(inference_pb2_grpc.add_InferenceServicer_to_server, servicer, "overfill.v1.Inference")
    return server, await server.start("127.0.0.1:0")


@pytest.fixture
async def router(folder: Path) -> AsyncIterator[str]:
    server, address = await serve(folder, Role.ROUTER)
    yield address
    await server.stop()


@pytest.fixture
async def worker(folder: Path) -> AsyncIterator[str]:
    server, address = await serve(folder, Role.WORKER)
    yield address
    await server.stop()


async def outcome(address: str, tls: ClientTls | None, method: str, role: Role | None = None) -> Outcome:
    """Makes an empty call; returns its status, or "handshake" if the connection failed before HTTP/2."""
    async with open_channel(address, tls, role=role) as channel:
        call = channel.unary_unary(method)(b"", timeout=20)  # type: ignore[type-var]
        try:
            await call
        except grpc.aio.AioRpcError as error:
            # Neither access control nor a method has answered.
            at_handshake = error.code() is grpc.StatusCode.UNAVAILABLE
            return "handshake" if at_handshake else error.code()
        return grpc.StatusCode.OK


DESCRIBE, MODELS = "/overfill.v1.Decode/Describe", "/overfill.v1.Inference/ListModels"
STATUS, HEALTH = "/overfill.v1.Admin/Status", "/grpc.health.v1.Health/Check"
OK, DENIED = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED


async def test_a_worker_accepts_its_peers_only(folder: Path, worker: str) -> None:
    for role, expected in (
        (Role.ROUTER, OK),
        (Role.WORKER, OK),
        (Role.SCRAPER, DENIED),  # certificates of the stack, for another use
        (Role.CLIENT, "handshake"),
        (Role.OPERATOR, "handshake"),
    ):
        assert await outcome(worker, client_tls(folder, role), DESCRIBE) == expected, role
    assert await outcome(worker, client_tls(folder, Role.WORKER), STATUS) == DENIED, "Status is for routers only"


async def test_a_router_accepts_clients_and_refuses_workers_as_clients(folder: Path, router: str) -> None:
    for role, expected in ((Role.CLIENT, OK), (Role.OPERATOR, OK), (Role.WORKER, DENIED), (Role.SCRAPER, DENIED)):
        assert await outcome(router, client_tls(folder, role), MODELS) == expected, role
    assert await outcome(router, client_tls(folder, Role.CLIENT), "/overfill.v1.Registry/Join") == (
        grpc.StatusCode.UNIMPLEMENTED  # this server has no Registry; `test_roles_on_a_whole_stack` asks one that has
    )


@pytest.mark.parametrize("method", [DESCRIBE, HEALTH])
async def test_strangers_do_not_get_past_the_handshake(folder: Path, worker: str, router: str, method: str) -> None:
    mine = certificates.role_files(folder, Role.ROUTER)
    other = certificates.role_files(folder / "other", Role.ROUTER)
    expired = certificates.role_files(folder / "expired", Role.ROUTER)
    for address in (worker, router):
        for what, tls in {
            "of another authority": ClientTls(mine.ca, other.cert, other.key, "overfill"),
            "expired": ClientTls(mine.ca, expired.cert, expired.key, "overfill"),
            "none": ClientTls(mine.ca, name="overfill"),
            "in the clear": None,
            "which trusts another authority": ClientTls(other.ca, mine.cert, mine.key, "overfill"),
        }.items():
            assert await outcome(address, tls, method) == "handshake", (address, what)


async def test_a_client_s_certificate_cannot_be_a_worker_s(folder: Path) -> None:
    """A router also ends the handshake with a server that shows a worker's expired certificate."""
    impostors = {
        # This must hold although routers trust the clients' authority too, because `ca.crt` holds both authorities.
        "client": certificates.role_files(folder, Role.CLIENT),
        "expired": certificates.role_files(folder / "expired", Role.WORKER),
        "other": certificates.role_files(folder / "other", Role.WORKER),
    }
    for what, files in impostors.items():
        server = RpcServer(
            ServerTls(files.cert, files.key, folder / certificates.BOTH_CA), access=AccessPolicy(WORKER_RPCS)
        )
        address = await server.start("127.0.0.1:0")
        tls = client_tls(folder, Role.ROUTER)
        assert await outcome(address, tls, HEALTH) == "handshake", what
        await server.stop()


async def test_a_client_s_certificate_as_a_server_s_is_refused_for_its_use(folder: Path) -> None:
    """With the right names it is refused too, because its extended key usage does not include servers."""
    peers = certificates._authority(folder, certificates.CLIENTS_CA)
    key, cert = folder / "named.key", folder / "named.crt"
    made = certificates._SERVERS
    try:
        certificates._SERVERS = (*made, Role.CLIENT)  # type: ignore[assignment]
        pem, pem_key = certificates.issue(peers, Role.CLIENT)
    finally:
        certificates._SERVERS = made
    cert.write_bytes(pem)
    key.write_bytes(pem_key)
    names = [x509.DNSName(role_dns(None))]
    for serves, expected in ((True, OK), (False, "handshake")):
        files = (cert, key) if serves else _certificate(folder, peers, names, x509.ExtendedKeyUsageOID.CLIENT_AUTH)
        server = RpcServer(ServerTls(*files, folder / certificates.BOTH_CA), access=AccessPolicy(WORKER_RPCS))
        server.set_ready(True)
        address = await server.start("127.0.0.1:0")
        found = await outcome(address, client_tls(folder, Role.ROUTER), HEALTH)
        assert found == expected, serves
        await server.stop()


@pytest.mark.parametrize("own", [*Role])
async def test_a_server_of_one_role_cannot_pose_as_one_of_another(folder: Path, own: Role) -> None:
    files = certificates.role_files(folder, own)
    server = RpcServer(ServerTls(files.cert, files.key, folder / certificates.BOTH_CA), access=AccessPolicy())
    address = await server.start("127.0.0.1:0")
    for caller, role in (
        (Role.ROUTER, Role.WORKER),
        (Role.WORKER, Role.WORKER),
        (Role.ROUTER, Role.ROUTER),
        (Role.WORKER, Role.ROUTER),
        (Role.CLIENT, Role.ROUTER),
    ):
        expected = OK if role is own else "handshake"
        assert await outcome(address, client_tls(folder, caller), HEALTH, role) == expected, (caller, role)
    by_host = replace(client_tls(folder, Role.CLIENT), name="")
    assert await outcome(address, by_host, HEALTH) == (OK if own is Role.ROUTER else "handshake")
    await server.stop()


async def test_a_certificate_without_a_role_s_name_is_refused_with_what_to_do(folder: Path) -> None:
    """Certificates from before clients checked roles."""
    issuer = certificates._authority(folder, certificates.PEERS_CA)
    names = [x509.UniformResourceIdentifier(role_uri(Role.ROUTER)), x509.DNSName("overfill")]
    cert, key = _certificate(folder, issuer, names, x509.ExtendedKeyUsageOID.SERVER_AUTH)
    server = RpcServer(ServerTls(cert, key, folder / certificates.BOTH_CA), access=AccessPolicy())
    address = await server.start("127.0.0.1:0")
    async with AsyncClient(address, tls=client_tls(folder, Role.CLIENT)) as client:
        with pytest.raises(Unavailable, match="make certificates for each role with `overfill certs`"):
            await client.status()
    await server.stop()
    settings = {"tls_cert": cert, "tls_key": key, "tls_ca": folder / certificates.BOTH_CA, "tls_name": "overfill"}
    with pytest.raises(TlsError, match=r"router\.role\.overfill\.internal: .*give one of the role router"):
        RouterConfig(pair="default", **settings).check_files()
    files = certificates.role_files(folder, Role.ROUTER)
    RouterConfig(pair="default", **{**settings, "tls_cert": files.cert, "tls_key": files.key}).check_files()


def _certificate(
    folder: Path, issuer: certificates.Authority, names: list[x509.GeneralName], use: x509.ObjectIdentifier
) -> tuple[Path, Path]:
    """Makes a certificate and key with ``names``, for ``use`` only."""
    key = certificates.ec.generate_private_key(certificates.ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = certificates._builder(name, issuer.certificate.subject, key, 1)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    cert, path = folder / "made.crt", folder / "made.key"
    cert.write_bytes(certificates._pem(builder.sign(issuer.key, certificates.hashes.SHA256())))
    path.write_bytes(certificates._key_pem(key))
    return cert, path


def test_roles_are_read_from_names() -> None:
    assert roles_of([role_uri(Role.WORKER), "overfill", "router.role.overfill.internal"]) == {Role.WORKER, Role.ROUTER}
    assert roles_of(["overfill://role/root", "worker", "role/worker", "x.worker.role.overfill.internal.evil"]) == set()


def test_the_command_makes_them_and_keeps_its_authorities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "certs"
    assert main(["certs", str(folder), "--name", "gpu-1.internal", "--name", "10.1.2.3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11
    router = x509.load_pem_x509_certificate((folder / "router.crt").read_bytes())
    names = router.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"overfill", "localhost", "gpu-1.internal"} <= set(names.get_values_for_type(x509.DNSName))
    assert "overfill://role/router" in names.get_values_for_type(x509.UniformResourceIdentifier)
    for path in folder.glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["certs", str(folder), "--role", "worker"]) == 0
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"worker.crt", "worker.key"}
    (folder / "peers-ca.key").write_text("nonsense")
    assert main(["certs", str(folder)]) == 1
    assert main(["certs", str(tmp_path / "new"), "--name", "bad name ü"]) == 2
    with pytest.raises(InvalidRequest):
        certificates.issue(certificates.new_authority("x"), Role.ROUTER, ["ü"])


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload_module, "RELOAD_SECONDS", 0.0)


async def test_certificates_are_replaced_under_running_servers_and_channels(tmp_path: Path, at_once: None) -> None:
    certificates.make(tmp_path)
    server, address = await serve(tmp_path, Role.WORKER)
    async with open_channel(address, client_tls(tmp_path, Role.ROUTER)) as channel:
        stub = decode_pb2_grpc.DecodeStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        first = await _serial(address, tmp_path)
        certificates.make(tmp_path)
        assert await _serial(address, tmp_path) != first, "a new handshake sees the new certificate"
        await stub.Describe(decode_pb2.DescribeDecodeRequest())  # over a new connection
        server.set_ready(True)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING  # still over the old one
        (tmp_path / "router.crt").write_bytes((tmp_path / "worker.crt").read_bytes())  # a certificate without its key
        (tmp_path / "worker.key").unlink()
        await stub.Describe(decode_pb2.DescribeDecodeRequest())
        watching.cancel()
    await server.stop()


async def test_a_channel_opened_while_certificates_are_replaced_uses_the_last_good_ones(
    tmp_path: Path, at_once: None
) -> None:
    """A router opens one to each worker that joins, and a decode worker to each prefill worker."""
    certificates.make(tmp_path)
    server, address = await serve(tmp_path, Role.WORKER)
    tls = client_tls(tmp_path, Role.ROUTER)
    tls.reloaded()  # as each process does when it starts
    certificate = (tmp_path / "router.crt").read_bytes()
    (tmp_path / "router.crt").write_bytes((tmp_path / "worker.crt").read_bytes())  # a certificate without its key
    assert await outcome(address, tls, DESCRIBE) == OK
    (tmp_path / "router.crt").unlink()
    assert await outcome(address, tls, DESCRIBE) == OK
    (tmp_path / "router.crt").write_bytes(certificate)
    certificates.make(tmp_path)
    assert await outcome(address, tls, DESCRIBE) == OK
    await server.stop()


async def test_certificates_revoked_by_a_new_authority_stay_revoked(tmp_path: Path, at_once: None) -> None:
    """A server with a new authority refuses the old certificates; its clients load their new ones."""
    certificates.make(tmp_path)
    server, address = await serve(tmp_path, Role.WORKER)
    old = client_tls(tmp_path, Role.ROUTER)
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in (old.ca, old.cert, old.key):
        assert path is not None
        (kept / path.name).write_bytes(path.read_bytes())
    async with open_channel(address, old) as channel:
        stub = decode_pb2_grpc.DecodeStub(channel)
        await stub.Describe(decode_pb2.DescribeDecodeRequest())
        (tmp_path / "peers-ca.crt").unlink()
        (tmp_path / "peers-ca.key").unlink()
        certificates.make(tmp_path)
        await stub.Describe(decode_pb2.DescribeDecodeRequest())
    stale = ClientTls(kept / "ca.crt", kept / "router.crt", kept / "router.key", "overfill")
    assert await outcome(address, stale, DESCRIBE) == "handshake"
    await server.stop()


def test_blocking_channels_follow_replaced_certificates(tmp_path: Path, at_once: None) -> None:
    certificates.make(tmp_path)

    async def serving(started: Callable[[str], None], stop: asyncio.Event) -> None:
        server, address = await serve(tmp_path, Role.WORKER)
        server.set_ready(True)
        started(address)
        await stop.wait()
        await server.stop()

    async def run() -> None:
        found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        task = asyncio.create_task(serving(found.set_result, stop))
        address = await found

        def use() -> None:
            with open_sync_channel(address, client_tls(tmp_path, Role.ROUTER)) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                watching = stub.Watch(health_pb2.HealthCheckRequest())
                assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
                connection = channel._connection  # type: ignore[attr-defined]
                certificates.make(tmp_path)
                stub.Check(health_pb2.HealthCheckRequest())
                assert channel._connection is not connection  # type: ignore[attr-defined]
                watching.cancel()

        await asyncio.to_thread(use)
        stop.set()
        await task

    asyncio.run(run())


async def _serial(address: str, folder: Path) -> int:
    """Returns the serial number of the certificate that the server at ``address`` shows now."""
    import ssl

    files = certificates.role_files(folder, Role.ROUTER)
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.cert, files.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=role_dns(None))
    data = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(data).serial_number

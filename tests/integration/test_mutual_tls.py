"""Tests mutual TLS on a stack of real processes: roles, what a listener on the wire sees, rotated certificates."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
import torch
from cryptography import x509
from kv_pulls import pull
from stacks import loads, running_stack, wait_until

from overfill.api import key_file as keys
from overfill.client import Client, ClientTls, OverfillError, SamplingParams
from overfill.kv.peers import PrefillPeer
from overfill.model.manifest import Pair
from overfill.rpc import certificates
from overfill.rpc.access import Role, role_dns
from overfill.rpc.channel import open_sync_channel
from overfill.rpc.tls import Credentials
from overfill.v1 import admin_pb2, admin_pb2_grpc, decode_pb2, registry_pb2, registry_pb2_grpc

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def certs(tmp_path):
    folder = tmp_path / "certs"
    certificates.make(folder)
    return folder


def shown(folder, role):
    files = certificates.role_files(folder, role)
    return ClientTls(files.ca, files.cert, files.key, "overfill")


def test_roles_on_a_whole_stack(tiny_pair, certs):
    """Without API keys, a client's certificate may request answers but not join; a worker's may not request answers."""
    with running_stack(tiny_pair, tls=certs, shm="off") as (_, address):
        with Client(address, tls=shown(certs, Role.CLIENT)) as client:
            assert len(client.generate("Hello", sampling=GREEDY).token_ids) == 8
            workers = client.status().workers
            with pytest.raises(OverfillError, match="operator"):
                client.drain("decode-0")
        with Client(address, tls=shown(certs, Role.WORKER)) as client, pytest.raises(OverfillError, match="client"):
            client.generate("Hello")
        for role in (Role.CLIENT, Role.OPERATOR, Role.SCRAPER):
            with open_sync_channel(address, shown(certs, role)) as channel:
                hello = registry_pb2.JoinRequest(hello=registry_pb2.Hello(worker_id="evil"))
                with pytest.raises(grpc.RpcError) as refused:
                    list(registry_pb2_grpc.RegistryStub(channel).Join(iter([hello]), timeout=10))
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED, role
            for worker in workers:
                channel = open_sync_channel(worker.address, shown(certs, role), role=Role.WORKER)
                with channel, pytest.raises(grpc.RpcError):
                    admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=5)
                client = Client(worker.address, tls=shown(certs, role))
                with client, pytest.raises(OverfillError, match="its role"):  # the worker's is not a router's
                    client.status(timeout=5)
        with Client(address, tls=shown(certs, Role.OPERATOR)) as client:
            client.drain("decode-0")


@contextmanager
def captured():
    """Records all packets on the loopback interface during the block, as a list."""
    packets, stop = [], threading.Event()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(0x0003)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        listener.bind(("lo", 0))
        listener.settimeout(0.05)

        def listen():
            while True:
                try:
                    packets.append(listener.recv(1 << 17))
                except TimeoutError:
                    if stop.is_set():  # everything sent before it has been read by then
                        return

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield packets
        finally:
            stop.set()
            thread.join()


async def kv_of(tiny_pair, worker, prompt, credentials):
    """Pulls the KV of ``prompt`` from ``worker`` as a decode worker does."""
    target = decode_pb2.AssignPrefill(
        worker_id=worker.id, incarnation=worker.process.incarnation, address=worker.address
    )
    pair = Pair.load(tiny_pair)
    peer = PrefillPeer(target, 1, credentials, shm=False)
    try:
        await peer.handshake(pair.kv_identity("float32"))
        with ThreadPoolExecutor(1) as executor:
            cache, _ = await pull(peer, pair.full_config.kv_spec("float32"), pair.layer_map, prompt, executor)
        return cache
    finally:
        await peer.close()


def varints(ids):
    out = bytearray()
    for value in ids:
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


@pytest.mark.skipif(
    not hasattr(socket, "AF_PACKET") or os.geteuid() != 0, reason="listening to an interface requires root"
)
@pytest.mark.parametrize("secured", [False, True], ids=["plain", "tls"])
async def test_a_listener_reads_prompts_and_kv_in_the_clear_only(tiny_pair, tmp_path, certs, secured):
    text = "The eavesdropper of the loopback interface hears this sentence."
    file = tmp_path / "keys.json"
    key = keys.create(file, "ci")
    settings = {"tls": certs} if secured else {}
    with running_stack(tiny_pair, http=0, api_keys=file, shm="off", **settings) as (stack, address):
        operator = shown(certs, Role.OPERATOR) if secured else None
        with captured() as packets:

            def ask():
                with Client(address, tls=shown(certs, Role.CLIENT) if secured else None, api_key=key) as client:
                    ids = client.tokenize(text)
                    client.generate(text, sampling=GREEDY)
                context = ssl.create_default_context(cafile=certs / "ca.crt") if secured else None
                request = urllib.request.Request(
                    f"{stack.spec.openai_urls(stack.placed.addresses)[0]}/completions",
                    json.dumps({"model": "tiny", "prompt": text, "max_tokens": 4}).encode(),
                    {"authorization": f"Bearer {key}", "content-type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=30, context=context) as response:
                    response.read()
                with Client(address, tls=operator, api_key=None if secured else stack.placed.secret) as client:
                    return ids, next(w for w in client.status().workers if w.id == "prefill-0")

            ids, worker = await asyncio.to_thread(ask)
            link = Credentials(shown(certs, Role.WORKER)) if secured else Credentials(None, stack.placed.secret)
            cache = await kv_of(tiny_pair, worker, ids, link)
        blocks = cache.k[0, 0].contiguous().view(torch.uint8).numpy()
    wire = b"\0\0\0\0".join(packets)
    needles = {
        "the prompt": text.encode(),
        "its token ids": varints(ids[:12]),
        "its keys": bytes(blocks[1].tobytes()[:32]),
        "the API key": key.encode(),
    }
    assert any(needles["its keys"]), "KV of zeros would prove nothing"
    found = {what: needle in wire for what, needle in needles.items()}
    print(f"{len(packets)} packets, {len(wire)} bytes: {found}")
    assert len(wire) > 10_000
    assert found == dict.fromkeys(needles, not secured)


def serial(address, folder):
    """Returns the serial number of the certificate that the server shows now."""
    files = certificates.role_files(folder, Role.ROUTER)
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.cert, files.key)
    context.set_alpn_protocols(["h2", "http/1.1"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=role_dns(None)) as connection,
    ):
        return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True)).serial_number


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rotation_under_load_loses_no_request(tiny_pair, certs, tmp_path):
    file = tmp_path / "keys.json"
    key = keys.create(file, "load")
    rotations, answered, failures, stop = 5, [], [], threading.Event()
    with running_stack(tiny_pair, decode=2, http=0, tls=certs, api_keys=file, shm="off") as (stack, address):
        operator = shown(certs, Role.OPERATOR)
        url = f"{stack.spec.openai_urls(stack.placed.addresses)[0]}/completions"
        http_address = url.split("/")[2]

        def by_grpc(kept):
            client = Client(address, tls=shown(certs, Role.CLIENT), api_key=key)
            while not stop.is_set():
                answer = client.generate([20, 30, 40], sampling=SamplingParams(max_tokens=40, ignore_eos=True))
                assert len(answer.token_ids) == 40
                answered.append("grpc")
                if not kept:
                    client.close()
                    client = Client(address, tls=shown(certs, Role.CLIENT), api_key=key)
            client.close()

        def by_http():
            body = json.dumps({"model": "tiny", "prompt": [20, 30], "max_tokens": 20}).encode()
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            while not stop.is_set():
                context = ssl.create_default_context(cafile=certs / "ca.crt")
                request = urllib.request.Request(url, body, headers)
                with urllib.request.urlopen(request, timeout=60, context=context) as response:
                    json.load(response)
                answered.append("http")

        def run(work, *arguments):
            try:
                work(*arguments)
            except Exception as error:
                failures.append(f"{work.__name__}: {error!r}")

        with Client(address, tls=operator) as client:
            ports = [address, http_address, *(worker.address for worker in client.status().workers)]
            incarnations = {worker.id: worker.process.incarnation for worker in client.status().workers}
        serials = {port: {serial(port, certs)} for port in ports}
        threads = [
            threading.Thread(target=run, args=a)
            for a in ((by_grpc, True), (by_grpc, True), (by_grpc, False), (by_http,))
        ]
        for thread in threads:
            thread.start()
        for rotation in range(rotations):
            before = len(answered)
            certificates.make(certs)
            for port in ports:
                wait_until(lambda p=port: (s := serial(p, certs)) not in serials[p] and not serials[p].add(s), 20, port)
            wait_until(lambda b=before: len(answered) > b + 4 or failures, 60, f"answers after rotation {rotation}")
        stop.set()
        for thread in threads:
            thread.join(60)
        with Client(address, tls=operator) as client:
            assert {w.id: w.process.incarnation for w in client.status().workers} == incarnations, "restarted"
        assert all(len(seen) == rotations + 1 for seen in serials.values())
        assert loads(address, operator)
    print(f"{rotations} rotations on {len(ports)} ports, {len(answered)} answers, {len(failures)} failed")
    assert not failures
    assert {"grpc", "http"} <= set(answered)

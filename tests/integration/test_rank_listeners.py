"""Tests the network of a worker with ranks: who may call them, where they listen, and that they end with the worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ranked_worker
from listening import listening

from overfill.errors import PermissionDenied, TransferFailed, Unauthenticated, Unreachable
from overfill.kv.wire import pull_kv
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.addresses import split_address
from overfill.rpc.calls import responses
from overfill.rpc.channel import open_channel
from overfill.rpc.tls import ClientTls, Credentials
from overfill.v1 import prefill_pb2

SECRET = "the secret of this stack"


def run(pair, *flags):
    command = [sys.executable, ranked_worker.__file__, f"--pair={pair}", "--engine=mock", "--dtype=float32"]
    path = os.pathsep.join([str(Path(ranked_worker.__file__).parents[2]), str(Path(ranked_worker.__file__).parent)])
    return subprocess.Popen(
        [*command, "--metrics-port=off", *flags],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def worker(pair, *flags):
    """Runs a worker, and yields its process, address, shares and ranks. Nothing of it runs or listens in the end."""
    with run(pair, *flags) as process:
        try:
            found = json.loads(process.stdout.readline())
            ranks = [psutil.Process(pid) for pid in found["pids"]]
            yield SimpleNamespace(process=process, ranks=ranks, **found)
            assert not psutil.wait_procs(ranks, 60)[1]
        finally:
            for one in psutil.Process(process.pid).children() if process.poll() is None else []:
                one.kill()
            process.kill()


def free_ports():
    """Returns the first of two free ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


async def error_of(address, credentials):
    """What a call of PullKv ends with."""
    async with open_channel(address, credentials) as channel:
        try:
            request = prefill_pb2.PullKvRequest(transfer_id=bytes(16))
            await anext(responses(pull_kv(channel, request, 20), "rank"))
        except Exception as error:
            return type(error)


async def test_ranks_admit_workers_only_and_listen_where_they_were_told(tiny_pair, tmp_path):
    certificates.make(tmp_path)

    def shown(role):
        files = certificates.role_files(tmp_path, role)
        return ClientTls(files.ca, files.cert, files.key, certificates.NAME)

    files, port = shown(Role.WORKER), free_ports()
    tls = [f"--tls-cert={files.cert}", f"--tls-key={files.key}", f"--tls-ca={files.ca}", "--tls-name=overfill"]
    with worker(tiny_pair, *tls, f"--data-port={port}") as it:
        assert it.shares == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
        pids = [it.process.pid, *it.pids]
        listens = {number for _, _, number in listening(pids)}
        assert listens == {port, port + 1, split_address(it.address)[1]}
        assert all(host.is_loopback for _, host, _ in listening(pids))
        for address in it.shares:
            assert await error_of(address, None) is Unreachable, "without TLS"
            assert await error_of(address, shown(Role.CLIENT)) is Unreachable, "of another authority"
            assert await error_of(address, shown(Role.ROUTER)) is PermissionDenied
            assert await error_of(address, shown(Role.WORKER)) is TransferFailed, "it has no such transfer"
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(60) == 0


async def test_ranks_want_the_secret_of_the_stack(tiny_pair, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    with worker(tiny_pair, f"--stack-secret={secret}") as it:
        for address in it.shares:
            assert await error_of(address, None) is Unauthenticated
            assert await error_of(address, Credentials(secret=SECRET)) is TransferFailed
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(60) == 0


@pytest.mark.parametrize("whom", ["worker", "rank", "frozen"])
def test_a_worker_and_its_ranks_end_together(tiny_pair, whom):
    with worker(tiny_pair) as it:
        if whom == "worker":
            it.process.kill()
        elif whom == "rank":
            it.ranks[0].kill()
        else:
            it.ranks[0].suspend()
        code = it.process.wait(60)
        if whom == "frozen":  # in a real worker, the executor kills it
            it.ranks[0].kill()
        if whom != "worker":
            assert code == 1
            assert f"rank 0 (process {it.pids[0]}) is lost" in it.process.stderr.read()


def test_a_rank_that_cannot_listen_ends_the_start(tiny_pair):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with run(tiny_pair, f"--data-port={port}") as process:
            _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}: the port is in use" in stderr
    assert "Traceback" not in stderr

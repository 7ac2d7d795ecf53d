"""Tests ranks in processes of their own: who may call them, where they listen, and how they end.

The worker has no model, and neither have the ranks.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ranked_worker
from listening import free_ports, listening
from rank_agents import rank_process, running_ranks

from overfill.engine.sequence import KvWritten
from overfill.engine.vllm.ranks.link import RankLinks
from overfill.engine.vllm.ranks.worker import WorkerRanks
from overfill.errors import PermissionDenied, TransferFailed, Unauthenticated, Unavailable, Unreachable
from overfill.kv.chunks import TransferSpec
from overfill.kv.ranks import Pull
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import pull_kv
from overfill.rpc import certificates
from overfill.rpc.access import AccessPolicy, Role
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


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_rank_that_ends_or_freezes_during_a_pull_ends_it_in_bounded_time(end):
    kv, lost, shares = KvSpec(2, 2, 4, "float32", RopeSpec()), [], [(0, 1), (1, 2)]
    links = RankLinks(2, lambda rank, reason: lost.append(rank), silence=ranked_worker.SILENCE)
    ranks = [rank_process(links, rank, kv, heads) for rank, heads in enumerate(shares)]
    try:
        with running_ranks(kv, [(0, 2)]) as prefill:
            decode = WorkerRanks(links, await asyncio.to_thread(links.wait, 60), kv)
            sources = await prefill.kv.serve("127.0.0.1", 0, None, AccessPolicy(), None)
            await decode.connect(1, None)
            spec, moved = TransferSpec(bytes(16), 1, kv, (0, 1), (0, 8)), asyncio.Queue()
            await prefill.kv.open(spec, [0, 1], 0)
            pull = asyncio.create_task(
                decode.puller.pull(Pull("p", spec, (0, 1), [0, 1], sources, None), lambda news: moved.put_nowait(news))
            )
            prefill.agents[0].mark_ready([KvWritten(spec.transfer_id.hex(), range(1), 8, None)])
            await moved.get()
            ranks[1].send_signal(end)
            with pytest.raises(Unavailable, match="rank 1"):  # the other rank's pull has been cancelled and joined
                await pull
            assert lost == [1]
            await prefill.kv.stop()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        links.close()


@contextmanager
def worker(pair, *flags):
    """Runs a worker, and yields its process, address, shares and ranks. Nothing of it runs or listens in the end."""
    with run(pair, *flags) as process:
        ranks = []
        try:
            found = json.loads(process.stdout.readline())
            ranks = [psutil.Process(pid) for pid in found["pids"]]
            yield SimpleNamespace(process=process, ranks=ranks, **found)
            assert not psutil.wait_procs(ranks, 60)[1]
        finally:
            process.kill()
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.kill()


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
        return ClientTls(files.ca, files.cert, files.key, "overfill")

    files, port = shown(Role.WORKER), free_ports(2)
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
        assert it.process.stdout.read() == "0\n", "its ranks had no listener in the end"


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
        assert it.process.stdout.read() == "0\n", "its ranks had no listener in the end"


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

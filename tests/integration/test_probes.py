"""Tests the port of probes of real processes: while they load, hang, and are flooded, and with other ports blocked."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from charts import ROOT, probe
from stacks import ForkedChild, wait_until

from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.stack.child import Child, stop
from overfill.stack.ports import free_ports

HOST, KUBELET = "127.0.0.1", "127.0.0.2"
PROBES = ("livez", "readyz", "startupz")


def start(name: str, module: str, lines: list[str], *arguments: str) -> Child:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return ForkedChild(name, [sys.executable, "-m", module, *arguments], env, lambda _, line: lines.append(line))


class Worker:
    """A worker with certificates, held up while it loads."""

    def __init__(self, folder: Path, connection_seconds: float) -> None:
        certificates.make(folder, roles=[Role.WORKER])
        own = certificates.role_files(folder, Role.WORKER)
        self._gate = folder / "gate"
        os.mkfifo(self._gate)
        self.port, self.metrics = free_ports(HOST, 2)
        self.lines: list[str] = []
        tls = [f"--tls-cert={own.cert}", f"--tls-key={own.key}", f"--tls-ca={own.ca}"]
        ports = [f"--probe-port={self.port}", f"--metrics-port={self.metrics}"]
        held_up = [str(self._gate), str(connection_seconds)]
        flags = ["--pair=mock", "--engine=mock", *tls, *ports]
        self.child = start("worker", "tests.support.probed_worker", self.lines, *held_up, *flags)
        wait_until(self.listens, 60, "the worker listens for probes")

    def listens(self) -> bool:
        assert self.child.returncode is None, "\n".join(self.lines)
        try:
            return bool(self.answers())
        except OSError:
            return False

    def answers(self) -> dict[str, int]:
        return {name: probe(HOST, self.port, f"/{name}", 30)[0] for name in PROBES}

    def go_on(self) -> None:
        self._gate.write_bytes(b"")


@pytest.fixture
def worker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Worker]:
    made = Worker(tmp_path, getattr(request, "param", 60.0))
    try:
        yield made
    except BaseException:
        print("\n".join(made.lines))
        raise
    finally:
        os.kill(made.child.pid, signal.SIGKILL)
        stop([made.child], 20)


def test_probes_are_answered_while_a_worker_loads_and_while_its_event_loop_hangs(worker: Worker) -> None:
    assert worker.answers() == {"livez": 200, "readyz": 503, "startupz": 503}, "it loads"
    worker.go_on()
    wait_until(lambda: set(worker.answers().values()) == {200}, 60, "the worker has started")
    os.kill(worker.child.pid, signal.SIGUSR1)
    hung = {"livez": 503, "readyz": 503, "startupz": 200}
    wait_until(lambda: worker.answers() == hung, 60, "the event loop hangs")
    assert "the event loop has not run for" in probe(HOST, worker.port, "/livez")[1]
    worker.go_on()
    wait_until(lambda: set(worker.answers().values()) == {200}, 60, "the event loop runs again")


def test_a_blocked_metrics_port_fails_no_probe(worker: Worker) -> None:
    worker.go_on()
    wait_until(lambda: set(worker.answers().values()) == {200}, 60, "the worker has started")
    with socket.create_connection((HOST, worker.metrics), 0.5) as scrape:
        scrape.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        with pytest.raises(TimeoutError):
            scrape.recv(1)
        assert set(worker.answers().values()) == {200}


def test_a_flood_ends_no_probe(worker: Worker) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    held: list[socket.socket] = []
    with contextlib.ExitStack() as stack:

        def flood() -> None:
            for number in range(100):
                held.append(stack.enter_context(socket.create_connection((HOST, worker.port), 30)))
                held[-1].sendall(b"\x16" * (number % 2))  # half of them begin a handshake

        for _ in range(5):
            flood()
            slow = stack.enter_context(socket.create_connection((HOST, worker.port), 30, (KUBELET, 0)))
            flood()
            slow = stack.enter_context(context.wrap_socket(slow))
            flood()
            slow.sendall(b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
            assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
        assert probe(HOST, worker.port, "/livez", 30)[0] == 200, "a new one displaces old ones of its own address"
        with contextlib.suppress(ConnectionError):  # the number of open connections is limited
            assert held[0].recv(1) == b""


@pytest.mark.parametrize("worker", [0.5], indirect=True)
def test_a_connection_has_a_deadline(worker: Worker) -> None:
    with socket.create_connection((HOST, worker.port), 0.1) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"\x16\x03\x01\x02\x00")  # announces 512 bytes of a handshake
        for _ in range(300):
            try:
                assert connection.recv(1) == b""
                return
            except TimeoutError:
                connection.sendall(b"\x01")
        raise AssertionError("each byte gives the client more time")


def test_a_router_says_which_workers_it_lacks_until_they_have_joined() -> None:
    router_port, worker_port, grpc = free_ports(HOST, 3)
    lines: list[str] = []

    def answer(port: int, name: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/{name}", timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    mock = ("--pair=mock", "--metrics-port=off")
    children = [start("router", "services.router.main", lines, *mock, f"--port={grpc}", f"--probe-port={router_port}")]
    try:
        wait_until(lambda: answer(router_port, "startupz")[0] == 200, 60, "the router has started")
        assert answer(router_port, "livez") == (200, "ok\n")
        assert answer(router_port, "readyz") == (503, "no prefill worker and no decode worker is ready\n")
        joins = (f"--routers={HOST}:{grpc}", f"--probe-port={worker_port}", "--engine=mock")
        children.append(start("worker", "services.colocated.main", lines, *mock, *joins))
        wait_until(lambda: answer(router_port, "readyz")[0] == 200, 60, "\n".join(lines))
        wait_until(lambda: answer(worker_port, "readyz")[0] == 200, 60, "the worker has joined")
    except BaseException:
        print("\n".join(lines))
        raise
    finally:
        stop(children, 20)

"""Starts services in forks of a process that has imported torch and gRPC, which saves each of them 2 s of CPU.

A fork runs ``python -m MODULE ARGUMENTS`` in its own environment. It imports the code under test itself.
As a program, this file is the server that forks: it reads jobs from the socket that is its standard input.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NoReturn

_PRELOADED = (
    *("torch", "numpy", "grpc.aio", "grpc_health.v1.health_pb2_grpc", "grpc_reflection.v1alpha.reflection"),
    *("google.rpc.status_pb2", "pydantic", "prometheus_client", "jinja2.sandbox", "tokenizers", "safetensors"),
    *("llguidance", "xxhash", "yaml", "psutil", "rich.console"),
)
_NUMBER = struct.Struct("q")
_MAX_JOB = 100_000  # bytes


class Forked:
    """A process that runs ``python -m MODULE ARGUMENTS``, with what ``subprocess.Popen`` has of it."""

    def __init__(self, module: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self._lock = threading.Lock()
        job = json.dumps([module, list(arguments), dict(env), os.getcwd()]).encode()
        output, its_output = os.pipe()
        self._numbers, its_numbers = os.pipe()  # its id, and when it has ended its exit status
        socket.send_fds(_server(), [job], [its_output, its_numbers])
        os.close(its_output)
        os.close(its_numbers)
        self.stdout = os.fdopen(output, encoding="utf-8", errors="replace")
        self.pid = self._number()

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None while the process runs."""
        return self._status(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status once the process has ended, or raises ``TimeoutExpired``."""
        if (status := self._status(timeout)) is None:
            raise subprocess.TimeoutExpired("forked process", timeout or 0.0)
        return status

    def _status(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._numbers], [], [], timeout)[0]:
            with self._lock:
                if self.returncode is None:
                    self.returncode = self._number()
        return self.returncode

    def _number(self) -> int:
        """The next number; as for a process that was killed if the server is no more."""
        data = os.read(self._numbers, _NUMBER.size)
        return _NUMBER.unpack(data)[0] if data else -signal.SIGKILL

    def __del__(self) -> None:
        os.close(self._numbers)


def run(module: str, *arguments: str, env: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Runs ``python -m MODULE ARGUMENTS`` to its end. Returns the exit status and the output."""
    process = Forked(module, arguments, env)
    with process.stdout as output:
        text = output.read()
    return process.wait(), text


@cache
def _server() -> socket.socket:
    """Starts the server, which ends with this process, and returns the socket for jobs."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        server = subprocess.Popen([sys.executable, __file__], stdin=its, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def main() -> None:
    """Forks until the other side of the socket closes. The forks then end too."""
    for module in _PRELOADED:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread only"
    gc.freeze()
    jobs = socket.socket(fileno=0)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running: dict[int, int] = {}
    while True:
        ready = select.select([jobs, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            _report(running)
        if jobs in ready:
            job, descriptors, _, _ = socket.recv_fds(jobs, _MAX_JOB, 2)
            if not job:
                return
            output, numbers = descriptors
            server, pid = os.getpid(), os.fork()
            if not pid:
                for descriptor in (woken, wakes, numbers, *running.values()):
                    os.close(descriptor)
                _run(server, output, *json.loads(job))
            os.close(output)
            running[pid] = numbers
            os.write(numbers, _NUMBER.pack(pid))


def _report(running: dict[int, int]) -> None:
    """Sends the exit status of each process that has ended."""
    while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        numbers = running.pop(ended[0])
        with contextlib.suppress(BrokenPipeError):  # nothing waits for it
            os.write(numbers, _NUMBER.pack(os.waitstatus_to_exitcode(ended[1])))
        os.close(numbers)


def _run(server: int, output: int, module: str, arguments: list[str], env: dict[str, str], folder: str) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != server:
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, output, output)):
        os.dup2(descriptor, number)
    os.close(nothing)
    os.close(output)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *arguments]
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        else:
            status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as with python -m
    main()

"""Tests how a worker process ends: when it has served, when it cannot start, and on a signal."""

import signal
import subprocess
import sys

import pytest
import torch

from services.hosting import _step_timeouts

WORKER = """
import asyncio, concurrent.futures, sys, threading, torch
from overfill.settings.config import DecodeConfig
from services.hosting import run_worker_process
from overfill.errors import InvalidPair
from overfill.rpc.tls import TlsError

async def fails(error):
    raise error

async def loads():
    print("loading", flush=True)
    await asyncio.to_thread(threading.Event().wait)

async def leaves(code):
    # The interpreter would join this thread at an orderly exit, and the thread never ends.
    concurrent.futures.ThreadPoolExecutor().submit(threading.Event().wait)
    asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
    print("served", end="")
    return code

async def breaks():
    raise KeyError("a bug")

config = DecodeConfig.parse(["--pair=x", "--routers=127.0.0.1:1", "--threads=1"])
run_worker_process(lambda config, on_ready: {}, config)
"""


def worker(serve, *flags):
    code = WORKER.replace("{}", serve).replace('"--threads=1"', str(["--threads=1", *flags])[1:-1])
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "error",
    ["TlsError('cannot read the key')", "InvalidPair('no pair.json')", "torch.OutOfMemoryError('no memory\\nstack')"],
)
def test_an_expected_failure_is_one_line_and_exit_code_1(error):
    with worker(f"fails({error})") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1


def test_a_file_that_cannot_be_read_is_found_before_the_model_is_loaded(tmp_path):
    missing = tmp_path / "tls"
    with worker(
        "loads()", f"--tls-cert={missing}.crt", f"--tls-key={missing}.key", f"--tls-ca={missing}.ca"
    ) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "")
    assert stderr.startswith(f"error: cannot read the TLS server key {missing}.key: No such file")
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_the_process_in_silence(number):
    with worker("loads()") as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert stderr == ""


@pytest.mark.parametrize("code", [0, 1])
def test_the_process_ends_with_its_service_even_if_threads_still_run(code):
    with worker(f"leaves({code})") as process:
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, stdout, stderr) == (code, "served", "")


def test_an_unexpected_failure_shows_where_and_is_exit_code_1():
    with worker("breaks()") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "in breaks" in stderr
    assert "KeyError: 'a bug'" in stderr


def test_only_a_gpu_and_ranks_limit_steps_by_default_and_give_their_first_steps_time_to_compile():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert _step_timeouts(None, cpu, ranks=False) == (None, None)
    assert _step_timeouts(None, cuda, ranks=False) == _step_timeouts(None, cpu, ranks=True) == (60.0, 600.0)
    assert _step_timeouts(5.0, cuda, ranks=False) == _step_timeouts(5.0, cpu, ranks=False) == (5.0, 5.0)

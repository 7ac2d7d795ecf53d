"""Runs the shipped Serve config on three machines: one is lost under load, another joins, an upgrade replaces all.

The machines are containers. Certificates, API keys and Ray's tokens are in use, as the config's comments propose.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import ssl
import threading
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
from ray_hosts import RayHosts, host
from shipped_config import for_several_machines
from stacks import wait_until

from overfill.api import key_file as keys
from overfill.client import Answer, Client, SamplingParams, StackStatus
from overfill.errors import OverfillError
from overfill.pair.reference import TwoStageReference, judge
from overfill.rpc.access import Role
from overfill.rpc.certificates import make, role_files
from overfill.rpc.tls import ClientTls

pytestmark = [pytest.mark.images, pytest.mark.timeout(900)]

USER = 10001  # of the images
TOKENS = 600  # long enough that the loss of a machine meets requests in flight
STREAMS = 4
_PAUSE = 0.2  # seconds between two requests of a stream, so that Ray gets some of two cores
_POLL = 0.5


class Stack:
    """The application's routers, as clients with a certificate and a key see them."""

    def __init__(self, tls: ClientTls, api_key: str) -> None:
        self.tls, self.api_key = tls, api_key

    def client(self, *machines: int) -> Client:
        return Client(",".join(f"{host(n)}:7600" for n in machines), tls=self.tls, api_key=self.api_key)

    def status(self, machine: int) -> StackStatus | None:
        """Returns what the router on a machine says; None if no router answers there."""
        try:
            with self.client(machine) as client:
                return client.status()
        except OverfillError:
            return None

    def wait_complete(self, *machines: int) -> set[str]:
        """Waits until each machine has a router with two workers of each stage. Returns the workers' ids."""

        def complete(machine: int) -> bool:
            status = self.status(machine)
            return status is not None and status.complete

        for machine in machines:
            wait_until(lambda m=machine: complete(m), 240, f"the stack is complete on {machine}", _POLL)
        return self.workers(machines[0])

    def ask_over_http(self, machine: int, api_key: str) -> int:
        """Sends a request without a certificate to OpenAI's endpoint of a machine. Returns the status of the answer."""
        url = f"https://{host(machine)}:8000/v1/completions"
        body = json.dumps({"model": "pair", "prompt": "Hello", "max_tokens": 2}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {api_key}"}
        trust = ssl.create_default_context(cafile=self.tls.ca)
        trust.check_hostname = False  # the certificate names the stack
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, body, headers), context=trust, timeout=60
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def workers(self, machine: int) -> set[str]:
        """Returns the ids of the workers that answer the router on a machine."""
        status = self.status(machine)
        return set() if status is None else {w.id for w in status.workers if w.process is not None}


class Load:
    """Streams of greedy requests, one after another on each, inside a ``with`` block. Each begins at another router."""

    def __init__(self, stack: Stack, prompts: list[list[int]], machines: tuple[int, ...]) -> None:
        self.answers: list[tuple[int, Answer]] = []
        self.errors: list[Exception] = []
        self._stack, self._prompts, self._machines = stack, prompts, machines
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(len(self._prompts))
        for index in range(len(self._prompts)):
            self._pool.submit(self._ask, index)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def wait_for_answers(self, count: int) -> None:
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted or self.errors, 120, f"{count} more answers")
        assert self.errors == []

    def _ask(self, index: int) -> None:
        first = index % len(self._machines)
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
        with self._stack.client(*self._machines[first:], *self._machines[:first]) as client:
            while not self._stop.wait(_PAUSE):
                try:
                    answer = client.generate(self._prompts[index], sampling=sampling, timeout=180)
                    self.answers.append((index, answer))
                except Exception as error:
                    self.errors.append(error)


@pytest.fixture
def certificates(tmp_path: Path) -> tuple[Path, Stack]:
    """Returns the files that the config names, readable for the images' user, and a client that uses them."""
    folder = tmp_path / "files"
    make(folder / "certs")
    api_key = keys.create(folder / "api-keys.json", "load")
    for file in folder.rglob("*"):
        os.chown(file, USER, USER)
    client = role_files(folder / "certs", Role.CLIENT)
    return folder, Stack(ClientTls(client.ca, client.cert, client.key, "overfill"), api_key)


@pytest.fixture
def config() -> dict[str, Any]:
    config = for_several_machines()
    args = config["applications"][0]["args"]
    args["pair"] = "/pair"
    args["settings"] |= {"grace_period": 5, "dtype": "float32", "max_model_len": 1024, "kv_memory": "8MiB"}
    for pool in ("router", "prefill", "decode"):
        args[pool]["replicas"] = 2
    for pool in ("prefill", "decode"):
        args[pool]["max_replicas"] = 2
    return config


def test_a_lost_machine_a_new_one_and_an_upgrade_fail_no_request(
    images: dict[str, str], tiny_pair: Path, certificates: tuple[Path, Stack], config: dict[str, Any], tmp_path: Path
) -> None:
    files, stack = certificates
    pair = shutil.copytree(tiny_pair, tmp_path / "pair")
    (serve := tmp_path / "config").mkdir()
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    choose = random.Random(7)
    prompts = [[choose.randrange(10, 500) for _ in range(20 + 30 * index)] for index in range(STREAMS)]
    with RayHosts(files, pair, serve, secrets.token_hex(32)) as hosts:
        try:
            hosts.add(1, 2)
            hosts.deploy(config)
            first = stack.wait_complete(1, 2)
            assert [stack.ask_over_http(machine, key) for machine in (1, 2) for key in ("wrong", stack.api_key)] == [
                401, 200, 401, 200,
            ]  # fmt: skip
            status = stack.status(2)
            assert status is not None
            assert (status.process.metrics_address or "").startswith(f"{host(2)}:")
            with Load(stack, prompts, (1, 2, 3)) as load:
                load.wait_for_answers(2 * STREAMS)
                hosts.kill(2)
                load.wait_for_answers(2 * STREAMS)
                hosts.add(3)
                second = stack.wait_complete(1, 3)
                assert len(second & first) == 2, "the other machine's workers have stayed"
                load.wait_for_answers(2 * STREAMS)
                config["applications"][0]["args"]["settings"]["max_num_seqs"] = 32
                hosts.deploy(config)
                wait_until(
                    lambda: any(len(now := stack.workers(n)) == 4 and not now & second for n in (1, 3)),
                    240, "all workers are new", _POLL,
                )  # fmt: skip
                stack.wait_complete(1, 3)
                load.wait_for_answers(2 * STREAMS)
        except BaseException:
            print(hosts.logs())
            raise
    assert load.errors == []
    reference = TwoStageReference(tiny_pair)
    answers = Counter((index, tuple(answer.token_ids), answer.finish_reason) for index, answer in load.answers)
    wrong = [
        (index, ids)
        for index, ids, reason in answers
        if not judge(reference, prompts[index], ids, reason, TOKENS).correct
    ]
    moved = sum(answer.migrations > 0 or answer.routers > 1 for _, answer in load.answers)
    print(f"{answers.total()} answers, {len(answers)} of them distinct, {len(wrong)} wrong, {moved} moved, none failed")
    assert wrong == []
    assert moved

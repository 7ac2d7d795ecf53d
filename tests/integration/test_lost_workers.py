"""Tests `overfill status`, gRPC health and `GET /health` while workers are lost."""

from __future__ import annotations

import json
import os
import signal

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http_calls import call
from stacks import mocked, running_stack, wait_until

from overfill.cli.main import main
from overfill.client import Client, SamplingParams
from overfill.rpc.channel import open_sync_channel


class StackProbe:
    """Asks one router by command, gRPC and HTTP."""

    def __init__(self, stack, address, capsys):
        self.address = address
        self._url = stack.spec.openai_urls(stack.placed.addresses)[0].removesuffix("/v1")
        self._capsys = capsys

    def command(self, *arguments):
        """Runs a command; returns exit code and stdout."""
        self._capsys.readouterr()
        code = main(list(arguments))
        return code, self._capsys.readouterr().out

    def status(self):
        """Returns the exit code of `status`, and the state in the first line of its table."""
        code, out = self.command("status", "--address", self.address)
        return code, out.splitlines()[0].split("; ")[0].removeprefix(f"{self.address}: ")

    def http(self):
        reply = call(f"{self._url}/health")
        return reply.status, json.loads(reply.body)

    def health(self):
        """Returns exit code and answer of readiness, and exit code of liveness."""
        ready, answer = self.command("health", "--address", self.address)
        return ready, answer.strip(), self.command("health", "--live", "--address", self.address)[0]

    def assert_serving(self, state):
        # The checks run one after another, and a worker that has just returned may show only in the later ones.
        wait_until(lambda: self.status() == (0, state), 30, f"the status is {state}")
        wait_until(lambda: self.health() == (0, "SERVING", 0), 30, "the health is SERVING")
        wait_until(lambda: self.http() == (200, {"status": "ok"}), 30, "HTTP's health is ok")
        with Client(self.address) as client:
            assert len(client.generate("x", sampling=SamplingParams(max_tokens=3)).token_ids) == 3

    def assert_unavailable(self, state, reason):
        assert self.status() == (1, f"no request can be answered: {state}")
        assert self.health() == (1, "NOT_SERVING", 0)
        assert self.http() == (503, {"status": "unavailable", "reason": reason})

    def pools(self):
        with Client(self.address) as client:
            return {stage: (pool.ready, pool.expected) for stage, pool in client.status().pools.items()}


def kill(stack, name):
    child = stack.worker(name)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: child.returncode is not None, 30, f"{name} is dead")


@pytest.fixture
def probe(tiny_pair, capsys):
    with running_stack(tiny_pair, prefill=1, decode=2, http=0, **mocked()) as (stack, address):
        yield stack, StackProbe(stack, address, capsys)


def test_health_and_status_follow_the_workers_that_are_there_now(probe):
    stack, probe = probe
    probe.assert_serving("complete")

    kill(stack, "decode-1")
    wait_until(lambda: probe.pools()["decode"] == (1, 2), 30, "the decode worker's loss is seen")
    probe.assert_serving("ready: 1 of 2 decode")

    kill(stack, "prefill-0")
    wait_until(lambda: probe.http()[0] == 503, 30, "the only prefill worker's loss is seen")
    probe.assert_unavailable("0 of 1 prefill, 1 of 2 decode", "no prefill worker is ready")
    code, out = probe.command("status", "--json", "--address", probe.address)
    told = json.loads(out)
    assert (code, told["serving"], told["complete"]) == (1, False, False)
    assert told["pools"] == {"prefill": {"ready": 0, "expected": 1}, "decode": {"ready": 1, "expected": 2}}
    assert [worker["id"] for worker in told["workers"]] == ["decode-0"]

    kill(stack, "decode-0")
    wait_until(lambda: probe.pools()["decode"] == (0, 2), 30, "the last decode worker's loss is seen")
    probe.assert_unavailable("0 of 1 prefill, 0 of 2 decode", "no prefill worker and no decode worker is ready")

    for name in ("prefill-0", "decode-0"):
        stack.restart(name)
    wait_until(lambda: probe.http()[0] == 200, 60, "one worker of each stage is back")
    probe.assert_serving("ready: 1 of 2 decode")
    stack.restart("decode-1")
    wait_until(lambda: probe.pools()["decode"] == (2, 2), 60, "all workers are back")
    probe.assert_serving("complete")


def test_a_worker_that_falls_silent_stops_counting_although_its_stream_is_open(probe):
    stack, probe = probe
    with open_sync_channel(probe.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        answers = (answer.status for answer in watching)
        assert next(answers) == health_pb2.HealthCheckResponse.SERVING
        frozen = stack.worker("prefill-0").pid
        os.kill(frozen, signal.SIGSTOP)
        try:
            assert next(answers) == health_pb2.HealthCheckResponse.NOT_SERVING
            probe.assert_unavailable("0 of 1 prefill", "no prefill worker is ready")
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert next(answers) == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()
    wait_until(lambda: probe.pools()["prefill"] == (1, 1), 30, "it answers again")
    probe.assert_serving("complete")

"""Tests a stack of mock workers on a Ray that ``overfill up`` starts; all tests of the file share it."""

from __future__ import annotations

import glob
import ipaddress
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from ray_stacks import Up, cli, status_json, up_on_ray
from stacks import Load, loads, wait_until

from overfill.client import Client, SamplingParams

MOCK = ("--engine=mock", "--grace-period=1", "--log-level=info")
SLOW_STEPS = {"OVERFILL_DECODE_ENGINE_ARGS": '{"step": 0.05, "answer_tokens": 1000000}'}


@pytest.fixture(scope="module")
def up(tiny_pair):
    arguments = (*MOCK, f"--pair={tiny_pair}", "--prefill=1", "--decode=2", "--max-decode=3", "--itl-objective=0.06")
    with up_on_ray(*arguments, environment=SLOW_STEPS) as running:
        yield running


def test_the_stack_answers_and_lists_its_processes(up):
    with Client(up.address) as client:
        answer = client.generate("Hello", sampling=SamplingParams(temperature=0, max_tokens=5))
    assert len(answer.token_ids) == 5
    status = status_json(up.address)
    assert {w["id"].partition("-")[0] for w in status["workers"]} == {"prefill", "decode"}
    assert answer.decode_worker in {w["id"] for w in status["workers"]}
    assert [line for line in up.lines if "joined router" in line], "lines of replicas are shown"
    assert not [line for line in up.lines if "\x1b" in line], "output to a pipe has no colours"


def test_nothing_listens_where_other_machines_could_reach_it(up):
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in up.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 5
    hosts = {ipaddress.ip_address(ip.removeprefix("::ffff:")) for ip, _ in listening}
    assert all(host.is_loopback for host in hosts), listening


def busy_decoder(up):
    """Returns the id of a decode worker that runs sequences."""
    decoders, busy = up.workers("decode"), []

    def found():
        busy[:] = [id for id, load in loads(up.address).items() if id in decoders and load.running]
        return busy

    wait_until(found, 60, "a decode worker with sequences")
    return busy[0]


def test_a_killed_worker_is_replaced_and_no_request_fails(up):
    before = up.workers("decode")
    with Load(up.address, 4, 40) as load:
        load.wait_for_answers(4)
        victim = busy_decoder(up)  # an idle worker would have no request to move
        os.kill(before[victim], signal.SIGKILL)
        wait_until(lambda: victim not in up.workers("decode"), 60, "the router forgets the worker")
        wait_until(lambda: len(up.workers("decode").keys() - before.keys()) >= 1, 120, "another takes its place")
    assert load.errors == []
    assert sum(answer.migrations for answer in load.answers) >= 1


def test_a_drained_worker_is_replaced_after_its_requests_have_migrated(up):
    before = up.workers("decode")
    with Load(up.address, 4, 60) as load:  # an answer takes three seconds, the grace period is one
        load.wait_for_answers(4)
        victim = next(iter(before))
        assert cli("drain", victim, "--address", up.address)[0] == 0
        wait_until(lambda: len(up.workers("decode").keys() - before.keys()) >= 1, 120, "another takes its place")
    assert load.errors == []


def test_a_burst_makes_the_decode_pool_grow(up):
    with Load(up.address, 24, 40) as load:
        wait_until(lambda: len(up.workers("decode")) == 3, 120, "a third decode worker")
    assert load.errors == []
    assert len(up.workers("prefill")) == 1


def test_ctrl_c_finishes_running_requests_and_leaves_no_process_behind(up):
    tree = up.processes()
    with Client(up.address) as client, ThreadPoolExecutor(1) as pool:
        sampling = SamplingParams(temperature=0, max_tokens=10)
        with client.stream("Hello", sampling=sampling) as stream:
            next(iter(stream))
            waiting = pool.submit(up.interrupt)
            tokens = 1 + sum(len(delta.token_ids) for delta in stream)
        waiting.result()
    assert tokens == 10
    assert up.wait() == 0, "\n".join(up.lines)
    wait_until(lambda: not [p for p in tree if p.is_running() and p.status() != "zombie"], 30, "no process is left")
    assert glob.glob(f"/tmp/overfill-ray-{up.process.pid}-*") == []


@pytest.mark.slow
def test_a_stack_that_does_not_fit_says_what_is_short_and_ends(tiny_pair):
    up = Up(*MOCK, f"--pair={tiny_pair}", "--worker-gpus=1", "--worker-cpus=0.1")
    assert up.wait() == 1
    text = "\n".join(up.lines)
    assert "GPU: 2 needed, 0 available" in text
    assert "Traceback" not in text

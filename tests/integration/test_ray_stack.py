"""Tests a stack of two tiers of mock workers on a Ray that ``overfill up`` starts; all tests of the file share it."""

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
from overfill.stack.ray.connection import RayConnection, RayUnavailable

# On two busy cores, Ray's first start has taken more than two minutes.
pytestmark = pytest.mark.timeout(600)

MOCK = ("--engine=mock", "--grace-period=1", "--log-level=info")
SLOW_STEPS = {"OVERFILL_DECODE_ENGINE_ARGS": '{"step": 0.05, "answer_tokens": 1000000}'}


@pytest.fixture(scope="module")
def up(tiny_pair, tmp_path_factory):
    file = tmp_path_factory.mktemp("home") / "file"
    file.touch()
    no_home = {"HOME": str(file / "home")}  # the home folder cannot be written, as in many containers
    tiers = (f"--tier=full={tiny_pair}", f"--tier=fast={tiny_pair}:2,max=3,quantize=int8", "--default-tier=fast")
    with up_on_ray(*MOCK, *tiers, "--prefill=1", "--itl-objective=0.06", environment=SLOW_STEPS | no_home) as running:
        yield running


def fast_workers(up):
    """Returns ``id -> pid`` of the workers of the default tier, which is the one that grows."""
    return up.workers("decode", "fast")


def test_the_stack_answers_and_lists_its_processes(up):
    with Client(up.address) as client:
        answer = client.generate("Hello", sampling=SamplingParams(temperature=0, max_tokens=5))
    assert len(answer.token_ids) == 5
    status = status_json(up.address)
    assert {w["id"].partition("-")[0] for w in status["workers"]} == {"prefill", "decode"}
    assert answer.decode_worker in {w["id"] for w in status["workers"]}
    assert [line for line in up.lines if "joined router" in line], "lines of replicas are shown"
    assert not [line for line in up.lines if "\x1b" in line], "output to a pipe has no colours"


def test_each_tier_is_a_deployment(up):
    assert {tier: len(up.workers("decode", tier)) for tier in ("full", "fast")} == {"full": 1, "fast": 2}
    with Client(up.address) as client:
        for tier, expected in (("full", "full"), ("", "fast")):
            answer = client.generate("Hello", sampling=SamplingParams(temperature=0, max_tokens=5), tier=tier)
            assert (answer.tier, answer.decode_worker in up.workers("decode", expected)) == (expected, True)


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
    decoders, busy = fast_workers(up), []

    def found():
        busy[:] = [id for id, load in loads(up.address).items() if id in decoders and load.running]
        return busy

    wait_until(found, 60, "a decode worker with sequences")
    return busy[0]


def test_a_killed_worker_is_replaced_and_no_request_fails(up):
    before, others = fast_workers(up), up.workers("decode", "full")
    with Load(up.address, 4, 40) as load:
        load.wait_for_answers(4)
        victim = busy_decoder(up)  # an idle worker would have no request to move
        os.kill(before[victim], signal.SIGKILL)
        wait_until(lambda: victim not in fast_workers(up), 60, "the router forgets the worker")
        wait_until(lambda: len(fast_workers(up).keys() - before.keys()) >= 1, 120, "another takes its place")
    assert load.errors == []
    assert sum(answer.migrations for answer in load.answers) >= 1
    assert up.workers("decode", "full") == others, "the other tier's worker has stayed"


def test_a_drained_worker_is_replaced_after_its_requests_have_migrated(up):
    before = fast_workers(up)
    with Load(up.address, 4, 60) as load:  # an answer takes three seconds, the grace period is one
        load.wait_for_answers(4)
        victim = next(iter(before))
        assert cli("drain", victim, "--address", up.address)[0] == 0
        wait_until(lambda: len(fast_workers(up).keys() - before.keys()) >= 1, 120, "another takes its place")
    assert load.errors == []


def test_a_burst_makes_the_decode_pool_grow(up):
    with Load(up.address, 24, 40) as load:
        wait_until(lambda: len(fast_workers(up)) == 3, 120, "a third decode worker")
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


def test_an_error_of_the_system_says_what_to_do(monkeypatch):
    def full(**arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("overfill.stack.ray.connection._init", full)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "restored after the test")
    with pytest.raises(RayUnavailable, match=r"No space left on device; .*--no-ray"):
        RayConnection.start_local(1, show_logs=False)


@pytest.mark.slow
def test_a_stack_that_does_not_fit_says_what_is_short_and_ends(tiny_pair):
    up = Up(*MOCK, f"--pair={tiny_pair}", "--worker-gpus=1", "--worker-cpus=0.1")
    assert up.wait() == 1
    text = "\n".join(up.lines)
    assert "GPU: 2 needed, 0 available" in text
    assert "Traceback" not in text

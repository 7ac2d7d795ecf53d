"""Tests the shipped Serve config on a Ray cluster of several nodes, deployed and changed by Serve's command."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray_stacks import Up, status_json
from stacks import Load, mocked, wait_until

from overfill.client import Client, SamplingParams
from overfill.errors import OverfillError
from overfill.making.tiny import make_tiny_pair
from overfill.stack.ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHIPPED = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"
SERVE = Path(sys.executable).parent / "serve"


class Cluster:
    def __init__(self, nodes, cpus):
        (self.dashboard,) = free_ports("127.0.0.1", 1)
        command = [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), str(nodes), str(cpus)]
        self._process = subprocess.Popen(
            [*command, str(self.dashboard)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self._process.stdout.readline().strip()
        assert self.address

    @property
    def pid(self):
        return self._process.pid

    @property
    def alive(self):
        return self._process.poll() is None

    def deploy(self, config, folder):
        file = folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        done = subprocess.run(
            [SERVE, "deploy", str(file), "-a", f"http://127.0.0.1:{self.dashboard}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def close(self):
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def cluster():
    made = Cluster(nodes=3, cpus=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def config(tiny_pair):
    """The shipped config with mock workers, two routers, and pools that an upgrade never empties."""
    config = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    ports = free_ports("127.0.0.1", 2)
    args = config["applications"][0]["args"]
    args |= {"pair": str(tiny_pair)}
    args["settings"] |= {"grace_period": 2, "engine": "mock"}
    args["router"] |= {"replicas": 2, "ports": ports, "http_ports": []}
    args["prefill"] |= {"replicas": 2}
    args["decode"] |= {"replicas": 2, "settings": {"max_num_seqs": 8} | mocked(step=0.05)}
    return config


def workers(address, stage):
    with Client(address) as client:
        return {w.id for w in client.status().workers if w.stage == stage and w.process is not None}


def complete(address):
    try:
        with Client(address) as client:
            return client.status().complete
    except OverfillError:
        return False


def answers(address):
    """True if the stack serves. ``complete`` cannot be used, because routers started by an upgrade expect its sizes."""
    try:
        with Client(address) as client:
            return (
                client.generate("Hello", sampling=SamplingParams(max_tokens=2), timeout=30).usage.completion_tokens == 2
            )
    except OverfillError:
        return False


def test_the_shipped_config_answers_upgrades_and_shrinks_with_no_failed_request(cluster, config, tmp_path):
    args = config["applications"][0]["args"]
    addresses = [f"127.0.0.1:{port}" for port in args["router"]["ports"]]
    cluster.deploy(config, tmp_path)
    for address in addresses:
        wait_until(lambda a=address: complete(a), 300, "the stack is there")
    both = ",".join(addresses)
    first = {stage: workers(both, stage) for stage in ("prefill", "decode")}
    with Load(both, 4, 80) as load:  # each takes four seconds; a drain allows two
        load.wait_for_answers(4)
        args["decode"]["settings"]["max_num_seqs"] = 16
        cluster.deploy(config, tmp_path)
        for stage, old in first.items():
            wait_until(
                lambda stage=stage, old=old: len(now := workers(both, stage)) >= 2 and not now & old,
                300,
                f"all {stage} workers are new",
            )
        assert load.errors == []
        kept = workers(both, "decode") | workers(both, "prefill")
        one = {"min_replicas": 1, "max_replicas": 1, "downscale_delay_s": 0}
        # According to docs/how-to/ray.md, this change alone restarts no replica.
        config["applications"][0]["deployments"] = [{"name": "decode", "autoscaling_config": one}]
        cluster.deploy(config, tmp_path)
        wait_until(lambda: len(workers(both, "decode")) == 1, 300, "one decode worker is left")
        assert workers(both, "decode") | workers(both, "prefill") < kept
    assert load.errors == []
    # Sequences of a leaving decode worker migrated, or their router left too and the client resumed.
    assert any(answer.migrations or answer.routers > 1 for answer in load.answers)


def test_a_second_stack_starts_and_stops_without_touching_the_first(cluster, config, tiny_pair):
    address = f"127.0.0.1:{config['applications'][0]['args']['router']['ports'][0]}"
    assert answers(address), "the other application runs"
    up = Up(
        "--engine=mock", f"--pair={tiny_pair}", f"--ray-address={cluster.address}", "--name=second", "--worker-cpus=0.1"
    )
    up.wait_ready()
    assert {w["stage"] for w in status_json(up.address)["workers"]} == {"prefill", "decode"}
    up.interrupt()
    assert up.wait() == 0, "\n".join(up.lines)
    assert cluster.alive
    assert answers(address)
    taken = Up("--engine=mock", f"--pair={tiny_pair}", f"--ray-address={cluster.address}", "--worker-cpus=0.1")
    assert taken.wait() == 1
    assert "give another --name" in "\n".join(taken.lines)
    assert answers(address)


def of_revision(address, revision):
    """Returns the ids of a revision's workers that answer."""
    try:
        with Client(address) as client:
            return {w.id for w in client.status().workers if w.revision == revision and w.process is not None}
    except OverfillError:
        return set()


def shares(address):
    """Returns the share of each revision on one router; None while it does not answer."""
    try:
        with Client(address) as client:
            return {revision.name: revision.percent for revision in client.rollout().revisions}
    except OverfillError:
        return None


@pytest.mark.timeout(1200)  # most replicas are replaced twice
def test_new_weights_replace_the_old_ones_with_no_failed_request(cluster, config, tmp_path):
    """The steps of docs/how-to/ray.md."""
    config = copy.deepcopy(config)
    (application,) = config["applications"]
    application.pop("deployments", None)
    args = application["args"]
    for name in ("router", "prefill", "decode"):
        args[name] |= {"num_cpus": 0.1, "replicas": 2}
    addresses = [f"127.0.0.1:{port}" for port in args["router"]["ports"]]
    both = ",".join(addresses)
    cluster.deploy(config, tmp_path)
    for address in addresses:
        wait_until(lambda a=address: complete(a), 300, "the stack is there")
    pools = {name: args[name] for name in ("prefill", "decode")}
    new = {"revision": "r2", "pair": str(make_tiny_pair(tmp_path / "new", seed=1)), **pools}
    with Load(both, 4, 40) as load:  # each takes two seconds
        load.wait_for_answers(4)
        args["canary"] = new
        cluster.deploy(config, tmp_path)
        for address in addresses:
            wait_until(lambda a=address: shares(a) == {"": 100, "r2": 0}, 300, "both revisions are served")
            wait_until(lambda a=address: len(of_revision(a, "r2")) == 4, 300, "the new workers are there")
        load.wait_for_answers(4)
        assert {answer.identity.revision for answer in load.answers} == {""}
        with Client(addresses[0]) as client:
            client.set_rollout("r2", 100)
        wait_until(lambda: shares(addresses[1]) == {"": 0, "r2": 100}, 60, "the other router learns of the change")
        load.wait_for_answers(12)
        assert {answer.identity.revision for answer in load.answers[-4:]} == {"r2"}
        canary = of_revision(both, "r2")
        del args["canary"]
        args |= new
        cluster.deploy(config, tmp_path)
        for address in addresses:
            wait_until(lambda a=address: shares(a) == {"r2": 100}, 300, "only the new revision is served")
            wait_until(
                lambda a=address: len(now := of_revision(a, "r2")) == 4 and not now & canary, 300, "its workers are new"
            )
        load.wait_for_answers(4)
    assert load.errors == []
    assert of_revision(both, "") == set()
    deployments = {name.rpartition("-")[0] for name in of_revision(both, "r2")}
    assert deployments == {name.rpartition("-")[0] for name in canary} == {"prefill-r2", "decode-r2"}

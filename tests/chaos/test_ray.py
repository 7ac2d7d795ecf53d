"""Failures of Ray under a stack: a replica, Serve's controller, a machine's raylet. No answer is lost or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray_stacks import Up
from stacks import Load, wait_until
from test_ray_cluster import Cluster

from overfill.client import Client
from overfill.errors import OverfillError
from overfill.pair.reference import TwoStageReference, judge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOKENS = 48


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(nodes=3, cpus=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def up(cluster: Cluster, tiny_pair: Path) -> Iterator[Up]:
    """Two workers per stage in float32, small enough that the other machines can take over a lost machine's workers."""
    running = Up(
        *("--prefill=2", "--decode=2", "--router=1", "--worker-cpus=0.3", "--dtype=float32", "--kv-memory=4MiB"),
        *("--grace-period=2", "--max-model-len=512", f"--pair={tiny_pair}", f"--ray-address={cluster.address}"),
    )
    running.wait_ready()
    yield running
    running.interrupt()
    running.wait()


def title(process: psutil.Process) -> str:
    """Returns the process's title; empty if the process has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def replicas(of: psutil.Process | None = None) -> dict[int, str]:
    """Returns pid -> deployment of the stack's replicas on this machine; with ``of``, only those of that raylet."""
    found = {}
    for process in psutil.process_iter() if of is None else of.children(recursive=True):
        prefix, _, name = title(process).partition("ServeReplica:overfill:")
        if prefix == "ray::":
            found[process.pid] = name.partition(".")[0].partition(" ")[0]
    return found


def whole(up: Up) -> bool:
    """Returns True if both workers of both stages serve; False too when the router does not answer."""
    try:
        return all(len(up.workers(stage)) == 2 for stage in ("prefill", "decode"))
    except OverfillError:
        return False


def answered(up: Up, pair: Path, inject: Callable[[], None]) -> int:
    """Calls ``inject`` under load, waits for recovery, asserts that all answers are right. Returns the migrations."""
    with Client(up.address) as client:
        prompt = client.tokenize("Once upon a time")
    with Load(up.address, 4, TOKENS) as load:
        load.wait_for_answers(8)
        inject()
        load.wait_for_answers(8)
        wait_until(lambda: whole(up), 300, "all workers are back")
    assert load.errors == []
    reference = TwoStageReference(pair)
    distinct = {(tuple(answer.token_ids), answer.finish_reason) for answer in load.answers}
    assert all(judge(reference, prompt, ids, reason, TOKENS).correct for ids, reason in distinct)
    return sum(answer.migrations for answer in load.answers)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_replica_is_killed(up: Up, tiny_pair: Path, stage: str) -> None:
    def inject() -> None:
        (pid, *_) = up.workers(stage).values()
        psutil.Process(pid).kill()

    answered(up, tiny_pair, inject)


def test_serves_controller_is_killed(up: Up, tiny_pair: Path) -> None:
    """Ray restarts the controller; it then notices the changes that it missed."""

    def inject() -> None:
        (controller,) = [p for p in psutil.process_iter() if title(p).startswith("ray::ServeController")]
        controller.kill()

    assert answered(up, tiny_pair, inject) == 0


def test_the_raylet_of_a_machine_is_killed(up: Up, tiny_pair: Path, cluster: Cluster) -> None:
    """All of its replicas die with it and restart on the other machines."""
    raylets = [p for p in psutil.Process(cluster.pid).children(recursive=True) if p.name() == "raylet"]
    _, *others = sorted(raylets, key=lambda process: process.create_time())  # the first is the cluster's head
    with_workers = [p for p in others if (here := set(replicas(p).values())) and "router" not in here]
    assert with_workers, "a machine with workers and no router"
    gone = set(replicas(with_workers[0]))

    def inject() -> None:
        with_workers[0].kill()
        wait_until(lambda: not gone & set(replicas()), 60, "its replicas die with it")

    answered(up, tiny_pair, inject)

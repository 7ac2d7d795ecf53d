"""Tests how worker processes take turns at a machine's cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from overfill.process import cores
from overfill.process.cores import SharedCores


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "cores"
    file.touch()
    return file


@pytest.fixture
def other(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which is in a step until its input ends."""
    code = f"""
import sys
from pathlib import Path
from overfill.process.cores import SharedCores
with SharedCores(Path({str(path)!r})):
    print("stepping", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stepping\n"
    yield process
    process.kill()
    process.communicate()


def seconds_of_a_turn(own: SharedCores) -> float:
    began = time.monotonic()
    with own:
        return time.monotonic() - began


@pytest.fixture
def own(path: Path) -> Iterator[SharedCores]:
    shared = SharedCores(path)
    yield shared
    shared.close()


def test_a_step_waits_for_the_step_of_another_worker(own: SharedCores, other: subprocess.Popen[str]) -> None:
    ended = 0.3
    timer = subprocess.Popen(["sh", "-c", f"sleep {ended}; kill {other.pid}"])
    assert ended / 2 < seconds_of_a_turn(own) < cores.PATIENCE, "the kernel frees the turn of a process that ends"
    assert seconds_of_a_turn(own) < ended / 2
    timer.wait()


def test_a_frozen_worker_holds_others_up_once(
    path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "PATIENCE", 0.4)
    own = SharedCores(path)
    os.kill(other.pid, signal.SIGSTOP)
    assert seconds_of_a_turn(own) >= 0.4
    assert seconds_of_a_turn(own) < 0.2
    assert seconds_of_a_turn(own) < 0.2
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert seconds_of_a_turn(own) < 0.2
    assert own._patience == 0.4, "it waits for others again"
    own.close()


def test_two_busy_workers_alternate(path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from overfill.process.cores import SharedCores
own = SharedCores(Path({str(path)!r}))
print("ready", flush=True); sys.stdin.readline()
for _ in range(20):
    with own:
        print(time.monotonic(), flush=True)
        time.sleep(0.01)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    steps = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for name, process in enumerate(processes):
        steps += [(float(line), name) for line in process.communicate()[0].split()]
    steps.sort()
    assert all(later - earlier >= 0.009 for (earlier, _), (later, _) in pairwise(steps))
    changes = sum(first[1] != second[1] for first, second in pairwise(steps))
    assert changes > 25, "of 39, if both begin at once"

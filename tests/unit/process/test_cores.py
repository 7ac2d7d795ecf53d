"""Tests how worker processes divide a machine's cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from overfill.process.cores import SIZE, SharedCores


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "cores"
    file.write_bytes(bytes(SIZE))
    return file


def other(path: Path, in_step: bool) -> subprocess.Popen[str]:
    """Starts another process, which enters a step, or only joins, and then waits for its end of input."""
    step = "cores.__enter__()" if in_step else "pass"
    code = f"""
import sys
from pathlib import Path
from overfill.process.cores import SharedCores
cores = SharedCores(Path({str(path)!r}), 4, 4)
{step}
print("ready", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("in_step", "threads"), [(False, 4), (True, 2)])
def test_a_step_leaves_cores_to_workers_that_compute(in_step: bool, threads: int, path: Path) -> None:
    own = SharedCores(path, 4, 4)
    with other(path, in_step) as process:
        with own as share:
            assert share == threads
        process.kill()
    with own as share:
        assert share == 4, "a killed process computes nothing"


def test_a_step_has_one_thread_at_least_and_the_given_number_at_most(path: Path) -> None:
    with other(path, in_step=True) as process:
        with SharedCores(path, 1, 1) as share:
            assert share == 1
        with SharedCores(path, 3, 16) as share:
            assert share == 3
        process.kill()


def test_a_finished_step_counts_no_longer(path: Path) -> None:
    first, second = SharedCores(path, 2, 2), SharedCores(path, 2, 2)
    with first as share, second as rest:
        assert (share, rest) == (2, 1)
    with second as share:
        assert share == 2


def test_a_worker_that_is_started_again_takes_the_slot_of_the_dead_one(path: Path) -> None:
    for _ in range(3):
        with other(path, in_step=True) as process:
            process.kill()
    assert sum(byte != 0 for byte in path.read_bytes()[8:]) == 0

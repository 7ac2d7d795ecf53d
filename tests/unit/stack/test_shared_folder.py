"""Tests the folder that a stack's processes share, and that a killed runner leaves behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from overfill.process.held_folder import hold_folder
from overfill.stack.placed import shared_folder
from overfill.stack.shared import make_shared_folder

RUNNER = """
import time
from overfill.process.held_folder import hold_folder
from overfill.stack.placed import shared_folder
from overfill.stack.shared import make_shared_folder
folder = shared_folder()
make_shared_folder(folder, False)
held = hold_folder(folder)
print(folder, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def made() -> Path:
    folder = shared_folder()
    make_shared_folder(folder, False)
    return folder


@pytest.fixture
def runner() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", RUNNER], stdout=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


def test_the_next_runner_removes_the_folder_of_a_killed_one_only(runner: subprocess.Popen[str]) -> None:
    assert runner.stdout is not None
    left = Path(runner.stdout.readline().strip())
    on_a_cluster = made()  # not held: its stack may outlive its runner
    mine = made()
    with hold_folder(mine):
        assert left.is_dir()
        runner.kill()
        runner.wait()
        made()
        assert not left.exists()
        assert mine.is_dir()
        assert on_a_cluster.is_dir()


def test_the_folder_is_for_this_user_only() -> None:
    assert made().stat().st_mode & 0o77 == 0

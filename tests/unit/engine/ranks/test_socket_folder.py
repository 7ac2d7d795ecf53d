"""Tests of the folder for the sockets of ranks: a killed worker's is removed by the next one, a living one's is not."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from overfill.engine.vllm.ranks.socket_folder import socket_folder

HOLD = """
from overfill.engine.vllm.ranks.socket_folder import socket_folder
with socket_folder() as folder:
    print(folder, flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        folder = Path(process.stdout.readline().strip())
        (folder / "socket").touch()
        os.utime(folder, (0, 0))  # it has begun long ago
        return process, folder

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_worker_s_folder_is_removed_by_the_next_one(holder, tmp_path):
    killed, _ = holder()
    _, in_use = holder()
    killed.kill()
    killed.wait()
    with socket_folder() as folder:
        assert {*tmp_path.iterdir()} == {in_use, Path(folder)}
        assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert [*tmp_path.iterdir()] == [in_use]


def test_links_and_folders_without_a_lock_yet_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    link, new = tmp_path / "overfill-ranks-link", tmp_path / "overfill-ranks-new"
    link.symlink_to(other)
    os.utime(other, (0, 0))
    new.mkdir()
    with socket_folder():
        pass
    assert {*tmp_path.iterdir()} == {other, link, new}

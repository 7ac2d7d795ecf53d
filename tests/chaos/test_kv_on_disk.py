"""A worker that is killed leaves nothing on disk that a later one could serve wrongly, and nothing that grows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_tiers_that_are_killed_in_mid_write_leave_whole_files_and_nothing_grows(tmp_path: Path, rounds: int) -> None:
    command = [sys.executable, "-m", "tests.support.killed_writers", str(tmp_path / "kv"), str(rounds)]
    found = json.loads(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout)
    assert "damaged" not in found  # a rename shows all of a file or nothing
    assert "wrong" not in found
    assert found["whole"] >= rounds
    assert found["most bytes"] <= found["size"]
    assert found["most others"] <= 2  # a lock, and what the last one has not finished
    assert rounds < 100 or found["unfinished"] >= rounds // 10


def test_on_a_full_and_on_a_read_only_file_system_what_is_there_is_read(tmp_path: Path) -> None:
    alone = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    command = [*alone, sys.executable, "-m", "tests.support.small_disk", str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout)
    written = found["full"]["written"]
    assert 0 < written < 8
    assert found == {
        "full": {"written": written, "read": written, "unfinished": 0},
        "read only": {"read": written, "again": written},
    }

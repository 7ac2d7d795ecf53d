"""Tests how much memory a process may allocate: that of the machine, and of the cgroups that limit it."""

from pathlib import Path

import psutil
import pytest

from overfill.process import limits

MIB = 2**20


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Returns a function that puts this process in a cgroup, and one that limits a folder of the tree."""
    monkeypatch.setattr(limits, "_ROOT", tmp_path / "tree")
    monkeypatch.setattr(limits, "_OWN", tmp_path / "own")

    def limit(folder: str, version: int, most: str, used: int, cached: int) -> None:
        path: Path = tmp_path / "tree" / folder
        path.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for name, value in zip(names, (most, used), strict=True):
            (path / name).write_text(f"{value}\n")
        total = "" if version == 2 else "total_"
        (path / "memory.stat").write_text(f"anon 7\n{total}inactive_file {cached}\n")

    return (tmp_path / "own").write_text, limit


def test_without_cgroups_the_machine_s_memory_counts(group):
    assert 0 < limits.available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize("folder", ["", "docker", "docker/abc"])
def test_a_limit_anywhere_above_counts(group, folder):
    enter, limit = group
    enter("0::/docker/abc\n")
    limit("", 2, "max", 90 * MIB, 0)
    limit(folder, 2, str(100 * MIB), 90 * MIB, 30 * MIB)
    assert limits.available_memory() == 40 * MIB


def test_version_1_has_other_names(group):
    enter, limit = group
    enter("9:cpu:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n")
    limit("memory", 1, str(100 * MIB), 90 * MIB, 0)
    assert limits.available_memory() == 10 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(group):
    enter, limit = group
    enter("0::/\n")
    limit("", 2, str(MIB), 2 * MIB, 0)
    assert limits.available_memory() == 0

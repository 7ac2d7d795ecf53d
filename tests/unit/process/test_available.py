"""Tests the memory that a process may allocate, against control groups of both versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from overfill.process.available import available_memory

MIB = 2**20
MACHINE = 2**40
FILES = {
    "v1": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    "v2": ("memory.max", "memory.current", "memory.stat", "inactive_file"),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))


def write(folder: Path, version: str, limit: object, used: int, cached: int) -> None:
    names = FILES[version]
    (folder / names[0]).parent.mkdir(exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / names[2]).write_text(f"anon 5\n{names[3]} {cached}\nactive_file 7\n")


@pytest.mark.parametrize("version", FILES)
def test_a_container_s_limit_counts_without_cached_files(version: str, tmp_path: Path) -> None:
    write(tmp_path, version, 32 * MIB, 20 * MIB, 4 * MIB)
    assert available_memory(tmp_path) == 16 * MIB
    write(tmp_path, version, 32 * MIB, 40 * MIB, 4 * MIB)
    assert available_memory(tmp_path) == 0


@pytest.mark.parametrize(("version", "limit"), [("v1", 0x7FFFFFFFFFFFF000), ("v2", "max"), ("v2", None)])
def test_without_a_limit_the_machine_s_memory_counts(version: str, limit: object, tmp_path: Path) -> None:
    if limit is not None:
        write(tmp_path, version, limit, 20 * MIB, 0)
    assert available_memory(tmp_path) == MACHINE

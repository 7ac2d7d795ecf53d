"""Tests that kernels are compiled once and kept, and that models run on the reference if that fails."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from overfill.model.native import library
from overfill.process import compiled


def build() -> Path:
    return compiled.compiled_library(library.SOURCE, library.FLAGS)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "home"))


def fake_compiler(folder: Path, body: str) -> Path:
    """Writes a ``c++`` that records each compilation in ``folder/calls`` and then runs ``body``."""
    path = folder / "bin" / "c++"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\necho call >> {folder}/calls\nfor out; do :; done\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = fake_compiler(tmp_path, 'echo library > "$out"')
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    return path


def test_the_library_is_compiled_once_and_found_again(compiler: Path, tmp_path: Path) -> None:
    first = build()
    assert first.read_text() == "library\n"
    assert build() == first
    assert calls(tmp_path) == 1
    left = sorted(p.name for p in first.parent.parent.iterdir())
    assert left == [".lock", first.parent.name], "no unfinished file is left"


@pytest.mark.parametrize("damage", [lambda p: p.write_text("libr"), Path.unlink], ids=["cut short", "gone"])
def test_a_damaged_library_is_made_again(damage, compiler: Path, tmp_path: Path) -> None:
    damage(build())
    assert build().read_text() == "library\n"
    assert calls(tmp_path) == 2


@pytest.mark.parametrize("mode", [0o575, 0o557], ids=["group", "world"])
def test_a_library_that_others_can_write_is_not_loaded(mode: int, compiler: Path, tmp_path: Path) -> None:
    library = build()
    library.chmod(mode)
    assert stat.S_IMODE(build().stat().st_mode) & 0o022 == 0
    assert calls(tmp_path) == 2


@pytest.mark.parametrize(("umask", "mode"), [(0, 0o755), (0o022, 0o755), (0o027, 0o750), (0o077, 0o700)])
def test_the_umask_says_who_may_read_it_and_only_the_owner_may_write(
    umask: int, mode: int, compiler: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        library = build()
        assert build() == library
    finally:
        os.umask(before)
    assert calls(tmp_path) == 1
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (library.parent, *library.parent.iterdir())}
    assert found == {library.parent.name: mode, library.name: mode & 0o555, "sha256": mode & 0o444}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(("owner", "compilations"), [(0, 1), (1001, 2)], ids=["root", "another"])
def test_a_library_of_root_is_loaded_and_one_of_another_user_is_not(
    owner: int, compilations: int, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build()
    for path in (library, library.parent):
        os.chown(path, owner, -1)
    monkeypatch.setattr(compiled.os, "geteuid", lambda: 1000)
    build()
    assert calls(tmp_path) == compilations


def test_a_shipped_library_needs_no_compiler(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build()
    shipped = tmp_path / "shipped"
    shutil.copytree(built.parent.parent, shipped)
    monkeypatch.setattr(compiled, "SHIPPED", shipped)
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build() == shipped / built.parent.name / built.name
    library = shipped / built.parent.name / built.name
    library.chmod(0o755)
    library.write_text("damaged")
    with pytest.raises(compiled.CannotBuild, match="no C\\+\\+ compiler"):
        build()


def test_a_compiler_that_fails_is_named_with_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_compiler(tmp_path, "echo kernels.h: no such register >&2; exit 1")
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    with pytest.raises(compiled.CannotBuild, match="no such register"):
        build()
    assert [p.name for p in (tmp_path / "home" / "native").iterdir()] == [".lock"]


def test_without_a_compiler_the_error_names_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(compiled.CannotBuild, match=r"install one of c\+\+, g\+\+, clang\+\+"):
        build()


def test_a_folder_that_cannot_be_written_is_named(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "native").write_text("a file")
    with pytest.raises(compiled.CannotBuild, match="cannot be written"):
        build()


def test_processes_that_start_at_once_agree(compiler: Path, tmp_path: Path) -> None:
    compiler.write_text(compiler.read_text() + "sleep 0.2\n")  # so that they overlap
    code = (
        "from overfill.process.compiled import compiled_library as c; from overfill.model.native import library as l;"
        "print(c(l.SOURCE, l.FLAGS).read_text())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(3)
    ]
    assert [p.communicate(timeout=120)[0].strip() for p in running] == ["library"] * 3
    assert calls(tmp_path) == 1


def test_where_the_kernels_do_not_run_the_reference_does_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_NEEDED", ("wings",))
    for function in (library.load, library.unavailable_reason):
        function.cache_clear()
    try:
        assert library.load() is None
        assert library.load() is None
        assert [r.getMessage() for r in caplog.records] == [
            "native kernels are not used, and steps on this CPU are slower: the CPU lacks wings"
        ]
    finally:
        for function in (library.load, library.unavailable_reason):
            function.cache_clear()


@pytest.mark.skipif(
    library.unavailable_reason() is not None, reason=f"no native kernels: {library.unavailable_reason()}"
)
def test_the_real_compiler_makes_a_library_that_loads() -> None:
    assert ctypes.CDLL(str(build())).ovf_forward

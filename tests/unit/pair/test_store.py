from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from overfill.errors import InvalidPair
from overfill.making.seal import record_checksums
from overfill.model.pair_files import load_whole
from overfill.pair import store
from overfill.pair.checksums import checksums_match


@pytest.fixture(autouse=True)
def cache(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache but for a tiny full model in the place of the named pairs' one, so that nothing is downloaded."""
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "home"))
    shutil.copytree(tiny_pair / "full", store.model_folder("wheel"))
    record_checksums(store.model_folder("wheel"))
    return tmp_path / "home"


def test_a_folder_is_taken_as_it_is(tiny_pair: Path, tmp_path: Path) -> None:
    assert store.resolve_pair(str(tiny_pair)) == tiny_pair
    with pytest.raises(InvalidPair, match="default, fast, identity"):
        store.resolve_pair(tmp_path / "nothing")


def test_a_model_where_a_pair_is_expected_gets_the_command_that_makes_the_pair(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidPair, match=rf"is a model, not a pair.*overfill pair build --full {tmp_path} "):
        store.resolve_pair(tmp_path)


@pytest.mark.parametrize("name", ["defualt", "no/such/folder", "./default"])
def test_what_is_neither_a_named_pair_nor_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidPair) as error:
        store.resolve_pair(name)
    for part in ("default, fast, identity", str(tmp_path / name), "./"):
        assert part in str(error.value)


def test_a_folder_called_like_a_named_pair_has_to_be_given_as_a_path(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_pair, tmp_path / "identity")
    for path in ("./identity", "identity/", tmp_path / "identity", Path("identity")):
        assert store.resolve_pair(path) == tmp_path / "identity"
    assert store.resolve_pair("identity") != tmp_path / "identity"


def test_another_process_prepares_a_named_pair_and_a_ready_one_is_found_without_torch(cache: Path) -> None:
    code = (
        "import sys; from overfill.pair import store; print(store.resolve_pair('identity', print))\n"
        "assert not {name for name in sys.modules if name == 'torch' or name.startswith('overfill.making')}"
    )
    command = [sys.executable, "-c", code]
    first, again = (
        subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout.splitlines()
        for _ in range(2)
    )
    assert first[-1:] == again == [str(store.pair_folder("identity"))]
    assert all(line.startswith("Preparing the pair identity (once): ") for line in first[:-1])
    assert len(first) > 1
    assert load_whole(Path(again[0]), digests=True).identity


def test_a_preparation_that_dies_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InvalidPair, match="cannot prepare the pair default: its process ended with status 1"):
        store.resolve_pair("default")


def test_a_caller_that_is_interrupted_ends_the_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(KeyboardInterrupt):
        store.resolve_pair("identity", interrupt)
    assert started[0].wait(60) == -signal.SIGTERM


def test_a_seal_covers_every_file_but_not_what_links_lead_to(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "file").write_text("1")
    (folder / "sub" / "file").write_text("1")
    (folder / "link").symlink_to(other)
    assert not checksums_match(folder)
    record_checksums(folder)
    (other / "file").write_text("2")
    assert checksums_match(folder)
    os.utime(folder / "sub" / "file", ns=(0, 0))
    assert checksums_match(folder)
    (folder / "sub" / "file").write_text("2")
    assert not checksums_match(folder)

"""Tests a value that is read again when its files change."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overfill.rpc import reload
from overfill.rpc.reload import ReloadingValue


class BadFileError(Exception):
    """The file cannot be read."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "RELOAD_SECONDS", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    path.write_text("1")
    return path


def reader(file: Path) -> Callable[[], str]:
    def read() -> str:
        if not file.exists():
            raise BadFileError("missing")
        if (text := file.read_text()).startswith("bad"):
            raise BadFileError(text)
        return text

    return read


def test_the_last_good_value_stays_while_the_files_are_damaged(file: Path) -> None:
    reloaded = ReloadingValue([file, None], reader(file), BadFileError, "the values")
    assert reloaded.value == "1"
    file.write_text("bad")
    assert reloaded.value == "1"
    file.unlink()
    assert reloaded.value == "1"
    file.write_text("23")
    assert reloaded.value == "23"


def test_a_read_that_fails_is_repeated_although_the_file_does_not_change_again(file: Path) -> None:
    read, failures = reader(file), [BadFileError("busy"), BadFileError("busy")]

    def failing() -> str:
        if reads and failures:
            raise failures.pop()
        reads.append(None)
        return read()

    reads: list[None] = []
    reloaded = ReloadingValue([file], failing, BadFileError, "the values")
    file.write_text("23")
    assert [reloaded.value for _ in range(3)] == ["1", "1", "23"]
    assert [reloaded.value for _ in range(3)] == ["23"] * 3
    assert len(reads) == 2, "files that do not change are not read again"


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(file: Path) -> None:
    texts = ["3", "2"]

    def read() -> str:
        text = file.read_text()
        if text != "1" and texts:
            file.write_text(texts.pop() + "0" * len(texts))
        return text

    reloaded = ReloadingValue([file], read, BadFileError, "the values")
    file.write_text("other")
    assert [reloaded.value for _ in range(3)] == ["other", "20", "3"]


def test_each_error_is_logged_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    reloaded = ReloadingValue([file], reader(file), BadFileError, "the values")
    good = os.stat(file).st_mtime_ns
    with caplog.at_level(logging.INFO):
        for text in ("bad once", "bad twice", "fine"):
            file.write_text(text)
            os.utime(file, ns=(good := good + 1, good))
            assert [reloaded.value for _ in range(3)] == ["fine" if text == "fine" else "1"] * 3
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "bad once; the values from the last good read stay in force"),
        ("WARNING", "bad twice; the values from the last good read stay in force"),
        ("INFO", f"read the values again: {file} changed"),
    ]


def test_the_first_read_has_to_succeed_and_other_errors_are_not_hidden(file: Path) -> None:
    with pytest.raises(BadFileError):
        ReloadingValue([], reader(file.with_name("none")), BadFileError, "the values")

    def broken() -> str:
        if file.read_text() == "1":
            return "1"
        raise KeyError("a fault of the reader")

    reloaded = ReloadingValue([file], broken, BadFileError, "the values")
    file.write_text("23")
    with pytest.raises(KeyError):
        _ = reloaded.value

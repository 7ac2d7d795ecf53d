"""Tests that a refusal names the file or folder, the user and what to change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overfill.api import keys
from overfill.errors import InvalidPair
from overfill.pair import store
from overfill.process import permissions
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.tls import ClientTls, ServerTls, TlsError
from overfill.settings.config_file import BadConfigFile, read_config_file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``a/b`` for user 10001, whom below the test's folder only the modes for others admit.

    The tests may run as root, whom no mode refuses.
    """

    def access(path: Path, needed: int) -> bool:
        return tmp_path not in Path(path).parents or Path(path).stat().st_mode & needed == needed

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    monkeypatch.setattr(os, "getegid", lambda: 10001)
    monkeypatch.setattr(os, "getgroups", lambda: [10001, 7])
    path = tmp_path / "a" / "b"
    path.mkdir(parents=True)
    return path


def test_links_that_form_a_circle_end(folder: Path) -> None:
    for name in ("left", "right"):
        (folder / name).symlink_to(folder)
    assert permissions.refusal(folder) == ""


def test_a_readable_or_missing_file_is_no_refusal(folder: Path) -> None:
    (folder / "file").touch(0o644)
    for path in (folder / "file", folder / "nothing", folder, folder / "nothing" / "file"):
        assert permissions.refusal(path) == ""


@pytest.mark.parametrize(("refusing", "mode"), [("a", 0o700), ("a/b", 0o750), ("a/b/file", 0o640)])
def test_the_first_that_refuses_is_named(folder: Path, refusing: str, mode: int) -> None:
    (folder / "file").touch(0o644)
    place = folder.parents[1] / refusing
    place.chmod(mode)
    status = place.stat()
    expected = (
        f"user 10001 (groups 7, 10001) may not read {place}, whose owner is {status.st_uid}:{status.st_gid} "
        f"and whose mode is {mode:04o}; change one of these"
    )
    assert permissions.refusal(folder / "file") == permissions.refusal(folder) == expected


def test_a_folder_that_cannot_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = os.walk

    def walk_of_user(top: Path, followlinks: bool) -> Iterator[tuple[str, list[str], list[str]]]:
        for below, folders, names in walk(top, followlinks=followlinks):
            if os.access(Path(below), os.R_OK):
                yield below, folders, names

    monkeypatch.setattr(os, "walk", walk_of_user)
    (folder / "full").mkdir(0o700)
    assert f"may not read {folder / 'full'}, " in permissions.refusal(folder)
    folder.chmod(0o700)
    assert f"may not read {folder}, " in permissions.refusal(folder)


def test_a_linked_folder_counts_too(folder: Path) -> None:
    (folder.parent / "model").mkdir()
    (folder.parent / "model" / "weights").touch(0o600)
    (folder / "full").symlink_to("../model")
    assert f"may not read {folder / 'full' / 'weights'}" in permissions.refusal(folder)


def _certificate(file: Path) -> None:
    ServerTls(cert=file, key=file).credentials()


def _metrics(file: Path) -> None:
    made = certificates.make(file.parent / "certs", roles=[Role.ROUTER])
    for path in made:
        path.chmod(0o644)
    own = certificates.role_files(file.parent / "certs", Role.ROUTER)
    ServerTls(own.cert, own.key, file).contexts()


def _secret(file: Path) -> None:
    from overfill.settings.config import DecodeConfig

    DecodeConfig(pair="default", stack_secret=file).check_files()


@pytest.mark.parametrize(
    ("read", "error", "beginning"),
    [
        (_certificate, TlsError, "cannot read the TLS server key {file}: user 10001"),
        (_metrics, TlsError, "cannot read the TLS client CA certificate {file}: user 10001"),
        (lambda file: ClientTls(file).credentials(), TlsError, "cannot read the TLS CA certificate {file}: user 10001"),
        (keys.load, keys.BadKeyFile, "cannot read the API keys in {file}: user 10001"),
        (_secret, keys.BadKeyFile, "cannot read the stack's secret in {file}: user 10001"),
        (read_config_file, BadConfigFile, "{file}: cannot be read: user 10001"),
        (lambda file: store.resolve_pair(file.parent), InvalidPair, "cannot read the pair in {folder}: user 10001"),
    ],
)
def test_every_reader_of_a_file_names_the_refusal(
    folder: Path,
    read: Callable[[Path], object],
    error: type[Exception],
    beginning: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = folder / "pair.json"
    file.write_text("-----BEGIN")
    file.chmod(0o640)
    original = Path.open

    def opened(path: Path, *arguments: object, **options: object) -> object:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(error) as caught:
        read(file)
    assert str(caught.value).startswith(beginning.format(file=file, folder=folder))
    assert f"may not read {file}" in str(caught.value)


def test_a_missing_file_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"c\.crt: No such file or directory; `overfill certs` makes certificates$"):
        ClientTls(tmp_path / "c.crt").credentials()
    with pytest.raises(keys.BadKeyFile, match=r"make them with `overfill keys create NAME --file .*k\.json`$"):
        keys.load(tmp_path / "k.json")

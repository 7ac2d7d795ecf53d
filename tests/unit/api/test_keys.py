"""Tests API keys: the content of their file, which callers it admits, and what a damaged file changes."""

import errno
import json
import stat
from pathlib import Path

import pytest

from overfill.api import keys
from overfill.api.keys import BadKeyFile, KeyRing
from overfill.cli import keys as cli_keys
from overfill.cli.main import main
from overfill.errors import InvalidRequest
from overfill.rpc import reload
from overfill.rpc.access import Scope, bearer


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def test_the_file_of_keys_holds_hashes_only(file):
    key = keys.create(file, "ci")
    other = keys.create(file, "dev")
    assert key != other
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ring = KeyRing(file)
    assert ring.find(key).name == "ci"
    assert ring.find(other).name == "dev"
    for wrong in ("", key[:-1], key + "x", key.lower(), "ü" * 100, "x" * 100_000, keys.hash_key(key)):
        assert ring.find(wrong) is None


def test_a_changed_file_of_keys_is_loaded_and_a_damaged_one_is_not(file, monkeypatch):
    monkeypatch.setattr(reload, "RELOAD_SECONDS", 0.0)
    key = keys.create(file, "ci")
    ring = KeyRing(file)
    later = keys.create(file, "later")
    assert ring.find(later).name == "later"
    keys.revoke(file, "ci")
    assert ring.find(key) is None
    file.write_text("{")
    assert ring.find(later).name == "later", "the last good version stays in force"
    file.unlink()
    assert ring.find(later).name == "later"


def test_a_revoked_key_is_refused_although_the_first_read_of_the_new_file_fails(file, monkeypatch):
    monkeypatch.setattr(reload, "RELOAD_SECONDS", 0.0)
    key = keys.create(file, "ci")
    ring = KeyRing(file)
    keys.revoke(file, "ci")
    failures, read_bytes = [OSError(errno.EIO, "Input/output error")], Path.read_bytes

    def failing_once(path):
        if failures:
            raise failures.pop()
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing_once)
    assert ring.find(key) is not None, "the last good version stays in force"
    assert ring.find(key) is None


def test_names_of_keys_are_checked_and_unique(file):
    keys.create(file, "ci")
    for name in ("ci", "", "a b", "x" * 65, "ü"):
        with pytest.raises(InvalidRequest):
            keys.create(file, name)
    with pytest.raises(InvalidRequest):
        keys.revoke(file, "nobody")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "x", "keys": []}', '{"format": "overfill-keys/1", "keys": [{"name": "a"}]}'],
)
def test_a_file_that_holds_no_keys_is_refused(file, text):
    file.write_text(text)
    with pytest.raises(BadKeyFile):
        KeyRing(file)


def test_a_short_hash_is_refused(file):
    entry = {"name": "a", "sha256": "abc", "created": ""}
    file.write_text(json.dumps({"format": keys.FORMAT, "keys": [entry]}))
    with pytest.raises(BadKeyFile, match="'a'"):
        KeyRing(file)


def test_the_key_is_read_from_the_authorization_header():
    assert bearer("Bearer x") == bearer("bearer  x ") == "x"
    assert bearer("Basic YTprZXk=", page=True) == "key"
    assert bearer("Basic YTprZXk=") is None
    assert bearer("") is bearer("Basic x") is bearer("Bearer ") is bearer("x") is None


def test_the_command_line(file, capsys):
    assert main(["keys", "create", "ci", "--file", str(file)]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyRing(file).find(key).name == "ci"
    assert main(["keys", "list", "--file", str(file)]) == 0
    listed = capsys.readouterr().out
    assert "ci" in listed
    assert key not in listed
    assert main(["keys", "create", "ci", "--file", str(file)]) == 2
    assert main(["keys", "revoke", "ci", "--file", str(file)]) == 0
    assert KeyRing(file).find(key) is None
    assert main(["keys", "list", "--file", str(file) + "x"]) == 1


@pytest.mark.parametrize(
    ("arguments", "scopes"),
    [
        ([], ["infer", "status"]),
        (["--scope", "metrics,admin"], ["admin", "metrics"]),
        (["--scope", "infer, metrics", "--scope", "admin"], ["admin", "infer", "metrics"]),
    ],
)
def test_scopes_are_given_with_commas_or_one_by_one(file, arguments, scopes):
    assert main(["keys", "create", "ci", "--file", str(file), *arguments]) == 0
    assert sorted(keys.load(file)[0].scopes) == scopes


@pytest.mark.parametrize(("given", "wrong"), [("infer,root", "'root'"), ("infer,", "''"), ("Infer", "'Infer'")])
def test_a_wrong_scope_is_named_with_the_valid_ones(file, capsys, given, wrong):
    assert main(["keys", "create", "ci", "--file", str(file), "--scope", given]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"'--scope': unknown scope {wrong}; allowed are infer, status, metrics, admin" in error
    assert not file.exists()


def test_the_command_line_knows_every_scope():
    assert list(cli_keys._SCOPES) == list(Scope)


def test_limits_of_a_key_are_kept_and_checked(tmp_path):
    path = tmp_path / "keys.json"
    keys.create(path, "free")
    keys.create(path, "held", rate=2.5, concurrency=3, priority=1)
    free, held = keys.load(path)
    assert (free.rate, free.concurrency, free.priority) == (None, None, 0)
    assert (held.rate, held.concurrency, held.priority) == (2.5, 3, 1)
    for wrong in ({"rate": 0.0}, {"concurrency": 0}, {"priority": 3}):
        with pytest.raises(InvalidRequest) as caught:
            keys.create(path, "other", **wrong)
        assert [caught.value.field] == list(wrong)
    path.write_text(path.read_text().replace('"concurrency": 3', '"concurrency": "3"'))
    with pytest.raises(keys.BadKeyFile, match="concurrency"):
        keys.load(path)


def test_scopes_are_kept_and_checked(file):
    keys.create(file, "ci")
    keys.create(file, "prometheus", scopes=["metrics"])
    assert [key.scopes for key in keys.load(file)] == [{Scope.INFER, Scope.STATUS}, {Scope.METRICS}]
    for wrong in (["root"], []):
        with pytest.raises(InvalidRequest):
            keys.create(file, "x", scopes=wrong)
    data = json.loads(file.read_text())
    for entry in data["keys"]:
        entry["scopes"] = ["root"]
    file.write_text(json.dumps(data))
    with pytest.raises(BadKeyFile, match="scopes"):
        keys.load(file)
    for entry in data["keys"]:
        del entry["scopes"]  # the format before scopes existed
    file.write_text(json.dumps(data))
    assert {key.scopes for key in keys.load(file)} == {keys.DEFAULT_SCOPES}

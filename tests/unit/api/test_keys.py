"""Tests API keys: the content of their file, which callers it admits, and what a damaged file changes."""

import errno
import json
import os
import stat
import threading

import pytest

from overfill.api import key_file, keys
from overfill.api.keys import BadKeyFile, KeyRing
from overfill.cli.main import main
from overfill.errors import InvalidRequest
from overfill.rpc import reload
from overfill.rpc.access import Scope, bearer


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def test_the_file_of_keys_holds_hashes_only(file):
    key = key_file.create(file, "ci")
    other = key_file.create(file, "dev")
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
    key = key_file.create(file, "ci")
    ring = KeyRing(file)
    later = key_file.create(file, "later")
    assert ring.find(later).name == "later"
    key_file.revoke(file, "ci")
    assert ring.find(key) is None
    file.write_text("{")
    assert ring.find(later).name == "later", "the last good version stays in force"
    file.unlink()
    assert ring.find(later).name == "later"


def test_names_of_keys_are_checked_and_unique(file):
    key_file.create(file, "ci")
    for name in ("ci", "", "a b", "x" * 65, "ü"):
        with pytest.raises(InvalidRequest):
            key_file.create(file, name)
    with pytest.raises(InvalidRequest):
        key_file.revoke(file, "nobody")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "x", "keys": []}',
        '{"format": "overfill-keys/1", "keys": [{"name": "a"}]}',
        '{"format": "overfill-keys/1", "keys": [{"name": "a", "sha256": "abc", "created": ""}]}',
    ],
)
def test_a_file_that_holds_no_keys_is_refused(file, text):
    file.write_text(text)
    with pytest.raises(BadKeyFile):
        KeyRing(file)


def test_the_key_is_read_from_the_authorization_header():
    assert bearer("Bearer x") == bearer("bearer  x ") == "x"
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
    assert f"--scope: {wrong} is not a scope; known are infer, status, metrics, admin" in error
    assert not file.exists()


def test_limits_of_a_key_are_kept_and_checked(tmp_path):
    path = tmp_path / "keys.json"
    key_file.create(path, "free")
    key_file.create(path, "held", rate=2.5, concurrency=3, priority=1)
    free, held = keys.load(path)
    assert (free.rate, free.concurrency, free.priority) == (None, None, 0)
    assert (held.rate, held.concurrency, held.priority) == (2.5, 3, 1)
    for wrong in ({"rate": 0.0}, {"concurrency": 0}, {"priority": 3}):
        with pytest.raises(InvalidRequest) as caught:
            key_file.create(path, "other", **wrong)
        assert [caught.value.field] == list(wrong)
    path.write_text(path.read_text().replace('"concurrency": 3', '"concurrency": "3"'))
    with pytest.raises(keys.BadKeyFile, match="concurrency"):
        keys.load(path)


def test_scopes_are_kept_and_checked(file):
    key_file.create(file, "ci")
    key_file.create(file, "prometheus", scopes=["metrics"])
    assert [key.scopes for key in keys.load(file)] == [{Scope.INFER, Scope.STATUS}, {Scope.METRICS}]
    for wrong in (["root"], []):
        with pytest.raises(InvalidRequest):
            key_file.create(file, "x", scopes=wrong)
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


def test_tiers_of_a_key_are_kept_listed_and_checked(file, capsys):
    assert main(["keys", "create", "any", "--file", str(file)]) == 0
    flags = ["--tier", "full", "--tier", "fast", "--allow-brownout"]
    assert main(["keys", "create", "ci", "--file", str(file), *flags]) == 0
    free, held = keys.load(file)
    assert (free.tiers, free.allow_brownout) == (None, False)
    assert (held.tiers, held.allow_brownout) == ({"full", "fast"}, True)
    assert [[key.may_use(tier) for tier in ("full", "default")] for key in (free, held)] == [[True] * 2, [True, False]]
    assert set(json.loads(file.read_text())["keys"][0]) == {"name", "sha256", "created", "scopes"}
    capsys.readouterr()
    assert main(["keys", "list", "--file", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[4:] for line in lines] == [[], ["tiers:fast,full", "brownout"]]
    assert main(["keys", "create", "x", "--file", str(file), "--tier", "Full!"]) == 2
    assert "'Full!' cannot name" in " ".join(capsys.readouterr().err.split())
    data = json.loads(file.read_text())
    for wrong in ({"tiers": "full"}, {"tiers": []}, {"tiers": [1]}, {"tiers": None}, {"allow_brownout": 1}):
        data["keys"][0].update(wrong)
        file.write_text(json.dumps(data))
        (field,) = wrong
        with pytest.raises(BadKeyFile, match=field):
            keys.load(file)
        del data["keys"][0][field]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to other users")
def test_a_changed_file_keeps_owner_group_and_mode(file):
    key_file.create(file, "ci")
    os.chown(file, 10_001, 10_002)
    file.chmod(0o640)
    key_file.create(file, "other")
    key_file.revoke(file, "ci")
    status = file.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (10_001, 10_002, 0o640)
    assert list(file.parent.iterdir()) == [file]


def test_a_file_whose_owner_cannot_be_kept_is_not_changed(file, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    key_file.create(file, "ci")
    before = file.read_bytes()
    monkeypatch.setattr(os, "fchmod", refused)
    with pytest.raises(
        BadKeyFile, match=f"owner {os.geteuid()}:{os.getegid()} and mode 0600.*as that owner or as root"
    ):
        key_file.revoke(file, "ci")
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file], "nothing is left behind"


def test_a_key_that_is_revoked_while_another_is_made_stays_revoked(file, monkeypatch):
    key_file.create(file, "old")
    load, waits, revoking = keys.load, [], threading.Thread(target=key_file.revoke, args=(file, "old"))
    flock = key_file.fcntl.flock

    def noticing_flock(*arguments):
        if threading.current_thread() is revoking:
            waits.append(True)
            at_the_lock.set()
        flock(*arguments)

    def load_then_revoke(path):
        found = load(path)
        if threading.current_thread() is not revoking:
            revoking.start()
            # Without the lock, the revocation ends here, and the next save undoes it.
            while revoking.is_alive() and not at_the_lock.wait(0.01):
                pass
        return found

    at_the_lock = threading.Event()
    monkeypatch.setattr(key_file.fcntl, "flock", noticing_flock)
    monkeypatch.setattr(key_file, "load", load_then_revoke)
    key_file.create(file, "new")
    revoking.join()
    assert [key.name for key in load(file)] == ["new"]
    assert waits, "the revocation waited for the lock"
    assert list(file.parent.iterdir()) == [file]

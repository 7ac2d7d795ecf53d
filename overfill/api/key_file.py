"""Makes and revokes API keys: writes the file that ``keys`` beside this module reads. No service imports it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overfill.api.keys import (
    DEFAULT_SCOPES,
    FORMAT,
    ApiKey,
    BadKeyFile,
    check_limits,
    hash_key,
    load,
    read_scopes,
    read_tiers,
)
from overfill.errors import InvalidRequest

PREFIX = "ofk-"

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")


def create(
    path: Path,
    name: str,
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    priority: int = 0,
    scopes: Iterable[str] = DEFAULT_SCOPES,
    tiers: Collection[str] | None = None,
    allow_brownout: bool = False,
) -> str:
    """Makes a key, adds its hash to the file, and returns the key, which is not stored. Creates a missing file.

    Raises:
        InvalidRequest: the name is invalid or in use, or a limit, scope or tier is wrong.
        BadKeyFile: the file is damaged or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest("name", f"is {name[:80]!r}; give 1 to 64 letters, digits or the characters _ . @ -")
    check_limits(rate, concurrency, priority)
    key = PREFIX + secrets.token_urlsafe(32)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    allowed = None if tiers is None else read_tiers(tiers)
    entry = ApiKey(name, hash_key(key), now, rate, concurrency, priority, read_scopes(scopes), allowed, allow_brownout)
    with _locked(path):
        keys = load(path) if path.exists() else []
        if any(key.name == name for key in keys):
            raise InvalidRequest("name", f"{name!r} is in use; revoke that key first, or give another name")
        _save(path, [*keys, entry])
    return key


def revoke(path: Path, name: str) -> None:
    """Removes a key. Raises InvalidRequest if the file has no key of that name, and BadKeyFile."""
    with _locked(path):
        keys = load(path)
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise InvalidRequest("name", f"{path} has no key {name!r}; `overfill keys list` shows its keys")
        _save(path, left)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing the key file within the block, which could undo a revocation.

    The lock is a file of its own, since ``_save`` replaces the key file. It is removed afterwards, so that another user
    can make one.
    """
    place = path.with_name(f".{path.name}.lock")
    try:
        lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        while not _is_open_at(place, lock):  # its last holder has removed it
            os.close(lock)
            lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise BadKeyFile(f"cannot write {path}: {place}: {error.strerror}") from error
    try:
        yield
    finally:
        place.unlink()
        os.close(lock)


def _is_open_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _save(path: Path, keys: list[ApiKey]) -> None:
    """Replaces the file. The new one has the old one's owner, group and mode, so that routers can still read it."""
    text = json.dumps({"format": FORMAT, "keys": [_entry(key) for key in keys]}, indent=2)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        old = path.stat() if path.exists() else None
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            if old is not None:
                _copy_access(path, old, file.fileno())
            file.write(text + "\n")
        new.replace(path)
    except OSError as error:
        raise BadKeyFile(f"cannot write {path}: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)


def _copy_access(path: Path, old: os.stat_result, new: int) -> None:
    """Gives the open file ``new`` owner, group and mode of ``old``, the status of ``path``. Raises BadKeyFile."""
    mode, made = stat.S_IMODE(old.st_mode), os.fstat(new)
    try:
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            os.fchown(new, old.st_uid, old.st_gid)
        os.fchmod(new, mode)
    except PermissionError as error:
        raise BadKeyFile(
            f"cannot write {path}: user {os.geteuid()} cannot make a file with its owner {old.st_uid}:{old.st_gid} and "
            f"mode {mode:04o}, which the router may need; run the command as that owner or as root"
        ) from error


def _entry(key: ApiKey) -> dict[str, Any]:
    """The key's JSON entry; omits unset limits."""
    entry = asdict(key) | {"scopes": sorted(key.scopes), "tiers": None if key.tiers is None else sorted(key.tiers)}
    unset = (("priority", 0), ("allow_brownout", False))
    return {name: value for name, value in entry.items() if value is not None and (name, value) not in unset}

"""API keys: a file of their hashes, and who holds the key that a client shows. No sockets.

The file is JSON and holds no key, only SHA-256 hashes; keys are 32 random bytes, so a plain hash cannot be searched::

    {"format": "overfill-keys/1", "keys": [{"name": "ci", "sha256": "<hex>", "created": "2026-01-31T12:00:00Z",
                                            "scopes": ["infer", "status"],
                                            "rate": 5.0, "concurrency": 20, "priority": 0}]}

``scopes``, ``rate``, ``concurrency`` and ``priority`` may be left out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overfill.api.priority import check_priority
from overfill.errors import InvalidRequest, OverfillError
from overfill.rpc.access import Scope
from overfill.rpc.reload import ReloadingValue

FORMAT = "overfill-keys/1"
PREFIX = "ofk-"
MAX_KEY_LENGTH = 512

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")

DEFAULT_SCOPES = frozenset({Scope.INFER, Scope.STATUS})
"""What a key is good for unless something else is said: answers, and to see how busy the stack is."""


class BadKeyFile(OverfillError):
    """The file of API keys cannot be read or is damaged."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the file has it.

    Attributes:
        created: ISO 8601.
        rate: requests per second that one router takes; None: any.
        concurrency: requests at once that one router takes; None: any.
        priority: the smallest (first) that requests with this key may have; they are raised to it.
        scopes: what it is good for.
    """

    name: str
    sha256: str
    created: str
    rate: float | None = None
    concurrency: int | None = None
    priority: int = 0
    scopes: frozenset[Scope] = DEFAULT_SCOPES

    @property
    def id(self) -> str:
        """Of this key and no other: a new key under the same name has another one."""
        return self.sha256[:16]

    @property
    def cache_namespace(self) -> str:
        """Keeps cached KV of this key's requests from others; the same on every router.

        A hash, so that workers learn neither names nor what the file has; of the key, so that who comes after under the
        same name shares nothing with who was there before.
        """
        return hashlib.sha256(f"overfill-tenant/2 {self.sha256}".encode()).hexdigest()


class KeyRing:
    """The keys of a file, read again when it changes.

    When the file has vanished or is damaged, the keys of the last good read stay in force.

    Raises:
        BadKeyFile: the first read fails.
    """

    def __init__(self, path: Path) -> None:
        self._keys = ReloadingValue([path], lambda: load(path), BadKeyFile, "the API keys")

    def find(self, key: str) -> ApiKey | None:
        """Who holds ``key``; None when nobody does. Takes the same time whatever part of a key is right."""
        shown = hash_key(key) if len(key) <= MAX_KEY_LENGTH else ""
        found = None
        for known in self._keys.value:
            if hmac.compare_digest(known.sha256, shown):
                found = known
        return found


def hash_key(key: str) -> str:
    """As it is in the file."""
    return hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()


def load(path: Path) -> list[ApiKey]:
    """Raises BadKeyFile."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise BadKeyFile(f"{path}: is of format {data['format']!r}, not {FORMAT}")
        keys = [_read(entry) for entry in data["keys"]]
        bad = next((key for key in keys if not _HASH.fullmatch(key.sha256)), None)
    except OSError as error:
        raise BadKeyFile(f"cannot read the API keys in {path}: {error.strerror}") from error
    except InvalidRequest as error:
        raise BadKeyFile(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadKeyFile(f"{path} is not a file of API keys; make one with `overfill keys create`") from error
    if bad is not None:
        raise BadKeyFile(f"{path}: the hash of key {bad.name!r} is no SHA-256")
    return keys


def _read(entry: Any) -> ApiKey:
    """Raises InvalidRequest, and TypeError when a field is missing or unknown."""
    if "scopes" in entry:
        entry = {**entry, "scopes": read_scopes(entry["scopes"])}
    key = ApiKey(**entry)
    _check_limits(key.rate, key.concurrency, key.priority)
    return key


def read_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Raises InvalidRequest when one of them is none, or there are none."""
    names = list(names)
    for name in names:
        if name not in list(Scope):
            raise InvalidRequest("scopes", f"there is no scope {name!r}; there are {', '.join(Scope)}")
    if not names:
        raise InvalidRequest("scopes", f"give one at least of {', '.join(Scope)}")
    return frozenset(Scope(name) for name in names)


def _check_limits(rate: float | None, concurrency: int | None, priority: int) -> None:
    if rate is not None and not 0 < rate < math.inf:
        raise InvalidRequest("rate", f"must be more than 0 requests per second, got {rate!r}")
    if concurrency is not None and (not isinstance(concurrency, int) or concurrency < 1):
        raise InvalidRequest("concurrency", f"must be 1 request or more, got {concurrency!r}")
    check_priority(priority)


def create(
    path: Path,
    name: str,
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    priority: int = 0,
    scopes: Iterable[str] = DEFAULT_SCOPES,
) -> str:
    """Adds a key to the file, which is made when there is none; returns the key, which is kept nowhere.

    Raises:
        InvalidRequest: the name is bad or taken, or a limit is none.
        BadKeyFile: the file is damaged or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest("name", "has 1 to 64 letters, digits and the characters _ . @ -")
    keys = load(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise InvalidRequest("name", f"{name!r} is taken; revoke that key first")
    _check_limits(rate, concurrency, priority)
    key = PREFIX + secrets.token_urlsafe(32)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    _save(path, [*keys, ApiKey(name, hash_key(key), now, rate, concurrency, priority, read_scopes(scopes))])
    return key


def revoke(path: Path, name: str) -> None:
    """Removes a key. Raises InvalidRequest when there is none of that name, and BadKeyFile."""
    keys = load(path)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise InvalidRequest("name", f"there is no key {name!r}")
    _save(path, left)


def _save(path: Path, keys: list[ApiKey]) -> None:
    text = json.dumps({"format": FORMAT, "keys": [_entry(key) for key in keys]}, indent=2)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text + "\n")
        new.replace(path)
    except OSError as error:
        raise BadKeyFile(f"cannot write {path}: {error.strerror}") from error


def _entry(key: ApiKey) -> dict[str, Any]:
    """Without limits that there are not."""
    entry = asdict(key) | {"scopes": sorted(key.scopes)}
    return {name: value for name, value in entry.items() if value is not None and (name, value) != ("priority", 0)}

"""API keys: reads the file of their hashes, and finds the entry of a key. ``key_file`` beside this module writes it.

The file is JSON and holds only SHA-256 hashes of keys. A key is 32 random bytes, too many to find it by trying::

    {"format": "overfill-keys/1", "keys": [{"name": "ci", "sha256": "<hex>", "created": "2026-01-31T12:00:00Z",
                                            "scopes": ["infer", "status"],
                                            "rate": 5.0, "concurrency": 20, "priority": 0,
                                            "tiers": ["default", "fast"], "allow_brownout": true}]}

All but the first three are optional.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest, OverfillError
from overfill.process.permissions import refusal
from overfill.request.params import check_priority
from overfill.rpc.access import Scope
from overfill.rpc.reload import ReloadingValue

FORMAT = "overfill-keys/1"
MAX_KEY_LENGTH = 512

_HASH = re.compile(r"[0-9a-f]{64}")

DEFAULT_SCOPES = frozenset({Scope.INFER, Scope.STATUS})
"""Scopes of a key whose entry names none: generate answers, and read the stack's status."""


class BadKeyFile(OverfillError):
    """The file of API keys cannot be read or written, or is damaged."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry of the key file.

    Attributes:
        name: Name of the key, unique in the file.
        sha256: Hash of the key, lower-case hex.
        created: Time of creation, ISO 8601.
        rate: Maximum requests per second that the routers at one address accept; None means no limit.
        concurrency: Maximum concurrent requests that the routers at one address accept; None means no limit.
        priority: Smallest number, which is the most urgent class, that requests with this key get.
        scopes: Calls that the key allows.
        tiers: Tiers and adapters that requests with this key may use; None means all.
        allow_brownout: Whether a cheaper tier may write the answers of all requests with this key under overload.
    """

    name: str
    sha256: str
    created: str
    rate: float | None = None
    concurrency: int | None = None
    priority: int = 0
    scopes: frozenset[Scope] = DEFAULT_SCOPES
    tiers: frozenset[str] | None = None
    allow_brownout: bool = False

    def may_use(self, tier: str) -> bool:
        """True if requests with this key may use ``tier``, which may be an adapter's name."""
        return self.tiers is None or tier in self.tiers

    @property
    def id(self) -> str:
        """Id of this key; a new key with the same name has a different id."""
        return self.sha256[:16]

    @property
    def cache_namespace(self) -> str:
        """Namespace of this key's cached KV, which separates it from other keys' KV. The same on every router.

        It is a hash, so that workers see neither the key's name nor its entry in the file. It is derived from the key,
        so that a new key with an old name does not share the old key's cached KV.
        """
        return hashlib.sha256(f"overfill-tenant/2 {self.sha256}".encode()).hexdigest()


class KeyRing:
    """The keys of one file, which is read again when it changes.

    If the file disappears or is damaged later, the keys of the last successful read stay valid.

    Raises:
        BadKeyFile: the first read fails.
    """

    def __init__(self, path: Path) -> None:
        self._keys = ReloadingValue([path], lambda: load(path), BadKeyFile, "the API keys")

    def find(self, key: str) -> ApiKey | None:
        """The entry of ``key``; None if the file has none. The time does not depend on how much of a key is right."""
        shown = hash_key(key) if len(key) <= MAX_KEY_LENGTH else ""
        found = None
        for known in self._keys.value:
            if hmac.compare_digest(known.sha256, shown):
                found = known
        return found


def hash_key(key: str) -> str:
    """Hash of ``key`` as the file stores it: lower-case hex SHA-256."""
    return hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()


def load(path: Path) -> list[ApiKey]:
    """The entries of the key file. Raises BadKeyFile."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise BadKeyFile(f"{path}: has format {data['format']!r}; this version reads {FORMAT}")
        keys = [_read(entry) for entry in data["keys"]]
        bad = next((key for key in keys if not _HASH.fullmatch(key.sha256)), None)
    except OSError as error:
        why = refusal(path) or error.strerror
        if isinstance(error, FileNotFoundError):
            why = f"{why}; make them with `overfill keys create NAME --file {path}`"
        raise BadKeyFile(f"cannot read the API keys in {path}: {why}") from error
    except InvalidRequest as error:
        raise BadKeyFile(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadKeyFile(f"{path} is not a file of API keys; make one with `overfill keys create`") from error
    if bad is not None:
        raise BadKeyFile(f"{path}: the hash of key {bad.name!r} is not a SHA-256 in lower-case hex")
    return keys


def _read(entry: Any) -> ApiKey:
    """Raises InvalidRequest for a wrong value, and TypeError for a missing or unknown field."""
    if "scopes" in entry:
        entry = {**entry, "scopes": read_scopes(entry["scopes"])}
    if "tiers" in entry:
        entry = {**entry, "tiers": read_tiers(entry["tiers"])}
    key = ApiKey(**entry)
    if not isinstance(key.allow_brownout, bool):
        raise InvalidRequest("allow_brownout", f"must be true or false, got {key.allow_brownout!r}")
    check_limits(key.rate, key.concurrency, key.priority)
    return key


def read_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """The scopes of these names. Raises InvalidRequest if a name is not a scope, or ``names`` is empty."""
    names = list(names)
    for name in names:
        if name not in list(Scope):
            raise InvalidRequest("scopes", f"{name!r} is not a scope; known are {', '.join(Scope)}")
    if not names:
        raise InvalidRequest("scopes", f"is empty; give at least one of {', '.join(Scope)}")
    return frozenset(Scope(name) for name in names)


def read_tiers(names: Any) -> frozenset[str]:
    """The tiers of these names. Raises InvalidRequest unless ``names`` is a list of at least one name."""
    if not isinstance(names, Collection) or isinstance(names, str) or not all(n and isinstance(n, str) for n in names):
        raise InvalidRequest("tiers", f"must be a list of tier names, got {names!r}")
    if not names:
        raise InvalidRequest("tiers", "is empty; name at least one tier, or leave it out to allow all")
    return frozenset(names)


def check_limits(rate: float | None, concurrency: int | None, priority: int) -> None:
    """Raises InvalidRequest that names the first of a key's limits that is wrong."""
    if rate is not None and not 0 < rate < math.inf:
        raise InvalidRequest("rate", f"must be a finite number of requests per second above 0, got {rate!r}")
    if concurrency is not None and (not isinstance(concurrency, int) or concurrency < 1):
        raise InvalidRequest("concurrency", f"must be an integer of at least 1, got {concurrency!r}")
    check_priority(priority)

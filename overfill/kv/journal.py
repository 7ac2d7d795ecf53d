"""Reports of a prefix cache's keys to every router: all keys at first, then the changes. Thread-safe; no I/O."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Set

from overfill.v1 import registry_pb2

MAX_KEYS = 1 << 16
"""Limit on keys per report. The rest goes into the next report."""


class KeyJournal:
    """Records added and removed keys on the engine's thread, and feeds them to readers on the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: set[int] = set()
        self._feeds: set[KeyFeed] = set()

    def add(self, key: int) -> None:
        self._change(key, True)

    def remove(self, key: int) -> None:
        self._change(key, False)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def become(self, keys: Set[int]) -> None:
        """Adds and removes keys until exactly ``keys`` are present."""
        for key in keys ^ self._keys:
            self._change(key, key in keys)

    def feed(self) -> KeyFeed:
        """A new reader, which first receives all present keys. The caller closes it."""
        with self._lock:
            feed = KeyFeed(self, self._lock, dict.fromkeys(self._keys, True))
            self._feeds.add(feed)
        return feed

    def forget(self, feed: KeyFeed) -> None:
        """Stops feeding ``feed``."""
        with self._lock:
            self._feeds.discard(feed)

    def _change(self, key: int, present: bool) -> None:
        with self._lock:
            if (key in self._keys) == present:
                return
            (self._keys.add if present else self._keys.discard)(key)
            for feed in self._feeds:
                feed.pending[key] = present


class KeyFeed:
    """Changes that one reader has not received yet. A key that was added and removed meanwhile is reported as removed.

    Attributes:
        pending: key -> whether it is present now. Guarded by the journal's lock.
    """

    def __init__(self, journal: KeyJournal, lock: threading.Lock, pending: dict[int, bool]) -> None:
        self.pending = pending
        self._journal = journal
        self._lock = lock
        self._first = True

    def take(self) -> registry_pb2.PrefixDelta | None:
        """The next report, with at most ``MAX_KEYS`` changes; None if there are none.

        The first report has ``replaces`` set: the router forgets the keys that it knew before.
        """
        with self._lock:
            if not self.pending and not self._first:
                return None
            keys = list(itertools.islice(self.pending, MAX_KEYS))
            changes = {key: self.pending.pop(key) for key in keys}
        first, self._first = self._first, False
        return registry_pb2.PrefixDelta(
            added=[key for key, present in changes.items() if present],
            removed=[key for key, present in changes.items() if not present],
            replaces=first,
        )

    def close(self) -> None:
        self._journal.forget(self)

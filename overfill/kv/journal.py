"""What a prefix cache holds, told to every router: the keys at first, then what changes. Thread-safe; no I/O."""

from __future__ import annotations

import itertools
import threading

from overfill.v1 import registry_pb2

MOST_KEYS = 1 << 16
"""Keys in one report; what is left goes with the next one."""


class KeyJournal:
    """Takes the keys that come and go on the engine's thread, and feeds them to readers on the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: set[int] = set()
        self._feeds: set[KeyFeed] = set()

    def add(self, key: int) -> None:
        self._change(key, True)

    def remove(self, key: int) -> None:
        self._change(key, False)

    def feed(self) -> KeyFeed:
        """A reader that begins with everything there is; ``close`` it."""
        with self._lock:
            feed = KeyFeed(self, self._lock, dict.fromkeys(self._keys, True))
            self._feeds.add(feed)
        return feed

    def forget(self, feed: KeyFeed) -> None:
        with self._lock:
            self._feeds.discard(feed)

    def _change(self, key: int, present: bool) -> None:
        with self._lock:
            (self._keys.add if present else self._keys.discard)(key)
            for feed in self._feeds:
                feed.pending[key] = present


class KeyFeed:
    """What one reader has not been told yet; a key that came and went in between is told as gone.

    Attributes:
        pending: by key, whether it is there now. Under the journal's lock.
    """

    def __init__(self, journal: KeyJournal, lock: threading.Lock, pending: dict[int, bool]) -> None:
        self.pending = pending
        self._journal = journal
        self._lock = lock
        self._first = True

    def take(self) -> registry_pb2.PrefixDelta | None:
        """The next ``MOST_KEYS`` changes at most; the first one replaces what the reader knew. None: nothing new."""
        with self._lock:
            if not self.pending and not self._first:
                return None
            keys = list(itertools.islice(self.pending, MOST_KEYS))
            told = {key: self.pending.pop(key) for key in keys}
        first, self._first = self._first, False
        return registry_pb2.PrefixDelta(
            added=[key for key, present in told.items() if present],
            removed=[key for key, present in told.items() if not present],
            replaces=first,
        )

    def close(self) -> None:
        self._journal.forget(self)

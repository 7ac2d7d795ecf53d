"""Where a modelled prefill worker gets KV of prompts from, besides its own memory: a peer's memory, or a disk.

Blocks are known by the routers' keys. A loan or a read that has begun succeeds, even if its blocks are evicted
meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from typing import Protocol

from overfill.kv.journal import KeyJournal
from overfill.v1 import registry_pb2


class SharedLink:
    """A network link or a disk: moves the KV of one prompt after the other.

    Attributes:
        free: Time at which everything has moved that was asked for so far.
    """

    def __init__(self) -> None:
        self.free = 0.0

    def end(self, since: float, seconds: float) -> float:
        """Returns when a transfer would end that takes ``seconds`` and can begin at ``since``."""
        return max(self.free, since) + seconds

    def take(self, since: float, seconds: float) -> float:
        """Begins such a transfer. Returns when it ends."""
        self.free = self.end(since, seconds)
        return self.free


class KvSource(Protocol):
    """KV that prefill workers may import, and the link over which it comes."""

    @property
    def link(self) -> SharedLink: ...

    def leading(self, keys: Sequence[int], begin: int) -> int:
        """Returns how many leading blocks of a prompt the importer has after an import; it has ``begin`` before."""


class KeptBlocks:
    """Blocks on a disk, or those that a decode worker lends. The least recently used ones make room for others.

    Args:
        room: Returns the number of blocks that may be kept now.
    """

    def __init__(self, room: Callable[[], int]) -> None:
        self.link = SharedLink()
        self._room = room
        self._keys: OrderedDict[int, None] = OrderedDict()
        self._journal = KeyJournal()
        self._feed = self._journal.feed()

    def keep(self, keys: Sequence[int]) -> None:
        """Keeps a prompt's leading blocks, given by all their keys."""
        for key in reversed(keys):  # a block is useless without those before it, so that they go last
            if key not in self._keys:
                self._journal.add(key)
            self._keys[key] = None
            self._keys.move_to_end(key)
        self._make_room()

    def leading(self, keys: Sequence[int], begin: int) -> int:
        self._make_room()
        return leading_blocks(self._keys, keys, begin)

    def delta(self) -> registry_pb2.PrefixDelta | None:
        """Returns the changes since the last call, for a report."""
        self._make_room()
        return self._feed.take()

    def _make_room(self) -> None:
        room = max(0, self._room())
        while len(self._keys) > room:
            key, _ = self._keys.popitem(last=False)
            self._journal.remove(key)


def leading_blocks(known: Container[int], keys: Sequence[int], begin: int) -> int:
    """As ``KvSource.leading``, of the blocks with the keys ``known``."""
    return next((index for index in range(begin, len(keys)) if keys[index] not in known), len(keys))

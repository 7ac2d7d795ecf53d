"""A decode worker's open connections to prefill workers: checked once, shared, closed when nobody needs them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from overfill.errors import Incompatible, Unavailable
from overfill.kv.handshake import KvIdentity
from overfill.kv.receiver import PrefillPeer
from overfill.rpc.tls import Credentials
from overfill.v1 import decode_pb2

_KEPT_UNUSED = 300.0
"""Seconds after which a peer that nobody used is closed when another one comes: workers whose pods or replicas are
gone never come back under their name."""


@dataclass(slots=True, eq=False)
class _Entry:
    peer: PrefillPeer
    checked: asyncio.Task[None]
    users: int = 0
    used_at: float = 0.0  # time.monotonic() when the last user left
    broken: bool = False


class PeerPool:
    """One ``PrefillPeer`` per incarnation of a prefill worker.

    Args:
        identity: what this worker's KV means; every peer is held against it.
        streams: data connections per peer.
        shm: whether to share memory with peers on this host.
    """

    def __init__(self, identity: KvIdentity, streams: int, tls: Credentials | None, shm: bool = True) -> None:
        self._identity = identity
        self._streams = streams
        self._tls = tls
        self._shm = shm
        self._entries: dict[tuple[str, int], _Entry] = {}

    @asynccontextmanager
    async def use(self, target: decode_pb2.AssignPrefill) -> AsyncIterator[PrefillPeer]:
        """The peer, connected and compatible, for as long as the context lasts.

        A peer that proves unavailable or incompatible is forgotten, and closed with its last user.

        Raises:
            Incompatible: with the differing fields.
            Unavailable: the worker is not there, or is another incarnation.
        """
        key = (target.worker_id, target.incarnation)
        entry = self._entries.get(key)
        retired: list[PrefillPeer] = []
        if entry is None or (entry.peer.lost_link and entry.users == 0):
            retired = self._retire(target.worker_id)
            peer = PrefillPeer(target, self._streams, self._tls, self._shm)
            entry = _Entry(peer, asyncio.ensure_future(peer.handshake(self._identity)))
            self._entries[key] = entry
        entry.users += 1
        try:
            await asyncio.gather(*(old.close() for old in retired))
            await asyncio.shield(entry.checked)
            yield entry.peer
        except (Incompatible, Unavailable):
            self._forget(key, entry)
            raise
        finally:
            if entry.checked.done() and (entry.checked.cancelled() or entry.checked.exception() is not None):
                self._forget(key, entry)
            entry.users -= 1
            entry.used_at = time.monotonic()
            if entry.broken and entry.users == 0:
                await entry.peer.close()

    def _forget(self, key: tuple[str, int], entry: _Entry) -> None:
        entry.broken = True
        if self._entries.get(key) is entry:
            del self._entries[key]

    def _retire(self, worker_id: str) -> list[PrefillPeer]:
        """Forgets all connections to a worker that is to be connected anew, and what was not used for long.

        Returns those to close now; the rest end with their last user.
        """
        unused = time.monotonic() - _KEPT_UNUSED
        old = [
            (key, entry)
            for key, entry in self._entries.items()
            if key[0] == worker_id or (entry.users == 0 and entry.used_at < unused)
        ]
        for key, entry in old:
            self._forget(key, entry)
        return [entry.peer for _, entry in old if entry.users == 0]

    async def close(self) -> None:
        """Closes every connection; nothing may be in use."""
        for entry in self._entries.values():
            entry.checked.cancel()
            await entry.peer.close()
        self._entries.clear()

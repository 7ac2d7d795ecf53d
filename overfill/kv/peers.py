"""A decode worker's open connections to prefill workers: checked once, shared by requests, closed when unused."""

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

_MAX_IDLE_TIME = 300.0
"""Seconds without use after which a peer is closed, at the next new connection. Its worker may have gone: pods and
replicas do not return under their old name."""


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
        identity: this worker's identity, which every peer is compared with.
        streams: number of data connections per peer.
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
        """Provides the connected and compatible peer within the context.

        The pool drops a peer that is unavailable or incompatible, and closes it after its last user.

        Raises:
            Incompatible: the identities differ; names the differing fields.
            Unavailable: the worker does not answer, or is another incarnation.
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
        """Drops all connections to a worker that is about to be connected anew, and all connections idle for long.

        Returns:
            Peers to close now. The others are closed by their last user.
        """
        unused = time.monotonic() - _MAX_IDLE_TIME
        old = [
            (key, entry)
            for key, entry in self._entries.items()
            if key[0] == worker_id or (entry.users == 0 and entry.used_at < unused)
        ]
        for key, entry in old:
            self._forget(key, entry)
        return [entry.peer for _, entry in old if entry.users == 0]

    async def close(self) -> None:
        """Closes every connection. None may be in use."""
        for entry in self._entries.values():
            entry.checked.cancel()
            await entry.peer.close()
        self._entries.clear()

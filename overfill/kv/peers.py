"""A decode worker's open connections to prefill workers: checked once, shared, closed when nobody needs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from overfill.errors import Incompatible, Unavailable
from overfill.kv.handshake import KvIdentity
from overfill.kv.receiver import PrefillPeer
from overfill.rpc.tls import ClientTls
from overfill.v1 import decode_pb2


@dataclass(slots=True, eq=False)
class _Entry:
    peer: PrefillPeer
    checked: asyncio.Task[None]
    users: int = 0
    broken: bool = False


class PeerPool:
    """One ``PrefillPeer`` per incarnation of a prefill worker.

    Args:
        identity: what this worker's KV means; every peer is held against it.
        streams: data connections per peer.
    """

    def __init__(self, identity: KvIdentity, streams: int, tls: ClientTls | None) -> None:
        self._identity = identity
        self._streams = streams
        self._tls = tls
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
        if entry is None:
            peer = PrefillPeer(target, self._streams, self._tls)
            entry = _Entry(peer, asyncio.ensure_future(peer.handshake(self._identity)))
            self._entries[key] = entry
        entry.users += 1
        try:
            await asyncio.shield(entry.checked)
            yield entry.peer
        except (Incompatible, Unavailable):
            entry.broken = True
            if self._entries.get(key) is entry:
                del self._entries[key]
            raise
        finally:
            entry.users -= 1
            if entry.broken and entry.users == 0:
                await entry.peer.close()

    async def close(self) -> None:
        """Closes every connection; nothing may be in use."""
        for entry in self._entries.values():
            entry.checked.cancel()
            await entry.peer.close()
        self._entries.clear()

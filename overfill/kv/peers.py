"""A decode worker's open connections to prefill workers: checked once, shared by requests, closed when unused.

``PrefillPeer`` is the connection to one prefill worker: a control channel, and ``streams`` data channels to each of its
data addresses, each its own TCP connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from overfill.errors import DeadlineExceeded, Incompatible, RequestCancelled, Unavailable
from overfill.kv.handshake import KvIdentity, check_compatible, data_address_fault
from overfill.kv.puller import MAX_IDLE_TIME, DataChannels
from overfill.kv.shm import ShmClient
from overfill.rpc.access import Role
from overfill.rpc.calls import checked_response
from overfill.rpc.channel import open_channel
from overfill.rpc.tls import Credentials
from overfill.v1 import common_pb2, decode_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc

_DESCRIBE_TIMEOUT = 5.0  # seconds

logger = logging.getLogger(__name__)


class PrefillPeer:
    """Connection to one incarnation of one prefill worker, usable after ``handshake``.

    Args:
        streams: number of connections for data streams, to each data address.
        shm: whether to share memory with a worker that is on this host and offers it.

    Attributes:
        data: connections to the data addresses.
        sources: data addresses; each KV head is at exactly one.
        link: shared memory; None means that payloads travel.
        codecs: codecs that the worker can send.
    """

    def __init__(
        self, target: decode_pb2.AssignPrefill, streams: int, tls: Credentials | None, shm: bool = True
    ) -> None:
        self.target = target
        self.sources: Sequence[kv_pb2.DataAddress] = [*target.data_addresses]
        self.link: ShmClient | None = None
        self.codecs: frozenset[int] = frozenset()
        self._shm = shm
        self._control = open_channel(target.address, tls, role=Role.WORKER)
        self.data = DataChannels(streams, tls)
        self.control = prefill_pb2_grpc.PrefillStub(self._control)

    async def handshake(self, mine: KvIdentity) -> None:
        """Compares identities, and connects the shared memory.

        Raises:
            Incompatible: the identities differ, or the data addresses do not have each KV head once; names every such
                field.
            Unavailable: the worker does not answer, or was restarted.
        """
        name = self.target.worker_id
        call = self.control.Describe(prefill_pb2.DescribePrefillRequest(), timeout=_DESCRIBE_TIMEOUT)
        try:
            described: prefill_pb2.DescribePrefillResponse = await checked_response(call, name)
        except (DeadlineExceeded, RequestCancelled, Unavailable) as error:
            raise Unavailable(f"prefill worker {name} did not answer: {error}") from error
        if described.incarnation != self.target.incarnation:
            raise Unavailable(f"prefill worker {name} was restarted")
        theirs = KvIdentity.from_proto(described.wire_version, described.model, described.kv)
        software = f"software {described.software_version}, engine {described.engine or 'unknown'}"
        check_compatible(mine, theirs, f"prefill worker {name} ({software})")
        if not self.sources:
            self.sources = [kv_pb2.DataAddress(address=self.target.address, num_kv_heads=mine.kv.num_kv_heads)]
        elif fault := data_address_fault(self.sources, mine.kv.num_kv_heads):
            raise Incompatible(f"prefill worker {name}: data_addresses {fault}", ["data_addresses"])
        if common_pb2.KV_CODEC_RAW not in described.codecs:
            raise Incompatible(f"prefill worker {name} cannot send KV uncompressed", ["codecs"])
        self.codecs = frozenset(described.codecs)
        if self._shm and described.HasField("shm"):
            try:
                self.link = await ShmClient.connect(described.shm)
            except (OSError, TimeoutError, ValueError) as error:
                logger.info("prefill worker %s shares no memory with this one: %s", name, error)

    @property
    def has_kv(self) -> bool:
        """Whether the process that serves the control channel has the KV itself, rather than ranks."""
        return all(source.address == self.target.address for source in self.sources)

    @property
    def lost_link(self) -> bool:
        """Whether memory was shared and the link has closed."""
        return self.link is not None and not self.link.alive

    async def close(self) -> None:
        if self.link is not None:
            self.link.close()
        await asyncio.gather(self._control.close(None), self.data.close())


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
        streams: number of data connections per data address of a peer.
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

        The pool drops a peer that is unavailable or incompatible or has lost its shared memory. It closes the peer
        after its last user.

        Raises:
            Incompatible: the identities differ; names the differing fields.
            Unavailable: the worker does not answer, or is another incarnation.
        """
        key = (target.worker_id, target.incarnation)
        entry = self._entries.get(key)
        retired: list[PrefillPeer] = []
        if entry is None or entry.peer.lost_link:
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
        unused = time.monotonic() - MAX_IDLE_TIME
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

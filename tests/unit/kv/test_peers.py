"""Tests that the pool of connections to prefill workers keeps those in use and closes idle ones."""

import gc
import weakref
from contextlib import suppress
from typing import ClassVar

import grpc.aio
import pytest

from overfill.kv import peers
from overfill.kv.handshake import KvIdentity
from overfill.kv.peers import PeerPool
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import pull_kv
from overfill.rpc.constants import WIRE_VERSION
from overfill.v1 import decode_pb2, prefill_pb2


class Peer:
    made: ClassVar[list["Peer"]] = []

    def __init__(self, target, streams, tls, shm):
        self.closed = self.lost_link = False
        Peer.made.append(self)

    async def handshake(self, identity):
        pass

    async def close(self):
        self.closed = True


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(peers, "PrefillPeer", Peer)
    monkeypatch.setattr(Peer, "made", [])
    return PeerPool(KvIdentity(WIRE_VERSION, b"", b"", KvSpec(1, 1, 8, "float32", RopeSpec())), 1, None)


async def use(pool, name):
    async with pool.use(decode_pb2.AssignPrefill(worker_id=name, incarnation=1, address="127.0.0.1:1")):
        pass


async def test_connections_that_are_idle_too_long_are_closed(pool, monkeypatch):
    await use(pool, "prefill-0")
    await use(pool, "prefill-1")
    assert [peer.closed for peer in Peer.made] == [False, False]
    monkeypatch.setattr(peers, "MAX_IDLE_TIME", 0.0)
    await use(pool, "prefill-2")
    assert [peer.closed for peer in Peer.made] == [True, True, False]


async def test_a_peer_that_has_lost_its_shared_memory_is_replaced_at_once_and_closed_by_its_last_user(pool):
    target = decode_pb2.AssignPrefill(worker_id="prefill-0", incarnation=1, address="127.0.0.1:1")
    async with pool.use(target) as peer:
        peer.lost_link = True
        async with pool.use(target) as other:
            assert other is not peer
            assert not peer.closed, "its user still needs it"
    assert (peer.closed, other.closed) == (True, False)
    async with pool.use(target) as again:
        assert again is other


async def test_a_peer_in_use_is_never_closed(pool, monkeypatch):
    monkeypatch.setattr(peers, "MAX_IDLE_TIME", 0.0)
    target = decode_pb2.AssignPrefill(worker_id="prefill-0", incarnation=1, address="127.0.0.1:1")
    async with pool.use(target) as peer:
        await use(pool, "prefill-1")
        assert not peer.closed


async def test_a_closed_data_channel_leaves_memory():
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    with suppress(grpc.aio.AioRpcError):
        async for _ in pull_kv(channel, prefill_pb2.PullKvRequest(), 0.01):
            pass
    await channel.close()
    left = weakref.ref(channel)
    del channel
    gc.collect()
    assert left() is None

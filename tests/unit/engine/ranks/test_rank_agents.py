"""Tests of ranks that serve and pull KV: shares of the heads that differ, progress in any order, ends of all kinds."""

import asyncio
import itertools
import socket
from concurrent.futures import ThreadPoolExecutor, wait

import grpc
import numpy as np
import pytest
from rank_agents import BLOCK, hello, running_ranks

from overfill.engine.sequence import KvWritten
from overfill.engine.vllm.ranks.agent import RankAgent
from overfill.engine.vllm.ranks.messages import TOKEN_BYTES, OpenTransfer
from overfill.errors import InvalidRequest, TransferFailed, Unavailable, UnsupportedModel
from overfill.kv.chunks import TransferSpec
from overfill.kv.ranges import Coverage, KvRange
from overfill.kv.ranks import Pull
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import pull_kv
from overfill.request.params import SamplingParams
from overfill.rpc.access import WORKER_RPCS, AccessPolicy
from overfill.rpc.calls import responses
from overfill.rpc.channel import open_channel
from overfill.v1 import decode_pb2, prefill_pb2, prefill_pb2_grpc

KV = KvSpec(3, 4, 2, "float32", RopeSpec())
PROMPT = 10
LAYERS = (0, 2)
LAYER_MAP = (2, 0, 2)
OPEN = (None, AccessPolicy(WORKER_RPCS), 64)
"""TLS, access and limit of a listener on loopback."""

_ids = itertools.count(1)


def new_spec():
    return TransferSpec(next(_ids).to_bytes(16, "little"), 1, KV, LAYERS, (1, PROMPT))


def values(heads):
    """KV of the prompt, each number another one: [layers, 2, tokens, heads, head_dim]."""
    shape = (KV.num_layers, 2, PROMPT, KV.num_kv_heads, KV.head_dim)
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)[:, :, :, slice(*heads)]


def fill(ranks, blocks):
    for store, agent in zip(ranks.stores, ranks.agents, strict=True):
        heads = agent.hello.heads
        for layer in range(KV.num_layers):
            store.put(layer, blocks, (0, PROMPT), heads, values(heads)[layer])


def mark_all(ranks, spec, layers=range(KV.num_layers), token_end=PROMPT):
    for agent in ranks.agents:
        for layer in layers:
            agent.mark_ready([written(spec, layer, token_end)])


def written(spec, layer, token_end, event=None):
    return KvWritten(spec.transfer_id.hex(), range(layer, layer + 1), token_end, event)


async def serve(ranks):
    return await ranks.kv.serve("127.0.0.1", 0, *OPEN)


@pytest.mark.parametrize(
    ("served", "pulled"),
    [
        ([(0, 4)], [(0, 2), (2, 4)]),
        ([(0, 2), (2, 4)], [(0, 4)]),
        ([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([(0, 2), (0, 2), (2, 4), (2, 4)], [(0, 2), (2, 4), (0, 2), (2, 4)]),
        ([(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 4), (0, 4)]),
    ],
    ids=["1 to 2", "2 to 1", "2 to 4", "replicas", "4 to replicas"],
)
async def test_each_rank_gets_its_heads_and_each_vector_is_reported_once(served, pulled):
    spec, theirs, ours = new_spec(), [5, 9, 7], [3, 1, 8]
    with running_ranks(KV, served) as prefill, running_ranks(KV, pulled) as decode:
        fill(prefill, theirs)
        sources = await serve(prefill)
        assert [(s.first_kv_head, s.first_kv_head + s.num_kv_heads) for s in sources] == sorted({*served})
        await decode.kv.connect(2, None)
        # The ranks compute layer 0 of the first tokens before they hear of the transfer, and get the last block later.
        for agent in prefill.agents:
            agent.assign([(spec.transfer_id, 1, theirs[1:2])])
        mark_all(prefill, spec, [0], 2 * BLOCK)
        await prefill.kv.open(spec, theirs[:1], 3)
        reported = Coverage(spec.layers, spec.tokens, (0, KV.num_kv_heads))
        moved = []

        def note(news):
            moved.append(news)
            for each in news.ranges:
                reported.add(each)  # raises for a vector that was reported before

        pull = asyncio.create_task(decode.kv.puller.pull(Pull("p", spec, LAYER_MAP, ours, sources, 60.0), note))
        while reported.missing([KvRange(0, 1, 1, 2 * BLOCK, 0, 4)]):
            await asyncio.sleep(0.001)
        assert not pull.done()
        for agent in prefill.agents:
            agent.assign([(spec.transfer_id, 2, theirs[2:])])
        mark_all(prefill, spec)
        await pull
        assert reported.complete
        replicas = len(pulled) // len({*pulled})
        assert sum(news.kv_bytes for news in moved) == spec.total_bytes * replicas
        for store, heads in zip(decode.stores, pulled, strict=True):
            expected = values(heads)
            for layer, source in enumerate(LAYER_MAP):
                got = store.get(layer, ours, (1, PROMPT), heads)
                np.testing.assert_array_equal(got, expected[source, :, 1:])
            assert not store.array[:, :, ours[0], 0].any(), "the first token does not travel"
        first, last = await prefill.kv.close(spec.transfer_id)
        assert 0 < first <= last
        for each in (prefill, decode):
            await each.kv.stop()
    assert prefill.lost == decode.lost == prefill.orphans == decode.orphans == []


async def test_a_cancelled_pull_ends_when_no_rank_writes_any_more():
    spec, blocks = new_spec(), [0, 1, 2]
    with running_ranks(KV, [(0, 4)]) as prefill, running_ranks(KV, [(0, 2), (2, 4)]) as decode:
        fill(prefill, blocks)
        sources = await serve(prefill)
        await decode.kv.connect(1, None)
        await prefill.kv.open(spec, blocks, 0)
        mark_all(prefill, spec, [0])
        decode.stores[1].go_on.clear()
        pull = asyncio.create_task(
            decode.kv.puller.pull(Pull("p", spec, LAYER_MAP, blocks, sources, None), lambda _: None)
        )
        await asyncio.to_thread(decode.stores[1].busy.wait, 60)
        pull.cancel()
        done, _ = await asyncio.wait([pull], timeout=0.2)
        assert not done, "a rank still writes"
        decode.stores[1].go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await pull
        before = [store.array.copy() for store in decode.stores]
        mark_all(prefill, spec)
        await prefill.kv.close(spec.transfer_id)
        for store, array in zip(decode.stores, before, strict=True):
            np.testing.assert_array_equal(store.array, array)
        await asyncio.gather(prefill.kv.stop(), decode.kv.stop())


async def test_a_transfer_is_closed_when_no_rank_reads_it_any_more():
    spec, blocks = new_spec(), [0, 1, 2]
    with running_ranks(KV, [(0, 2), (2, 4)]) as prefill, running_ranks(KV, [(0, 4)]) as decode:
        sources = await serve(prefill)
        await decode.kv.connect(1, None)
        await prefill.kv.open(spec, blocks, 0)
        prefill.stores[1].go_on.clear()
        for agent in prefill.agents:
            # With an event, a thread reads.
            agent.mark_ready([written(spec, 0, PROMPT, object())])
        pull = asyncio.create_task(
            decode.kv.puller.pull(Pull("p", spec, LAYER_MAP, blocks, sources, None), lambda _: None)
        )
        await asyncio.to_thread(prefill.stores[1].busy.wait, 60)
        closing = asyncio.create_task(prefill.kv.close(spec.transfer_id))
        done, _ = await asyncio.wait([closing], timeout=0.2)
        assert not done, "a rank still reads"
        prefill.stores[1].go_on.set()
        await closing
        pull.cancel()
        # When the broken streams' retries are sooner than the cancel, the source says that the transfer has ended.
        with pytest.raises((asyncio.CancelledError, TransferFailed)):
            await pull
        # Progress of a transfer that has ended is dropped.
        mark_all(prefill, spec)
        await asyncio.gather(prefill.kv.stop(), decode.kv.stop())
        assert all(not agent._early for agent in prefill.agents)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ranges": [KvRange(0, 1, 1, 2, 1, 3).to_proto()]}, InvalidRequest, "serves the KV heads 0:2 only"),
        ({"ranges": [KvRange(1, 2, 1, 2, 0, 2).to_proto()]}, InvalidRequest, "outside the transfer"),
        ({"attempt": 2}, TransferFailed, "unknown transfer"),
        ({"transfer_id": b"x" * 16}, TransferFailed, "unknown transfer"),
        ({"link_id": b"x" * 16}, Unavailable, "no such link of shared memory"),
    ],
)
async def test_a_rank_refuses_streams_that_it_cannot_serve(changed, error, message):
    spec = new_spec()
    with running_ranks(KV, [(0, 2), (2, 4)]) as prefill:
        sources = await serve(prefill)
        await prefill.kv.open(spec, [0, 1, 2], 0)
        own = {"transfer_id": spec.transfer_id, "attempt": 1, "ranges": [KvRange(0, 1, 1, 2, 0, 2).to_proto()]}
        async with open_channel(sources[0].address) as channel:
            with pytest.raises(error, match=message):
                await anext(responses(pull_kv(channel, prefill_pb2.PullKvRequest(**own | changed), 20), "p"))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await prefill_pb2_grpc.PrefillStub(channel).Describe(prefill_pb2.DescribePrefillRequest())
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await prefill.kv.stop()
        async with open_channel(sources[0].address) as channel:
            with pytest.raises(Unavailable):
                await anext(responses(pull_kv(channel, prefill_pb2.PullKvRequest(**own), 20), "p"))


async def test_one_ranks_error_ends_the_pull_of_all():
    spec = new_spec()
    with running_ranks(KV, [(0, 2), (2, 4)]) as prefill, running_ranks(KV, [(0, 2), (2, 4)]) as decode:
        sources = await serve(prefill)
        await decode.kv.connect(1, None)
        prefill.links.call([1], OpenTransfer(spec, [0, 1, 2], 0))  # the first rank never hears of it
        with pytest.raises(TransferFailed, match="unknown transfer"):
            await decode.kv.puller.pull(Pull("p", spec, LAYER_MAP, [0, 1, 2], sources, None), lambda _: None)
        await asyncio.gather(prefill.kv.stop(), decode.kv.stop())


async def test_processors_are_made_in_every_rank_and_forgotten():
    def make(params, prompt, eos_ids):
        if params.seed == 13:
            raise InvalidRequest("sampling.grammar", "is not supported")
        return params.seed, list(prompt), list(eos_ids)

    with running_ranks(KV, [(0, 2), (2, 4)], make) as ranks:
        ends = decode_pb2.StartDecode(eos_token_ids=[3]).eos_token_ids  # as the service has them
        ranks.kv.prepare("a", SamplingParams(seed=1), [1, 2], ends)
        assert [agent.processor("a") for agent in ranks.agents] == [(1, [1, 2], [3])] * 2
        with pytest.raises(InvalidRequest, match="is not supported"):
            ranks.kv.prepare("b", SamplingParams(seed=13), [1], [])
        for key in "ab":
            ranks.kv.forget(key)
        await ranks.kv.stop()
        for key in "ab":
            with pytest.raises(KeyError):
                ranks.agents[1].processor(key)


async def test_ranks_without_orders_to_pull_say_so():
    with running_ranks(KV, [(0, 4)]) as decode:
        with pytest.raises(Exception, match="has not been told how to pull"):
            await decode.kv.puller.pull(Pull("p", new_spec(), LAYER_MAP, [0, 1, 2], [], None), lambda _: None)
        await decode.kv.stop()


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([(0, 1), (1, 2)], r"hold the KV heads \[\(0, 1\), \(1, 2\)\]; together they must hold 0:4"),
        ([(0, 2), (3, 4)], "together they must hold 0:4"),
        ([(0, 3), (1, 4)], "together they must hold 0:4"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(shares, message):
    with pytest.raises(UnsupportedModel, match=message), running_ranks(KV, shares):
        pass


def test_a_link_that_breaks_orphans_the_rank():
    with running_ranks(KV, [(0, 4)]) as ranks:
        ranks.links.close()
        ranks.agents[0].join()
        assert ranks.orphans == [0]


def test_a_rank_waits_while_others_fill_the_queue_of_its_workers_socket():
    """Any local user may connect, and is refused by the worker once that accepts the connection."""
    with ThreadPoolExecutor(1) as pool, socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel chooses an abstract name
        listener.listen(0)
        name = listener.getsockname()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(name)
            config = {"link": name[1:].decode(), "link_token": bytes(TOKEN_BYTES).hex()}
            orphaned: list[None] = []
            starting = pool.submit(
                RankAgent, config, hello(0, KV, (0, 4)), None, pool, lambda *_: None, lambda: orphaned.append(None)
            )
            assert not wait([starting], 1).done
            listener.accept()[0].close()
        connection, _ = listener.accept()
        with connection:
            agent = starting.result(20)
            assert connection.recv(TOKEN_BYTES) == bytes(TOKEN_BYTES)
        agent.join()
        assert orphaned == [None]

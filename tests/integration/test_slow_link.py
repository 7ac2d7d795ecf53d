"""Tests slow links: neither the first token nor other links wait for the slow one's KV, and pings do not fail."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import psutil
import pytest
import torch
from prefill_process import prefill_worker

from overfill.kv.cache import KvCache
from overfill.kv.handshake import KvIdentity
from overfill.kv.peers import PrefillPeer
from overfill.kv.receiver import PromptPull
from overfill.kv.spec import KvSpec
from overfill.lab.faults.proxy import TcpProxy
from overfill.making.tiny import make_tiny_pair
from overfill.request.params import SamplingParams
from overfill.rpc import channel
from overfill.rpc.constants import WIRE_VERSION
from overfill.v1 import decode_pb2, kv_pb2, prefill_pb2

RATE = 100e6 / 8
BLOCK = 16
TOKENS = 1000  # of 64 KiB each: five seconds at that rate


@pytest.fixture(scope="module")
def heavy_pair(tmp_path_factory):
    """A pair with much KV and little compute."""
    folder = tmp_path_factory.mktemp("pairs") / "heavy"
    return make_tiny_pair(
        folder, identity=True, num_layers=16, num_heads=8, num_kv_heads=8, head_dim=64, intermediate_size=64
    )


class Pull:
    """One prompt that is handed to a decode worker of its own; ``run`` returns the cache."""

    def __init__(self, hello, data_address, prompt, executor, shm):
        self._spec = KvSpec.from_proto(hello.kv)
        self._identity = KvIdentity.from_proto(WIRE_VERSION, hello.model, hello.kv)
        target = decode_pb2.AssignPrefill(
            worker_id=hello.worker_id,
            incarnation=hello.incarnation,
            address=hello.address,
            data_addresses=[kv_pb2.DataAddress(address=data_address, num_kv_heads=hello.kv.num_kv_heads)],
        )
        self._peer = PrefillPeer(target, 1, None, shm)
        self._prompt = prompt
        self._executor = executor
        self.first_token = asyncio.Event()

    async def run(self):
        await self._peer.handshake(self._identity)
        blocks = list(range(-(-len(self._prompt) // BLOCK)))
        cache = KvCache(self._spec, len(blocks), BLOCK, torch.device("cpu"))
        request = prefill_pb2.StartPrefill(
            request_id="r",
            prompt_token_ids=self._prompt,
            sampling=SamplingParams(temperature=0).to_proto(),
            sample_first_token=True,
        )
        layers = range(self._spec.num_layers)
        pull = PromptPull(self._peer, request, self._spec, layers, cache, blocks, self._executor)
        self.stats = pull.stats
        try:
            await pull.run(120.0, lambda token: self.first_token.set())
        finally:
            await self._peer.close()
        return cache


@pytest.mark.parametrize("shm", [False, True])
async def test_a_slow_link_holds_up_neither_its_first_token_nor_others(heavy_pair, shm):
    prompt = [(7 * i) % 470 + 20 for i in range(TOKENS)]
    arguments = [f"--pair={heavy_pair}", "--dtype=float32", "--kv-memory=256MiB"]
    with ThreadPoolExecutor(2) as executor:
        async with AsyncExitStack() as stack:
            hello = await stack.enter_async_context(prefill_worker(arguments, 1, lambda name, line: None))
            proxy = await stack.enter_async_context(TcpProxy(hello.address, RATE))
            slow = Pull(hello, proxy.address, prompt, executor, shm=False)
            slow_run = asyncio.ensure_future(slow.run())
            await asyncio.wait_for(slow.first_token.wait(), 60)
            assert not slow_run.done(), "the KV cannot have arrived yet"
            for turn in range(3):
                other = Pull(hello, hello.address, [*prompt[:500], 30 + turn], executor, shm)
                await asyncio.wait_for(other.run(), 60)
            assert not slow_run.done(), "others waited for the slow link"
            through_slow = await slow_run
            straight = await Pull(hello, hello.address, prompt, executor, shm).run()
    assert torch.equal(through_slow.k[:, :62], straight.k[:, :62])
    assert torch.allclose(through_slow.v, straight.v, atol=1e-4)


async def test_a_receiver_that_does_not_read_does_not_bloat_the_worker(heavy_pair):
    """KV for a slow reader stays in the cache (64 MB); only a few messages are in transit."""
    prompt = [(11 * i) % 470 + 20 for i in range(TOKENS)]
    arguments = [f"--pair={heavy_pair}", "--dtype=float32", "--kv-memory=256MiB"]
    with ThreadPoolExecutor(2) as executor:
        async with prefill_worker(arguments, 1, lambda name, line: None) as hello:
            await Pull(hello, hello.address, prompt, executor, shm=False).run()  # allocates all memory
            worker = psutil.Process(hello.pid)
            async with TcpProxy(hello.address, 2e6) as proxy:
                stuck = [Pull(hello, proxy.address, prompt, executor, shm=False) for _ in range(3)]
                before = worker.memory_info().rss
                runs = [asyncio.ensure_future(pull.run()) for pull in stuck]
                await asyncio.wait_for(asyncio.gather(*(pull.first_token.wait() for pull in stuck)), 60)
                grown = worker.memory_info().rss - before
                for run in runs:
                    run.cancel()
                await asyncio.wait(runs)
    # The worker reads 4 MiB ahead of 4 MiB being sent, and gRPC buffers some; all KV would be 3 x 64 MB.
    assert grown < 3 * 20 * 2**20


async def test_a_ping_whose_answer_waits_behind_kv_breaks_no_stream(heavy_pair, monkeypatch):
    """A message of 1 MiB takes 4 s on this link, longer than a ping may take on a control channel here."""
    monkeypatch.setattr(channel, "KEEPALIVE_TIMEOUT", 1.0)
    prompt = [(13 * i) % 470 + 20 for i in range(64)]
    arguments = [f"--pair={heavy_pair}", "--dtype=float32", "--kv-memory=256MiB"]
    with ThreadPoolExecutor(2) as executor:
        async with (
            prefill_worker(arguments, 1, lambda name, line: None) as hello,
            TcpProxy(hello.address, 250e3) as proxy,
        ):
            slow = Pull(hello, proxy.address, prompt, executor, shm=False)
            await slow.run()
    assert slow.stats.broken_streams == 0

"""Tests slow links: neither the first token nor other links wait for the slow one's KV, and pings do not fail."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from kv_pulls import opened, prefill_process, pull

from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import KvSpec
from overfill.lab.chaos.proxy import TcpProxy
from overfill.making.tiny import make_tiny_pair
from overfill.rpc import channel
from overfill.rpc.constants import WIRE_VERSION

RATE = 100e6 / 8
TOKENS = 1000  # of 64 KiB each: five seconds at that rate


@pytest.fixture(scope="module")
def heavy_pair(tmp_path_factory):
    """A pair with much KV and little compute."""
    folder = tmp_path_factory.mktemp("pairs") / "heavy"
    return make_tiny_pair(
        folder, identity=True, num_layers=16, num_heads=8, num_kv_heads=8, head_dim=64, intermediate_size=64
    )


@pytest.fixture(scope="module")
def hello(heavy_pair):
    """The Hello of a prefill worker."""
    with prefill_process(f"--pair={heavy_pair}", "--kv-memory=256MiB") as hello:
        yield hello


@pytest.fixture
def pulled(hello):
    """A function that pulls a prompt's KV through connections of its own; it returns cache and statistics."""
    spec = KvSpec.from_proto(hello.kv)
    with ThreadPoolExecutor(2) as executor:

        async def run(data_address, prompt, shm=False, first_token=None):
            peer = opened(hello, data_address, streams=1, shm=shm)
            on_token = (lambda token: first_token.set()) if first_token else (lambda token: None)
            try:
                await peer.handshake(KvIdentity.from_proto(WIRE_VERSION, hello.model, hello.kv))
                layers = range(spec.num_layers)
                return await pull(peer, spec, layers, prompt, executor, timeout=120.0, on_token=on_token)
            finally:
                await peer.close()

        yield run


@pytest.mark.parametrize("shm", [False, True])
async def test_a_slow_link_holds_up_neither_its_first_token_nor_others(hello, pulled, shm):
    prompt = [(7 * i) % 470 + 20 for i in range(TOKENS)]
    first_token = asyncio.Event()
    async with TcpProxy(hello.address, RATE) as proxy:
        slow = asyncio.ensure_future(pulled(proxy.address, prompt, first_token=first_token))
        await asyncio.wait_for(first_token.wait(), 60)
        assert not slow.done(), "the KV cannot have arrived yet"
        for turn in range(3):
            await asyncio.wait_for(pulled(hello.address, [*prompt[:500], 30 + turn], shm), 60)
        assert not slow.done(), "others waited for the slow link"
        through_slow, _ = await slow
        straight, _ = await pulled(hello.address, prompt, shm)
    assert torch.equal(through_slow.k[:, :62], straight.k[:, :62])
    assert torch.allclose(through_slow.v, straight.v, atol=1e-4)


async def test_a_receiver_that_does_not_read_does_not_bloat_the_worker(hello, pulled):
    """KV for a slow reader stays in the cache (64 MB); only a few messages are in transit."""
    prompt = [(11 * i) % 470 + 20 for i in range(TOKENS)]
    await pulled(hello.address, prompt)  # allocates all memory
    worker = psutil.Process(hello.pid)
    async with TcpProxy(hello.address, 2e6) as proxy:
        begun = [asyncio.Event() for _ in range(3)]
        before = worker.memory_info().rss
        runs = [asyncio.ensure_future(pulled(proxy.address, prompt, first_token=event)) for event in begun]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 60)
        grown = worker.memory_info().rss - before
        for run in runs:
            run.cancel()
        await asyncio.wait(runs)
    # The worker reads 4 MiB ahead of 4 MiB being sent, and gRPC buffers some; all KV would be 3 x 64 MB.
    assert grown < 3 * 20 * 2**20


async def test_a_ping_whose_answer_waits_behind_kv_breaks_no_stream(hello, pulled, monkeypatch):
    """A message of 1 MiB takes 4 s on this link, longer than a ping may take on a control channel here."""
    monkeypatch.setattr(channel, "KEEPALIVE_TIMEOUT", 1.0)
    async with TcpProxy(hello.address, 250e3) as proxy:
        _, stats = await pulled(proxy.address, [(13 * i) % 470 + 20 for i in range(32)])
    assert stats.broken_streams == 0

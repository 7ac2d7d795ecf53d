"""Tests two routers that share mock workers, on loopback."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import openai
import pytest
from mocks import mock_worker

from overfill.client import AsyncClient
from overfill.errors import ShuttingDown
from overfill.lab.chaos.proxy import TcpProxy
from overfill.request.params import SamplingParams
from overfill.routing.tier import DEFAULT_TIER
from overfill.settings.config import DecodeConfig, PrefillConfig, RouterConfig
from services.router.app import Router

IGNORE_EOS = {"ignore_eos": True, "temperature": 0}


async def until(condition):
    """Polls ``condition``, because a router's view of other processes has no event to wait for."""
    while not condition():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def two_routers(pair, seqs, *flags):
    flags = [f"--pair={pair}", "--port=0", "--grace-period=0", *flags]
    async with AsyncExitStack() as stack:
        routers = [Router(RouterConfig.parse(flags)) for _ in range(2)]
        addresses = [await router.start() for router in routers]
        serving = [asyncio.create_task(router.run()) for router in routers]
        common = {"pair": pair, "routers": ",".join(addresses), "max_num_seqs": seqs}
        await stack.enter_async_context(mock_worker(PrefillConfig, common))
        await stack.enter_async_context(mock_worker(DecodeConfig, common | {"step": 0.02}))
        for router in routers:
            await until(lambda r=router: [w.report.routers for w in r.roster.workers() if w.report] == [2, 2])
        clients = [await stack.enter_async_context(AsyncClient(address)) for address in addresses]
        yield routers, clients
        for router in routers:
            router.drain()
        await asyncio.gather(*serving)


def ask(client, tokens):
    return client.generate([5, 6, 7], sampling=SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))


async def test_a_router_that_queues_gets_credits_that_the_other_does_not_use_and_both_go_on(tiny_pair):
    async with two_routers(tiny_pair, seqs=8) as (routers, clients):
        decode = next(iter(routers[0].roster.decode[DEFAULT_TIER]))
        assert decode.report.credits == 4
        busy = [asyncio.create_task(ask(clients[0], 150)) for _ in range(8)]
        await until(lambda: decode.in_flight >= 7)
        late = await ask(clients[1], 5)
        assert late.usage.completion_tokens == 5
        answers = await asyncio.gather(*busy)
        assert [answer.usage.completion_tokens for answer in answers] == [150] * 8
        for router in routers:
            await until(lambda r=router: r.dispatcher.num_jobs == 0)
            assert all(worker.in_flight == 0 for worker in router.roster.workers())


async def test_a_router_that_drains_sends_its_clients_to_the_other_behind_the_same_name(tiny_pair):
    async with AsyncExitStack() as exits:
        flags = ("--http=0", "--grace-period=30")
        (leaving, other), _ = await exits.enter_async_context(two_routers(tiny_pair, 8, *flags))
        grpc = await exits.enter_async_context(TcpProxy(leaving.address))
        http = await exits.enter_async_context(TcpProxy(leaving.http_address))
        client = await exits.enter_async_context(AsyncClient(grpc.address))
        url = f"http://{http.address}/v1"
        completions = (
            await exits.enter_async_context(openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=1))
        ).completions

        async def complete():
            answer = await completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=3, extra_body=IGNORE_EOS)
            assert answer.usage.completion_tokens == 3

        long = asyncio.create_task(ask(client, 150))
        await until(lambda: leaving.dispatcher.num_jobs == 1)
        await complete()
        grpc.forward_to(other.address)
        http.forward_to(other.http_address)
        leaving.drain()
        for _ in range(10):
            assert (await ask(client, 3)).usage.completion_tokens == 3
            await complete()
        await until(lambda: leaving._requests.draining)  # from now on it refuses clients that are still connected
        assert (await ask(client, 3)).usage.completion_tokens == 3
        await complete()
        assert not long.done()
        assert (await long).usage.completion_tokens == 150


async def test_a_client_that_reaches_a_draining_router_again_connects_once_more(tiny_pair):
    async with AsyncExitStack() as exits:
        (leaving, other), _ = await exits.enter_async_context(two_routers(tiny_pair, 8, "--grace-period=30"))
        proxy = await exits.enter_async_context(TcpProxy(leaving.address))
        client = await exits.enter_async_context(AsyncClient(proxy.address))
        long = asyncio.create_task(ask(client, 300))
        await until(lambda: leaving.dispatcher.num_jobs == 1)
        leaving.drain()
        await until(lambda: leaving._requests.draining)
        with pytest.raises(ShuttingDown):
            await ask(client, 3)
        proxy.forward_to(other.address)
        served = None
        while served is None and not long.done():
            with suppress(ShuttingDown):
                served = await ask(client, 3)
        assert served is not None
        for _ in range(5):
            await ask(client, 3)
        assert (await long).usage.completion_tokens == 300

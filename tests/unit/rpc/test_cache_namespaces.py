"""Tests that each request reaches workers with the cache namespace of its own API key."""

import asyncio
from contextlib import AsyncExitStack

from overfill.api import key_file as keys
from overfill.api.keys import KeyRing
from overfill.client import AsyncClient
from overfill.rpc.access import RPCS, AccessPolicy, caller
from overfill.rpc.server import RpcServer
from overfill.v1 import inference_pb2, inference_pb2_grpc


class NamespaceService(inference_pb2_grpc.InferenceServicer):
    """Waits until all RPCs have arrived, then answers each with its namespace."""

    def __init__(self, calls):
        self._barrier = asyncio.Barrier(calls)

    async def Detokenize(self, request, context):
        await self._barrier.wait()
        return inference_pb2.DetokenizeResponse(text=caller.get().cache_namespace if caller.get() else "")


async def namespaces(shown, access):
    server = RpcServer(None, access=access)
    name = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    server.add(inference_pb2_grpc.add_InferenceServicer_to_server, NamespaceService(len(shown)), name)
    address = await server.start("127.0.0.1:0")
    try:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(AsyncClient(address, api_key=key)) for key in shown]
            return await asyncio.gather(*(client.detokenize([1]) for client in clients))
    finally:
        await server.stop(0)


async def test_every_rpc_has_the_namespace_of_its_own_key(tmp_path):
    file = tmp_path / "keys.json"
    a, b = keys.create(file, "a"), keys.create(file, "b")
    of_a, of_b = (key.cache_namespace for key in keys.load(file))
    assert of_a
    assert of_b
    assert of_a != of_b
    assert await namespaces([a, b, a], AccessPolicy(RPCS, KeyRing(file).find)) == [of_a, of_b, of_a]


async def test_a_new_key_of_the_same_name_is_another_tenant(tmp_path):
    file = tmp_path / "keys.json"
    keys.create(file, "a")
    (before,) = keys.load(file)
    keys.revoke(file, "a")
    keys.create(file, "a")
    (after,) = keys.load(file)
    assert before.name == after.name
    assert before.cache_namespace != after.cache_namespace
    assert before.id != after.id


async def test_without_keys_there_is_one_tenant():
    assert await namespaces([None, None], None) == ["", ""]

"""Starts a worker without a router, and pulls the KV of prompts from a prefill worker, as decode workers do."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from listening_registry import ListeningRegistry
from stacks import ForkedChild

from overfill.kv.cache import KvCache
from overfill.kv.peers import PrefillPeer
from overfill.kv.puller import LocalPuller
from overfill.kv.receiver import PromptPull, PullStats
from overfill.kv.spec import KvSpec
from overfill.request.params import SamplingParams
from overfill.stack.child import stop
from overfill.stack.process_runner import child_environment
from overfill.v1 import decode_pb2, kv_pb2, prefill_pb2, registry_pb2

BLOCK = 16


def prefill_process(*arguments: str) -> AbstractContextManager[registry_pb2.Hello]:
    """As ``worker_process``, of a prefill worker."""
    return worker_process("prefill", *arguments)


@contextmanager
def worker_process(kind: str, *arguments: str) -> Iterator[registry_pb2.Hello]:
    """Runs a worker, and yields its Hello. It keeps serving although its router has stopped.

    Args:
        kind: prefill, decode or colocated.
    """
    flags = ("--dtype=float32", "--grace-period=1", *arguments)

    async def start() -> tuple[ForkedChild, registry_pb2.Hello]:
        registry = ListeningRegistry()
        command = [sys.executable, "-m", f"services.{kind}.main", f"--routers={await registry.start()}", *flags]
        worker = ForkedChild(kind, command, child_environment(os.environ, 1), lambda name, line: None)
        hello = await registry.next_worker(60)
        await registry.stop()
        return worker, hello

    worker, hello = asyncio.run(start())
    try:
        yield hello
    finally:
        stop([worker], 5)


def opened(hello: registry_pb2.Hello, data_address: str = "", streams: int = 2, shm: bool = True) -> PrefillPeer:
    """Opens connections to a worker. ``data_address`` is where its KV is pulled, if not at its own address."""
    data = kv_pb2.DataAddress(address=data_address or hello.address, num_kv_heads=hello.kv.num_kv_heads)
    target = decode_pb2.AssignPrefill(
        worker_id=hello.worker_id, incarnation=hello.incarnation, address=hello.address, data_addresses=[data]
    )
    return PrefillPeer(target, streams, None, shm)


async def pull(
    peer: PrefillPeer,
    spec: KvSpec,
    layer_map: Sequence[int],
    prompt: Sequence[int],
    executor: Executor,
    *,
    namespace: str = "",
    timeout: float = 20.0,
    on_token: Callable[[Any], None] = lambda token: None,
    fields: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> tuple[KvCache, PullStats]:
    """Pulls a prompt's KV into a new cache, and returns both the cache and the transfer's statistics.

    Args:
        timeout: seconds after which the transfer fails.
        fields: further fields of ``StartPrefill``.
        options: further arguments of ``PromptPull``.
    """
    blocks = list(range(-(-len(prompt) // BLOCK)))
    cache = KvCache(spec, len(blocks), BLOCK, torch.device("cpu"))
    request = prefill_pb2.StartPrefill(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0).to_proto(),
        sample_first_token=True,
        cache_namespace=namespace,
        **fields,
    )
    puller = LocalPuller(cache, executor, peer.data, peer.link)
    handoff = PromptPull(peer, request, spec, layer_map, puller, blocks, 2**32, **options)
    await handoff.run(timeout, on_token)
    return cache, handoff.stats

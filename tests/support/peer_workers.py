"""Prefill workers that borrow KV from each other, driven without a router."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import Executor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from kv_pulls import opened, pull

from overfill.kv.spec import KvSpec
from overfill.model.manifest import Pair
from overfill.rpc.channel import open_channel
from overfill.v1 import admin_pb2, admin_pb2_grpc, common_pb2, kv_pb2, registry_pb2

_numbers = itertools.count()

LENGTH = 150
"""Tokens of a prompt: nine blocks of 16, and six tokens."""


def prompt_of(seed: int, length: int = LENGTH) -> list[int]:
    return [20 + (seed * 7919 + 31 * i) % 470 for i in range(length)]


def holder_of(hello: registry_pb2.Hello, tokens: int = LENGTH, **changes: Any) -> kv_pb2.KvHolder:
    """Returns what a router says of a worker that has ``tokens`` tokens of a prompt.

    Each call names the worker differently, so that a borrower has measured nothing and asks. Otherwise it may find that
    computing with a tiny model is sooner.
    """
    name = f"{hello.worker_id}-{next(_numbers)}"
    known = {"worker_id": name, "incarnation": hello.incarnation, "address": hello.address}
    return kv_pb2.KvHolder(**known | {"tokens": tokens} | changes)


async def blocks_used(hello: registry_pb2.Hello) -> int:
    """Number of KV blocks in use, in both stages of a worker."""
    channel = open_channel(hello.address)
    status = await admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=5)  # type: ignore[misc]
    await channel.close(None)
    return status.process.load.kv_blocks_used + status.process.prefill_load.kv_blocks_used


async def until_free(hello: registry_pb2.Hello) -> None:
    """Waits until no block of the worker is in use. Raises TimeoutError after 10 s."""
    async with asyncio.timeout(10):
        while await blocks_used(hello):
            await asyncio.sleep(0.02)


class PrefillClient:
    """A prefill worker, and what a decode worker does with it."""

    def __init__(self, hello: registry_pb2.Hello, pair: Path, executor: Executor) -> None:
        self.hello, self.executor = hello, executor
        self.spec, self.layer_map = KvSpec.from_proto(hello.kv), Pair.load(pair).layer_map
        self.peer = opened(hello)
        self.peer.codecs = frozenset({common_pb2.KV_CODEC_RAW, common_pb2.KV_CODEC_INT8})

    async def prefill(
        self,
        prompt: list[int],
        holder: kv_pb2.KvHolder | None = None,
        namespace: str = "",
        timeout: float = 20.0,
        codec: common_pb2.KvCodec = common_pb2.KV_CODEC_RAW,
    ) -> SimpleNamespace:
        """Has the worker prefill ``prompt``.

        Returns:
            ``kv``, [keys or values, layers, tokens, heads, head_dim]; the first ``token``; the numbers of tokens that
            were not computed (``cached``) and came from ``holder`` (``peer``).
        """
        tokens: list[int] = []
        cache, stats = await pull(
            *(self.peer, self.spec, self.layer_map, prompt, self.executor),
            namespace=namespace,
            timeout=timeout,
            on_token=lambda token: tokens.extend(token.ids),
            fields={"codec": codec, "holder": holder},
        )
        kv = torch.stack([cache.k.flatten(1, 2)[:, : len(prompt)], cache.v.flatten(1, 2)[:, : len(prompt)]])
        return SimpleNamespace(kv=kv, token=tokens[0], cached=stats.cached_tokens, peer=stats.peer_tokens)

    async def blocks_used(self) -> int:
        return await blocks_used(self.hello)

    async def until_free(self) -> None:
        await until_free(self.hello)

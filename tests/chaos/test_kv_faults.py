"""Damaged, repeated, lost and reordered KV chunks between a real prefill worker and a real receiver.

Whatever arrives, the KV in the blocks is that of an undisturbed transfer, or the transfer fails.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from overfill.cli.processes import Child, stop
from overfill.cli.stack import child_environment
from overfill.errors import InternalError, TransferFailed
from overfill.kv.cache import KvCache
from overfill.kv.receiver import PrefillPeer, PromptPull, PromptRequest, PullStats
from overfill.kv.spec import KvSpec
from overfill.pair.manifest import Pair
from overfill.params import SamplingParams
from overfill.testing.message_proxy import (
    Corrupt,
    Drop,
    Duplicate,
    Fault,
    Filter,
    MessageProxy,
    Reorder,
    Rule,
    Strike,
    Truncate,
)
from overfill.testing.registry import ListeningRegistry
from overfill.v1 import decode_pb2

BLOCK = 16


@dataclass(frozen=True, slots=True)
class OneOf:
    """Another fault for each call."""

    faults: Sequence[Fault]

    def begin(self, rng: random.Random, strike: Strike) -> Filter:
        return rng.choice(self.faults).begin(rng, strike)


@dataclass(slots=True)
class Received:
    cache: KvCache
    stats: PullStats


class Handoffs:
    """Pulls prompts from a prefill worker, past a proxy and straight."""

    def __init__(
        self, pair: Pair, spec: KvSpec, straight: PrefillPeer, proxied: PrefillPeer, rules: list[Rule]
    ) -> None:
        self.rules = rules
        self._pair = pair
        self._spec = spec
        self._straight = straight
        self._proxied = proxied
        self._executor = ThreadPoolExecutor(2)

    async def clean(self, seed: int) -> Received:
        return await self._pull(self._straight, seed)

    async def faulty(self, seed: int) -> Received:
        return await self._pull(self._proxied, seed)

    async def _pull(self, peer: PrefillPeer, seed: int) -> Received:
        rng = random.Random(seed)
        prompt = [rng.randrange(2, 500) for _ in range(rng.randrange(20, 120))]
        blocks = list(range(-(-len(prompt) // BLOCK)))
        cache = KvCache(self._spec, len(blocks), BLOCK, torch.device("cpu"))
        request = PromptRequest(f"r{seed}", 0, prompt, SamplingParams(temperature=0).to_proto(), 0, True)
        pull = PromptPull(peer, request, self._spec, self._pair.layer_map, cache, blocks, self._executor)
        await pull.run(20.0, lambda token: None)
        return Received(cache, pull.stats)


@pytest.fixture
async def handoffs(tiny_pair: Path) -> AsyncIterator[Handoffs]:
    registry = ListeningRegistry()
    router = await registry.start()
    arguments = [
        f"--pair={tiny_pair}",
        f"--routers={router}",
        "--dtype=float32",
        "--kv-memory=4MiB",
        "--grace-period=1",
    ]
    command = [sys.executable, "-m", "services.prefill.main", *arguments]
    worker = Child("prefill", command, child_environment(os.environ, 1), lambda name, line: None)
    try:
        hello = await registry.next_worker(60)
        async with MessageProxy(hello.data_address, seed=1) as proxy:
            peers = []
            for data_address in (hello.data_address, proxy.address):
                target = decode_pb2.AssignPrefill(
                    worker_id=hello.worker_id,
                    incarnation=hello.incarnation,
                    address=hello.address,
                    data_address=data_address,
                )
                peers.append(PrefillPeer(target, 2, None))
            yield Handoffs(Pair.load(tiny_pair), KvSpec.from_proto(hello.kv), *peers, proxy.rules)
            for peer in peers:
                await peer.close()
    finally:
        stop([worker], 5)
        await registry.stop()


def same(one: Received, other: Received) -> bool:
    return torch.equal(one.cache.k, other.cache.k) and torch.equal(one.cache.v, other.cache.v)


@pytest.mark.parametrize("faults", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
async def test_every_wrong_chunk_is_noticed_and_no_wrong_kv_stays(handoffs: Handoffs, faults: int) -> None:
    rule = Rule(OneOf((Corrupt(3), Truncate(3), Duplicate(3), Drop(3))), "Prefill/PullKv", share=0.5)
    handoffs.rules.append(rule)
    seed = failed = 0
    while rule.hits < faults:
        seed += 1
        before = rule.hits
        try:
            received = await handoffs.faulty(seed)
        except (TransferFailed, InternalError):  # struck again at every repeat
            failed += 1
            assert rule.hits > before
        else:
            assert received.stats.broken_streams == rule.hits - before
            assert same(received, await handoffs.clean(seed))
    assert failed < seed / 10


@pytest.mark.parametrize("transfers", [30, pytest.param(1_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
async def test_chunks_in_any_order_are_right(handoffs: Handoffs, transfers: int) -> None:
    handoffs.rules.append(Rule(Reorder(window=3), "Prefill/PullKv"))
    for seed in range(transfers):
        received = await handoffs.faulty(seed)
        assert received.stats.broken_streams == 0
        assert same(received, await handoffs.clean(seed))
    assert handoffs.rules[0].hits > transfers / 2

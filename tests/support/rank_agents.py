"""Ranks without a model: agents over arrays, in threads of the test or in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from overfill.engine.vllm.ranks.agent import MakeProcessor, RankAgent
from overfill.engine.vllm.ranks.link import RankLinks
from overfill.engine.vllm.ranks.messages import RankHello
from overfill.engine.vllm.ranks.worker import WorkerRanks
from overfill.kv.chunks import Chunk, digest, num_undamaged
from overfill.kv.spec import KvSpec
from overfill.kv.store import LayerTargets
from overfill.v1 import common_pb2

BLOCK = 4
NUM_BLOCKS = 32
NOBODY = 1 << 30
"""Id of no process: a rank that is a part of the test must not be killed when the machine makes it silent."""

Heads = tuple[int, int]


class ArrayStore:
    """A ``KvStore`` of one rank's heads.

    Attributes:
        array: [layers, 2, blocks, tokens, heads, head_dim].
        go_on: reads and writes wait for it.
        busy: set while one is under way.
    """

    block_size = BLOCK
    codec = common_pb2.KV_CODEC_RAW

    def __init__(self, spec: KvSpec, heads: Heads) -> None:
        self.first, end = heads
        shape = (spec.num_layers, 2, NUM_BLOCKS, BLOCK, end - self.first, spec.head_dim)
        self.array = np.zeros(shape, dtype=np.float32)
        self.go_on, self.busy = threading.Event(), threading.Event()
        self.go_on.set()

    def get(self, layer: int, blocks: Sequence[int], tokens: tuple[int, int], heads: Heads) -> np.ndarray[Any, Any]:
        """KV of a layer, [2, tokens, heads, head_dim]."""
        return self.array[layer][self._index(blocks, tokens, heads)]

    def put(self, layer: int, blocks: Sequence[int], tokens: tuple[int, int], heads: Heads, values: Any) -> None:
        self.array[layer][self._index(blocks, tokens, heads)] = values

    def _index(self, blocks: Sequence[int], tokens: tuple[int, int], heads: Heads) -> tuple[Any, ...]:
        positions = np.arange(*tokens)
        table = np.asarray(blocks)[positions // BLOCK]
        return slice(None), table, positions % BLOCK, slice(heads[0] - self.first, heads[1] - self.first)

    def read(self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, Any]) -> None:
        self._wait()
        for chunk in chunks:
            box = chunk.range
            layers = [self.get(layer, block_table, box.tokens, box.heads) for layer in box.layers]
            memoryview(chunk.payload)[:] = np.stack(layers, axis=1).tobytes()
            if chunk.header:
                chunk.checksum = digest(chunk.header, chunk.payload)

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        self._wait()
        undamaged = num_undamaged(chunks)
        for chunk in chunks[:undamaged]:
            box = chunk.range
            shape = (2, box.num_layers, box.num_tokens, box.num_heads, self.array.shape[-1])
            values = np.frombuffer(chunk.payload, dtype=np.float32).reshape(shape)
            for index, layer in enumerate(box.layers):
                for target in targets[layer]:
                    self.put(target, block_table, box.tokens, box.heads, values[:, index])
        return undamaged

    def _wait(self) -> None:
        self.busy.set()
        assert self.go_on.wait(60)
        self.busy.clear()


def hello(rank: int, spec: KvSpec, heads: Heads, pid: int = NOBODY) -> RankHello:
    return RankHello(rank, pid, heads, spec.num_layers, BLOCK, spec.dtype)


class Ranks:
    """The worker's side and all of its ranks, in threads of this process.

    Attributes:
        kv: what the worker's services use.
        lost: what ``on_lost`` was called with.
    """

    def __init__(self, spec: KvSpec, shares: Sequence[Heads], make_processor: MakeProcessor) -> None:
        self.lost: list[tuple[int, str]] = []
        self.links = RankLinks(len(shares), lambda rank, reason: self.lost.append((rank, reason)))
        self.stores = [ArrayStore(spec, heads) for heads in shares]
        self.executor = ThreadPoolExecutor(4)
        self.orphans: list[int] = []
        self.agents = [
            RankAgent(
                self.links.config,
                hello(rank, spec, heads),
                store,
                self.executor,
                make_processor,
                lambda rank=rank: self.orphans.append(rank),
            )
            for rank, (heads, store) in enumerate(zip(shares, self.stores, strict=True))
        ]
        self.kv = WorkerRanks(self.links, self.links.wait(20), spec)


@contextmanager
def running_ranks(
    spec: KvSpec, shares: Sequence[Heads], make_processor: MakeProcessor = lambda *_: None
) -> Iterator[Ranks]:
    """Runs ranks in threads. The test calls ``kv.stop`` on its event loop before the end."""
    ranks = Ranks(spec, shares, make_processor)
    try:
        yield ranks
    finally:
        for store in ranks.stores:
            store.go_on.set()
        ranks.links.close()
        for agent in ranks.agents:
            agent.join()
        ranks.executor.shutdown()


def rank_process(links: RankLinks, rank: int, spec: KvSpec, heads: Heads) -> subprocess.Popen[bytes]:
    """Starts a rank in a process of its own."""
    arguments = [rank, spec.num_layers, spec.num_kv_heads, spec.head_dim, *heads]
    command = [sys.executable, __file__, *links.config.values(), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})


def _main(link: str, token: str, *numbers: str) -> None:
    from overfill.kv.spec import RopeSpec

    rank, layers, num_heads, head_dim, first, end = map(int, numbers)
    spec = KvSpec(layers, num_heads, head_dim, "float32", RopeSpec())
    store = ArrayStore(spec, (first, end))
    store.array[...] = rank + 1
    config = {"link": link, "link_token": token}
    RankAgent(config, hello(rank, spec, (first, end), os.getpid()), store, ThreadPoolExecutor(2), lambda *_: None)
    signal.pause()  # as a model that waits for its next step


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""The KV of an engine with several ranks as one ``KvStore``, and processors in ranks, for drivers of conformance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import decode_conformance
import numpy as np
import prefill_conformance
from numpy.typing import NDArray

from overfill.engine.vllm import sampler
from overfill.engine.vllm.hooks import hub
from overfill.engine.vllm.ranks.shares import head_share
from overfill.kv.chunks import Chunk, digest, num_undamaged
from overfill.kv.ranges import KvRange
from overfill.kv.store import DeviceEvent, LayerTargets
from overfill.request.params import SamplingParams
from overfill.v1 import common_pb2


class RankStore:
    """Reads and writes all heads by calls in the ranks, of float32 KV."""

    codec = common_pb2.KV_CODEC_RAW

    def __init__(self, executor: Any, block_size: int, num_kv_heads: int, head_dim: int) -> None:
        self.block_size = block_size
        self._executor = executor
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        ranges = [chunk.range for chunk in chunks]
        answers = self._executor.collective_rpc(
            read_share, args=(self._num_kv_heads, self._head_dim, list(block_table), ranges)
        )
        for heads, payloads in answers:
            for chunk, payload in zip(chunks, payloads, strict=True):
                self._array(chunk)[..., slice(*heads), :] = payload
        for chunk in chunks:
            if chunk.header:
                chunk.checksum = digest(chunk.header, chunk.payload)

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        undamaged = num_undamaged(chunks)
        whole = [(chunk.range, self._array(chunk)) for chunk in chunks[:undamaged]]
        self._executor.collective_rpc(write_share, args=(self._num_kv_heads, list(block_table), targets, whole))
        return undamaged

    def _array(self, chunk: Chunk) -> NDArray[np.float32]:
        return as_array(chunk.payload, chunk.range, self._head_dim)


def as_array(payload: Any, kv_range: KvRange, head_dim: int) -> NDArray[np.float32]:
    shape = (2, kv_range.num_layers, kv_range.num_tokens, kv_range.num_heads, head_dim)
    return np.frombuffer(payload, np.float32).reshape(shape)


def read_share(
    worker: Any, num_kv_heads: int, head_dim: int, block_table: list[int], ranges: list[KvRange]
) -> tuple[tuple[int, int], list[NDArray[np.float32]]]:
    """Called in a rank."""
    heads = head_share(num_kv_heads, worker.rank, worker.parallel_config.tensor_parallel_size)
    found = []
    for kv_range in ranges:
        own = kv_range._replace(head_start=heads[0], head_end=heads[1])
        payload = bytearray(4 * own.num_vectors * head_dim)
        assert hub.store is not None
        hub.store.read(block_table, [Chunk(own, payload)], {})
        found.append(as_array(payload, own, head_dim))
    return heads, found


def write_share(
    worker: Any,
    num_kv_heads: int,
    block_table: list[int],
    targets: LayerTargets,
    whole: list[tuple[KvRange, NDArray[np.float32]]],
) -> None:
    """Called in a rank."""
    start, end = head_share(num_kv_heads, worker.rank, worker.parallel_config.tensor_parallel_size)
    chunks = [
        Chunk(kv_range._replace(head_start=start, head_end=end), kv[..., start:end, :].tobytes())
        for kv_range, kv in whole
    ]
    assert hub.store is not None
    assert hub.store.write(block_table, targets, chunks) == len(chunks)


def break_processor(worker: Any, key: str, part: str) -> None:
    """As ``break_sampling``. Called in a rank."""
    decode_conformance.break_sampling(_agent().processor(key), part)


def add_unwilling_processor(worker: Any, key: str, params: SamplingParams) -> None:
    """Called in a rank."""
    _agent()._processors[key] = prefill_conformance.Unwilling(params, [], None)


def draw_other_noise(worker: Any, rank: int) -> None:
    """Lets one rank draw with other seeds. Called in a rank."""
    if worker.rank == rank:
        choose = sampler.choose
        sampler.choose = lambda logits, params, positions, indices: choose(
            logits, params, [position + 1 for position in positions], indices
        )


def _agent() -> Any:
    runner: Any = hub.runner
    return runner._agent

"""KV of blocks that ``answer_start`` cuts: tokens of a shared prompt behind its last full block.

The prefix cache holds full blocks only, and a sequence writes its own tokens behind the shared ones. So these few
tokens are kept in host memory, and copied into the block of each later sequence.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from overfill.kv.chunks import Chunk
from overfill.kv.keys import TOKEN_BYTES, PromptBlocks
from overfill.kv.ranges import KvRange
from overfill.kv.shielded import shielded
from overfill.kv.spec import DTYPE_BYTES, SCALE_BYTES, KvSpec
from overfill.kv.store import KvStore, LayerTargets
from overfill.v1 import common_pb2

MAX_CUT_BYTES = 64 << 20
"""Host memory for the KV of cut blocks and their keys, per decode worker."""

_OBJECT_BYTES = 64
"""About what Python takes for a block's bytes besides its tokens, its place in the tuple included."""


class SharedKey(NamedTuple):
    """What a shared prompt is known by: its tokens and cache namespace, so that keys of different prompts differ.

    Attributes:
        blocks: tokens of each full block, as ``PromptBlocks.tokens``.
        rest: tokens behind the last full block.
    """

    cache_namespace: str
    blocks: tuple[bytes, ...]
    rest: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of memory, about. The tokens of a long prompt take more than the KV of its cut block."""
        return len(self.blocks) * (len(self.blocks[0]) + _OBJECT_BYTES)

    @property
    def num_in_blocks(self) -> int:
        """Number of tokens in full blocks."""
        return len(self.blocks) * len(self.blocks[0]) // TOKEN_BYTES

    def num_common(self, other: SharedKey) -> int:
        """Returns the number of leading blocks that both prompts have, if they may share any."""
        if self.cache_namespace != other.cache_namespace:
            return 0
        pairs = enumerate(zip(self.blocks, other.blocks, strict=False))
        return next((index for index, (a, b) in pairs if a != b), min(len(self.blocks), len(other.blocks)))

    def is_of(self, prompt: Sequence[int], blocks: Sequence[bytes]) -> bool:
        """Returns whether the shared prompt is the beginning of ``prompt``, which has the full blocks ``blocks``."""
        start = self.num_in_blocks
        rest = prompt[start : start + len(self.rest)]
        return self.blocks == tuple(blocks[: len(self.blocks)]) and self.rest == tuple(rest)


def shared_key(blocks: PromptBlocks, prompt: Sequence[int], num_shared: int) -> SharedKey | None:
    """Returns the key of the first ``num_shared`` tokens of ``prompt``, which have the full blocks ``blocks``.

    Returns None if there is no full block, or if the prefix cache is off.
    """
    if not blocks.tokens:
        return None
    key = SharedKey(blocks.cache_namespace, tuple(blocks.tokens), ())
    return key._replace(rest=tuple(prompt[key.num_in_blocks : num_shared]))


class CutBlocks:
    """The KV of cut blocks, in host memory. When it exceeds ``max_bytes``, the least recently used is evicted.

    Args:
        store: the decoder's KV cache.
        kv: geometry of the full model's KV.
        num_layers: layers of the decoder.
        executor: threads that copy.
        max_bytes: limit on all copies with their keys.
    """

    def __init__(
        self, store: KvStore, kv: KvSpec, num_layers: int, executor: Executor, max_bytes: int = MAX_CUT_BYTES
    ) -> None:
        self._store = store
        self._kv = kv
        self._num_layers = num_layers
        self._executor = executor
        self._max_bytes = max_bytes
        self._targets = LayerTargets({layer: (layer,) for layer in range(num_layers)})
        self._kept: OrderedDict[SharedKey, Chunk] = OrderedDict()
        self._num_bytes = 0

    async def keep(self, key: SharedKey, blocks: Sequence[int]) -> None:
        """Keeps a copy of the tokens behind the last full block of a prompt that is complete in ``blocks``."""
        if not key.rest or key in self._kept:
            return
        chunk = self._new_chunk(key)
        await self._on_thread(self._store.read, blocks, [chunk], {})
        if key not in self._kept:
            self._kept[key] = chunk
            self._num_bytes += key.size + chunk.size
        while self._num_bytes > self._max_bytes:
            oldest, chunk = self._kept.popitem(last=False)
            self._num_bytes -= oldest.size + chunk.size

    async def restore(self, key: SharedKey, blocks: Sequence[int]) -> bool:
        """Writes the tokens behind the last full block into ``blocks``. Returns False if they are not kept."""
        if not key.rest:
            return True
        chunk = self._kept.get(key)
        if chunk is None:
            return False
        self._kept.move_to_end(key)
        await self._on_thread(self._store.write, blocks, self._targets, [chunk])
        return True

    def forget(self, key: SharedKey) -> None:
        """Drops the copies for prompts that begin as this one does, as ``PrefixCache.forget`` drops their blocks."""
        for kept in [kept for kept in self._kept if kept.num_common(key)]:
            self._num_bytes -= kept.size + self._kept.pop(kept).size

    async def _on_thread(self, copy: Callable[..., object], *arguments: object) -> None:
        """Copies to the end, also if the task is cancelled: the blocks may have another owner afterwards."""
        await shielded(asyncio.get_running_loop().run_in_executor(self._executor, copy, *arguments))

    def _new_chunk(self, key: SharedKey) -> Chunk:
        kv, start = self._kv, key.num_in_blocks
        cut = KvRange(0, self._num_layers, start, start + len(key.rest), 0, kv.num_kv_heads)
        if self._store.codec == common_pb2.KV_CODEC_RAW:
            return Chunk(cut, bytearray(cut.num_vectors * kv.head_dim * DTYPE_BYTES[kv.dtype]))
        codes, scales = (bytearray(cut.num_vectors * width) for width in (kv.head_dim, SCALE_BYTES))
        return Chunk(cut, codes, scales=scales)

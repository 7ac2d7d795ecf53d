"""Decode steps as CUDA graphs: a step is launched as a whole instead of kernel by kernel.

A small model's decode step on a GPU is hundreds of launches of a few microseconds' work each, so the host is what it
waits for. A graph is recorded when a step of its size first comes, for a *bucket*: so many sequences, so much context.
Later steps copy their inputs into the recording's and replay it. Sequences that a bucket has too many repeat the
batch's first one: they write the same keys and values to the same place, and nobody reads their logits. Context that
it has too much is masked, as in any padded batch.

Everything else runs as it is: prompts, steps with hooks, batches beyond the largest bucket. If recording fails, all do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from overfill.kv.cache import KvCache
from overfill.model.batch import ForwardBatch
from overfill.model.config import Quantization
from overfill.model.transformer import LayerHook, Transformer

log = logging.getLogger(__name__)

SEQUENCES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""Bucket sizes. Close together where most batches are: a padded sequence costs as much as a real one."""
SHORTEST_CONTEXT = 256  # tokens; then half as much again and twice as much, in turn
GATHERED_BYTES = 1 << 30
"""Most that a recording's gathered keys and values of a layer take; larger steps are not bound by launches."""

Step = Callable[[], Tensor]


class Recorder(Protocol):
    """Makes a step replayable. All replays return the same tensor, filled anew."""

    def record(self, step: Step) -> Step: ...


class CudaRecorder:
    """Records on one device; recordings share their memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, step: Step) -> Step:
        # A recording waits for the thread's current device, which may be another one.
        with torch.cuda.device(self._device):
            return self._record(step)

    def _record(self, step: Step) -> Step:
        # Libraries set themselves up in the first run, which may not be recorded; on a stream of its own, as the
        # recording is.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads move KV meanwhile: only this one is held to what can be recorded.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class GraphedTransformer:
    """``model``, with decode steps on ``cache`` recorded and replayed.

    The logits that ``forward`` returns for a replayed step are overwritten by the next one.
    """

    def __init__(self, model: Transformer, cache: KvCache, recorder: Recorder) -> None:
        self.config = model.config
        self.max_positions = model.max_positions
        self._model = model
        self._cache = cache
        self._recorder: Recorder | None = recorder
        self._recordings: dict[tuple[int, int], _Recording] = {}
        capacity = cache.num_blocks * cache.block_size
        self._contexts = tuple(_contexts(min(model.max_positions, capacity)))

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def bytes_read(self) -> int:
        return self._model.bytes_read

    @property
    def quantize(self) -> Quantization:
        return self._model.quantize

    def forward(
        self,
        batch: ForwardBatch,
        cache: KvCache,
        on_layer_start: LayerHook | None = None,
        on_kv_written: LayerHook | None = None,
    ) -> Tensor:
        """As ``Transformer.forward``."""
        hooked = on_layer_start is not None or on_kv_written is not None
        bucket = None if hooked or cache is not self._cache else self._bucket(batch)
        if bucket is not None and (recording := self._recording(bucket, batch)) is not None:
            return recording.replay(batch)
        return self._model.forward(batch, cache, on_layer_start, on_kv_written)

    def _bucket(self, batch: ForwardBatch) -> tuple[int, int] | None:
        """The smallest one that holds ``batch``."""
        count, longest = len(batch.query_lens), max(batch.context_lens, default=0)
        if count == 0 or not batch.is_decode or len(batch.logits_indices) != count:
            return None
        sequences = next((n for n in SEQUENCES if n >= count), None)
        context = next((n for n in self._contexts if n >= longest), None)
        if sequences is None or context is None:
            return None
        gathered = sequences * context * self._cache.gathered_layer_bytes
        return (sequences, context) if gathered <= GATHERED_BYTES else None

    def _recording(self, bucket: tuple[int, int], batch: ForwardBatch) -> _Recording | None:
        found = self._recordings.get(bucket)
        if found is None and self._recorder is not None:
            inputs = _inputs(*bucket, self._cache.block_size, self.device)
            _fill(inputs, batch)  # recording runs the step: it has to be one that may run
            try:
                replay = self._recorder.record(lambda: self._model.forward(inputs, self._cache))
            except RuntimeError as error:
                log.warning("decode steps run without CUDA graphs from now on: recording one failed: %s", error)
                self._recorder = None
                return None
            found = self._recordings[bucket] = _Recording(inputs, replay)
        return found


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs: ForwardBatch
    step: Step

    def replay(self, batch: ForwardBatch) -> Tensor:
        _fill(self.inputs, batch)
        return self.step()[: len(batch.query_lens)]


def _contexts(longest: int) -> Iterable[int]:
    size = SHORTEST_CONTEXT
    while size < longest:
        yield size
        if size * 3 // 2 < longest:
            yield size * 3 // 2
        size *= 2
    yield longest


def _inputs(sequences: int, context: int, block_size: int, device: torch.device) -> ForwardBatch:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return ForwardBatch(
        token_ids=zeros(sequences),
        positions=zeros(sequences),
        slots=zeros(sequences),
        query_lens=[1] * sequences,
        context_lens=[context] * sequences,  # attention is as wide as the longest
        block_tables=zeros(sequences, -(-context // block_size)),
        context_lens_device=zeros(sequences),
        logits_indices=torch.arange(sequences, device=device),
    )


def _fill(inputs: ForwardBatch, batch: ForwardBatch) -> None:
    """Copies ``batch`` in; the sequences that are left repeat its first one. Does not wait for the device.

    Tables keep what was there behind the columns of ``batch``: positions beyond a context are never looked up.
    """
    count = len(batch.query_lens)
    width = min(inputs.block_tables.shape[1], batch.block_tables.shape[1])
    pairs = (
        (inputs.token_ids, batch.token_ids),
        (inputs.positions, batch.positions),
        (inputs.slots, batch.slots),
        (inputs.context_lens_device, batch.context_lens_device),
        (inputs.block_tables[:, :width], batch.tables(width)),
    )
    for into, given in pairs:
        into[:count].copy_(given)
        into[count:] = given[:1]

"""Turns scheduled sequences into one forward pass. The only place where token lists become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from overfill.kv.cache import KvCache
from overfill.model.batch import ForwardBatch
from overfill.model.processors import LogitProcessor, process
from overfill.model.sampling import SampledToken, broken, sample
from overfill.model.transformer import NO_HOOKS, GreedyModel, LayerHooks, Model
from overfill.request.params import SamplingParams

_KEPT_STEPS = 8
"""Steps for which an unused row is kept: replays and other steps take turns."""


@dataclass(frozen=True, slots=True)
class Work:
    """New tokens of one sequence: ``tokens`` at positions ``start..``; KV below ``start`` is in ``blocks``.

    ``blocks`` is the same list in all steps of a sequence, and only grows. When a block is replaced, the list is too.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wants_logits: bool

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the token after a work is chosen.

    Attributes:
        emitted: the answer so far, for ``processor``.
    """

    sampling: SamplingParams
    sample_index: int
    processor: LogitProcessor | None = None
    emitted: Sequence[int] = ()

    @property
    def most_likely(self) -> bool:
        """Whether nothing but the most likely token is asked for."""
        changed = self.processor is not None and self.processor.needed(len(self.emitted))
        return self.sampling.greedy and not changed and self.sampling.logprobs is None


def sample_next(
    logits: torch.Tensor, works: Sequence[Work], specs: Sequence[SamplingSpec]
) -> tuple[list[SampledToken], dict[int, Exception]]:
    """A token for every row of ``logits``, and errors of rows that cannot go on, whose tokens mean nothing."""
    if not specs:
        return [], {}
    refused = process(logits, [c.processor for c in specs], [c.emitted for c in specs])
    positions = [work.end for work in works if work.wants_logits]
    tokens, failed = sample(logits, [c.sampling for c in specs], positions, [c.sample_index for c in specs])
    return tokens, failed | refused  # a row that was refused may be broken because of it


class ModelRunner:
    """A model with the cache it reads and writes.

    Attributes:
        token_layer_bytes: of one token's keys and values in one layer.
    """

    def __init__(self, model: Model, cache: KvCache) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.device
        self.token_layer_bytes = cache.spec.token_layer_bytes
        self._tables = BlockTables()

    def run(self, works: Sequence[Work], hooks: LayerHooks = NO_HOOKS) -> torch.Tensor:
        """Logits [number of works that want them, vocab_size], float32; the last token's of each such work."""
        return self.model.forward(self._batch(works), self.cache, hooks)

    def next_tokens(
        self, works: Sequence[Work], specs: Sequence[SamplingSpec], hooks: LayerHooks = NO_HOOKS
    ) -> tuple[list[SampledToken], dict[int, Exception]]:
        """The token after each work that wants logits, and errors as ``sample_next`` gives them; raises as ``sample``.

        Args:
            specs: one for each of those works.
        """
        if specs and all(c.most_likely for c in specs) and isinstance(self.model, GreedyModel):
            tokens = self.model.most_likely(self._batch(works), self.cache, hooks).tolist()
            return [SampledToken(token) for token in tokens], broken(tokens)
        return sample_next(self.run(works, hooks), works, specs)

    def synchronize(self) -> None:
        """Returns when nothing launched before touches the cache any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clean_up(self, error: Exception) -> None:
        """After a step that failed with ``error``: nothing touches the cache, and its memory can be used again.

        Tensors of the step would live as long as the traceback that leads to them.
        """
        self.synchronize()
        error.__traceback__ = None
        if self.device.type == "cuda" and isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()

    def _batch(self, works: Sequence[Work]) -> ForwardBatch:
        size = self.cache.block_size
        counts = np.array([len(work.tokens) for work in works])
        starts = np.array([work.start for work in works])
        ends = starts + counts
        last = counts.cumsum() - 1  # row of each work's last token
        counts_of_blocks = -(-ends // size)
        rows = self._tables.rows([work.blocks for work in works], counts_of_blocks.tolist())
        owner = np.repeat(np.arange(len(works)), counts)
        positions = np.arange(len(owner)) + np.repeat(ends - 1 - last, counts)
        slots = self._tables.array[rows[owner], positions // size] * size + positions % size
        # A device is sent a copy of the rows in this step, cut to the longest.
        on_host = self.device.type == "cpu"
        tables = self._tables.array if on_host else self._tables.array[rows, : counts_of_blocks.max()]
        return ForwardBatch(
            token_ids=self._tensor(np.fromiter(chain.from_iterable(w.tokens for w in works), np.int64, len(owner))),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_lens=counts.tolist(),
            context_lens=ends.tolist(),
            block_tables=self._tensor(tables),
            context_lens_device=self._tensor(ends),
            logits_indices=self._tensor(last[np.array([work.wants_logits for work in works])]),
            table_rows=self._tensor(rows) if on_host else None,
        )

    def _tensor(self, values: NDArray[np.int64]) -> torch.Tensor:
        host = torch.from_numpy(values)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)


@dataclass(slots=True)
class _Row:
    """A sequence's row: its first ``filled`` entries are those of ``blocks``. ``step`` is the last that wanted it."""

    index: int
    blocks: Sequence[int]
    filled: int
    step: int


class BlockTables:
    """The block tables of all sequences, as rows of one array that are kept from step to step and extended.

    A row belongs to a list of blocks, the object itself, of which it holds a reference. The engine does not report the
    end of a sequence: rows that no step has used for 8 steps are reused.

    Attributes:
        array: [rows, width] int64. Entries behind a sequence's context mean nothing.
    """

    def __init__(self) -> None:
        self.array: NDArray[np.int64] = np.zeros((1, 1), np.int64)
        self._rows: dict[int, _Row] = {}  # by the identity of their lists
        self._free = [0]
        self._step = 0

    def rows(self, tables: Sequence[Sequence[int]], counts: Sequence[int]) -> NDArray[np.int64]:
        """Where in ``array`` the first ``counts[i]`` blocks of ``tables[i]`` are. [len(tables)]"""
        self._step += 1
        self._widen(max(counts, default=0))
        found = [self._row(blocks, count).index for blocks, count in zip(tables, counts, strict=True)]
        return np.array(found, np.int64)

    def _row(self, blocks: Sequence[int], count: int) -> _Row:
        row = self._rows.get(id(blocks))
        if row is None:
            row = self._rows[id(blocks)] = _Row(self._take(), blocks, 0, self._step)
        row.step = self._step
        if row.filled < count:
            self.array[row.index, row.filled : count] = blocks[row.filled : count]
            row.filled = count
        return row

    def _take(self) -> int:
        """A row for another list."""
        if not self._free:
            old = [key for key, row in self._rows.items() if row.step + _KEPT_STEPS < self._step]
            self._free = [self._rows.pop(key).index for key in old]
        if not self._free:
            self._free = list(range(len(self.array), 2 * len(self.array)))
            self.array = np.concatenate([self.array, np.zeros_like(self.array)])
        return self._free.pop()

    def _widen(self, width: int) -> None:
        if width > self.array.shape[1]:
            wider = np.zeros((len(self.array), max(width, 2 * self.array.shape[1])), np.int64)
            wider[:, : self.array.shape[1]] = self.array
            self.array = wider

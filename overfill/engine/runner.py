"""Turns scheduled sequences into one forward pass. Only this module turns token lists into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from overfill.engine.work import Sampled, Work, plain_greedy
from overfill.kv.cache import KvCache, copy_sequence
from overfill.model.batch import ForwardBatch, token_adapters
from overfill.model.processors import process
from overfill.model.sampling import non_finite_errors, sample
from overfill.model.scoring import max_scored_rows, score
from overfill.model.steps import NO_HOOKS, LayerHooks, SampledToken
from overfill.model.transformer import ForwardModel, GreedyModel
from overfill.model.upload import upload

_ROW_LIFETIME = 8
"""Steps for which an unused row is kept: while replays and decode steps alternate, each skips the other's rows."""


def sample_next(
    logits: torch.Tensor, works: Sequence[Work], sequences: Sequence[Sampled]
) -> tuple[list[SampledToken], dict[int, Exception]]:
    """Scores the works' known tokens, and samples a token for each work that wants logits.

    Args:
        logits: as ``ModelRunner.run`` returns them.

    Returns:
        The tokens; and row -> error for rows that failed, whose tokens are meaningless.
    """
    if any(work.num_scored for work in works):
        logits = _score(logits, works)
    if not sequences:
        return [], {}
    refused = process(logits, [s.processor for s in sequences], [s.emitted for s in sequences])
    positions = [work.end for work in works if work.wants_logits]
    tokens, failed = sample(logits, [s.sampling for s in sequences], positions, [s.sample_index for s in sequences])
    return tokens, failed | refused  # a refusal explains the row better than the broken logits that it causes


class ModelRunner:
    """A model and the KV cache that it reads and writes.

    Attributes:
        token_layer_bytes: bytes of one token's keys and values in one layer.
    """

    def __init__(self, model: ForwardModel, cache: KvCache) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.device
        self.token_layer_bytes = cache.spec.token_layer_bytes
        # The kernels of torch attend to one sequence at a time, unless all have a single token.
        self.mixes_lengths = isinstance(model, GreedyModel)
        self._tables = BlockTables()

    @property
    def max_scored(self) -> int:
        """Maximum number of tokens that one step scores."""
        return max_scored_rows(self.model.config.vocab_size)

    def run(self, works: Sequence[Work], hooks: LayerHooks = NO_HOOKS) -> torch.Tensor:
        """Runs one step.

        Returns:
            Logits, [N, vocab_size] float32, in the order of the works: of the tokens before each known token that a
            work scores, then of its last token if it wants them.
        """
        return self.model.forward(self._batch(works), self.cache, hooks)

    def next_tokens(
        self, works: Sequence[Work], sequences: Sequence[Sampled], hooks: LayerHooks = NO_HOOKS
    ) -> tuple[list[SampledToken], dict[int, Exception]]:
        """Runs one step, scores and samples; see ``Runner``.

        Raises:
            ValueError: a row that is not greedy has no seed.
        """
        scores = any(work.num_scored for work in works)
        if sequences and not scores and all(map(plain_greedy, sequences)) and isinstance(self.model, GreedyModel):
            tokens = self.model.most_likely(self._batch(works), self.cache, hooks).tolist()
            return [SampledToken(token) for token in tokens], non_finite_errors(tokens)
        return sample_next(self.run(works, hooks), works, sequences)

    def copy_kv(
        self,
        source: ModelRunner,
        source_blocks: Sequence[int],
        blocks: Sequence[int],
        layer_map: Sequence[int],
        num_tokens: int,
        start: int,
    ) -> None:
        """Copies a sequence's KV; see ``copy_sequence``."""
        copy_sequence(source.cache, source_blocks, self.cache, blocks, layer_map, num_tokens, start)
        # Once released, these blocks may be written in another stream: by the receiver.
        self.synchronize()

    def synchronize(self) -> None:
        """Waits until no earlier kernel touches the cache any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clean_up(self, error: Exception) -> None:
        """Cleans up after a step that failed with ``error``: waits for its kernels and frees its memory.

        Drops the error's traceback, which would keep the step's tensors alive.
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
        num_blocks = -(-ends // size)
        rows = self._tables.rows([work.blocks for work in works], num_blocks.tolist())
        owner = np.repeat(np.arange(len(works)), counts)
        positions = np.arange(len(owner)) + np.repeat(ends - 1 - last, counts)
        slots = self._tables.array[rows[owner], positions // size] * size + positions % size
        # A device gets a copy of this step's rows only, cut to the longest.
        on_host = self.device.type == "cpu"
        query_lens: list[int] = counts.tolist()
        tables = self._tables.array if on_host else self._tables.array[rows, : num_blocks.max()]
        return ForwardBatch(
            token_ids=self._tensor(np.fromiter(chain.from_iterable(w.tokens for w in works), np.int64, len(owner))),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_lens=query_lens,
            context_lens=ends.tolist(),
            block_tables=self._tensor(tables),
            context_lens_device=self._tensor(ends),
            logits_indices=self._tensor(_logits_indices(works, last)),
            table_rows=self._tensor(rows) if on_host else None,
            adapters=token_adapters([work.adapter for work in works], query_lens),
        )

    def _tensor(self, values: NDArray[np.int64]) -> torch.Tensor:
        return upload(torch.from_numpy(values), self.device)


def _logits_indices(works: Sequence[Work], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending rows whose logits the works want; ``last`` has the row of each work's last token."""
    wanted = np.array([work.wants_logits for work in works])
    if not any(work.num_scored for work in works):
        chosen: NDArray[np.int64] = last[wanted]
        return chosen
    ends = last + 1
    starts = ends - wanted - [work.num_scored for work in works]
    return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True) if start < end])


def _score(logits: torch.Tensor, works: Sequence[Work]) -> torch.Tensor:
    """Scores the works' known tokens, and returns the rows of ``logits`` that are left to sample."""
    sampled, row = [], 0
    for work in works:
        if work.scoring is not None:
            end = row + work.num_scored
            score(logits[row:end], work.scoring.targets, work.scoring.count, work.scoring.into)
            row = end
        if work.wants_logits:
            sampled.append(row)
            row += 1
    return logits[sampled]


@dataclass(slots=True)
class _Row:
    """A sequence's row, whose first ``filled`` entries equal ``blocks``. ``step`` is the last step that used it."""

    index: int
    blocks: Sequence[int]
    filled: int
    step: int


class BlockTables:
    """The block tables of all sequences, as rows of one array. Rows are kept between steps, and extended.

    A row belongs to one list object, to which it keeps a reference. The engine does not report the end of a sequence;
    instead, a row that no step has used for 8 steps is reused.

    Attributes:
        array: [rows, width] int64. Entries behind a sequence's context are meaningless.
    """

    def __init__(self) -> None:
        self.array: NDArray[np.int64] = np.zeros((1, 1), np.int64)
        self._rows: dict[int, _Row] = {}  # by the id() of their lists
        self._free = [0]
        self._step = 0

    def rows(self, tables: Sequence[Sequence[int]], counts: Sequence[int]) -> NDArray[np.int64]:
        """Rows of ``array`` that hold the first ``counts[i]`` blocks of each ``tables[i]``. [len(tables)]"""
        self._step += 1
        self._widen(max(counts, default=0))
        found = [self._row(blocks, count).index for blocks, count in zip(tables, counts, strict=True)]
        return np.array(found, np.int64)

    def _row(self, blocks: Sequence[int], count: int) -> _Row:
        row = self._rows.get(id(blocks))
        if row is None:
            row = self._rows[id(blocks)] = _Row(self._allocate(), blocks, 0, self._step)
        row.step = self._step
        if row.filled < count:
            self.array[row.index, row.filled : count] = blocks[row.filled : count]
            row.filled = count
        return row

    def _allocate(self) -> int:
        """Returns the index of an unused row; reuses old rows first, then doubles the array."""
        if not self._free:
            old = [key for key, row in self._rows.items() if row.step + _ROW_LIFETIME < self._step]
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

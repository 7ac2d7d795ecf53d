"""Runs whole transcripts through both halves of a pair, with the services' forward pass.

The engine's ``Transformer`` runs over a KV cache that holds one batch of sequences, without scheduling or padding. A
block is one token: a token's slot is its sequence's first slot plus its position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overfill.kv.cache import KvCache, copy_sequence
from overfill.kv.codecs import quantise, restore
from overfill.kv.spec import KvCacheDtype
from overfill.kv.tensors import dtype_name
from overfill.making.conversations import Transcript
from overfill.model.batch import ForwardBatch, token_adapters
from overfill.model.transformer import ForwardModel

BATCH_TOKENS = 1024
"""Tokens of a batch, unless one transcript is longer. Memory holds the logits of a batch for two models at once."""


def batches(transcripts: Sequence[Transcript], tokens: int = BATCH_TOKENS) -> Iterator[list[Transcript]]:
    """Groups consecutive transcripts with at most ``tokens`` in total; a longer transcript is a batch of its own."""
    batch: list[Transcript] = []
    size = 0
    for transcript in transcripts:
        if batch and size + len(transcript.token_ids) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(transcript)
        size += len(transcript.token_ids)
    if batch:
        yield batch


def cache_tokens(transcripts: Sequence[Transcript]) -> int:
    """Returns the number of tokens in the largest of the ``batches``, which a cache must hold."""
    return max([BATCH_TOKENS, *(len(t.token_ids) for t in transcripts)])


@dataclass(frozen=True, slots=True)
class _NewTokens:
    """New tokens of one sequence, from position ``start``. The last ``num_logits`` of them get logits.

    ``adapter`` is the slot of the adapter whose products are added; None adds none.
    """

    tokens: Sequence[int]
    start: int
    slot: int  # slot of position 0
    num_logits: int
    adapter: int | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class BatchModel:
    """A model with a KV cache for one batch of ``max_tokens`` tokens.

    Raises:
        ValueError: on use, if a batch is larger.
    """

    def __init__(self, model: ForwardModel, max_tokens: int, kv_cache_dtype: KvCacheDtype = "auto") -> None:
        self.model = model
        spec = model.config.kv_spec(dtype_name(model.dtype))
        self.cache = KvCache(spec, max_tokens, 1, model.device, kv_cache_dtype)

    def read_all(self, batch: Sequence[Transcript], skip: int, adapter: int | None = None) -> Tensor:
        """Reads prompts and answers, and predicts the answer tokens from index ``skip`` on.

        Each prompt needs at least one token, and each answer at least ``skip``.

        Args:
            adapter: slot of the model's adapter that reads them; None means none.

        Returns:
            [N, vocab] float32, a row per answer token without the first ``skip`` of each answer, in order.
        """
        slots = _slots(batch)
        return self._forward(
            [
                _NewTokens(t.token_ids[:-1], 0, slot, len(t.answer) - skip, adapter)
                for t, slot in zip(batch, slots, strict=True)
            ]
        )

    def read_prompts(self, batch: Sequence[Transcript]) -> Tensor:
        """Reads the prompts only and predicts each answer's first token. [len(batch), vocab] float32"""
        return self._forward([_NewTokens(t.prompt, 0, slot, 1) for t, slot in zip(batch, _slots(batch), strict=True)])

    def read_answers(
        self,
        batch: Sequence[Transcript],
        full: BatchModel,
        layer_map: Sequence[int],
        *,
        int8: bool = False,
        adapter: int | None = None,
    ) -> Tensor:
        """Reads what the decoder computes, on the prompts' KV that ``full`` holds after reading the same batch.

        Args:
            int8: True rounds the prompts' KV as the codec int8 does on its way.
            adapter: slot of the adapter that reads them; None means none.

        Returns:
            [N, vocab] float32, a row per answer token that the decoder writes (``Transcript.learn_start``), in order.
        """
        new = []
        for transcript, slot in zip(batch, _slots(batch), strict=True):
            start = transcript.decoder_start
            inputs, written = transcript.token_ids[start:-1], len(transcript.token_ids) - transcript.learn_start
            blocks = range(slot, slot + start)
            copy_sequence(full.cache, blocks, self.cache, blocks, layer_map, start)
            if int8:
                for half in (self.cache.k, self.cache.v):
                    prompt = half[:, slot : slot + start]
                    prompt.copy_(restore(*quantise(prompt), half.dtype))
            if inputs:
                new.append(_NewTokens(inputs, start, slot, written, adapter))
        return self._forward(new)

    def _forward(self, sequences: Sequence[_NewTokens]) -> Tensor:
        device = self.model.device
        if not sequences:
            return torch.empty(0, self.model.config.vocab_size, device=device)
        ends, query_lens = [s.end for s in sequences], [len(s.tokens) for s in sequences]
        if sequences[-1].slot + ends[-1] > self.cache.num_blocks:
            needed = sequences[-1].slot + ends[-1]
            raise ValueError(f"the batch has {needed} tokens; the cache holds {self.cache.num_blocks}")
        tables = torch.zeros(len(sequences), max(ends), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            tables[row, : sequence.end] = torch.arange(sequence.slot, sequence.slot + sequence.end)
        positions = torch.cat([torch.arange(s.start, s.end) for s in sequences])
        slots = torch.cat([torch.arange(s.slot + s.start, s.slot + s.end) for s in sequences])
        return self.model.forward(
            ForwardBatch(
                token_ids=torch.tensor([token for s in sequences for token in s.tokens]).to(device),
                positions=positions.to(device),
                slots=slots.to(device),
                query_lens=query_lens,
                context_lens=ends,
                block_tables=tables.to(device),
                context_lens_device=torch.tensor(ends).to(device),
                logits_indices=_logits_rows(sequences).to(device),
                adapters=token_adapters([s.adapter for s in sequences], query_lens),
            ),
            self.cache,
        )


def target_tokens(batch: Sequence[Transcript], skip: int) -> Tensor:
    """Returns the answer tokens without the first ``skip`` of each answer. [N] int64"""
    return torch.tensor([token for t in batch for token in t.answer[skip:]], dtype=torch.int64)


def _slots(batch: Sequence[Transcript]) -> list[int]:
    slots, total = [], 0
    for transcript in batch:
        slots.append(total)
        total += len(transcript.token_ids)
    return slots


def _logits_rows(sequences: Sequence[_NewTokens]) -> Tensor:
    rows, end = [], 0
    for sequence in sequences:
        end += len(sequence.tokens)
        rows.append(torch.arange(end - sequence.num_logits, end))
    return torch.cat(rows)

"""Transcripts end to end in one dimension: what one forward pass of training computes. No padding, no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from overfill.pair.conversations import Transcript


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The tokens that one forward pass computes for several transcripts, end to end; a row is a token.

    The first token of an answer comes from the full model, so what is learnt are the tokens after it: each is
    predicted by the row of the token before it.

    Attributes:
        token_ids, positions: [T] int64; positions are absolute.
        lengths: rows of each transcript.
        prefixes: tokens of each transcript before its rows, whose keys and values come from elsewhere.
        predicting: [N] int64, the rows that predict a token to learn.
        targets: [N] int64, those tokens.
    """

    token_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    predicting: Tensor
    targets: Tensor

    @classmethod
    def of_answers(cls, transcripts: Sequence[Transcript]) -> PackedRows:
        """What a decoder computes that finds the prompt's keys and values in place."""
        return _rows(transcripts, [t.answer_start for t in transcripts])

    @classmethod
    def of_whole(cls, transcripts: Sequence[Transcript]) -> PackedRows:
        """What a model computes that reads prompt and answer itself."""
        return _rows(transcripts, [0] * len(transcripts))

    @classmethod
    def of_prompts(cls, transcripts: Sequence[Transcript]) -> PackedRows:
        """Prompts alone; nothing is predicted."""
        rows = _rows([Transcript((*t.prompt, 0), t.answer_start) for t in transcripts], [0] * len(transcripts))
        return replace(rows, predicting=rows.predicting[:0], targets=rows.targets[:0])

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(
            self.token_ids.to(device),
            self.positions.to(device),
            self.lengths,
            self.prefixes,
            self.predicting.to(device),
            self.targets.to(device),
        )


def _rows(transcripts: Sequence[Transcript], starts: Sequence[int]) -> PackedRows:
    token_ids: list[int] = []
    predicting: list[Tensor] = []
    targets: list[int] = []
    lengths = []
    for transcript, start in zip(transcripts, starts, strict=True):
        first = len(token_ids) + transcript.answer_start - start
        token_ids += transcript.token_ids[start:-1]  # nothing follows the last token
        lengths.append(len(transcript.token_ids) - 1 - start)
        predicting.append(torch.arange(first, len(token_ids)))
        targets += transcript.answer[1:]
    return PackedRows(
        token_ids=torch.tensor(token_ids),
        positions=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]),
        lengths=tuple(lengths),
        prefixes=tuple(starts),
        predicting=torch.cat(predicting),
        targets=torch.tensor(targets, dtype=torch.int64),
    )


def learnt_tokens(transcript: Transcript) -> int:
    """Tokens of the answer that a decoder learns: all but the first."""
    return len(transcript.token_ids) - transcript.answer_start - 1


def in_packs(indices: Iterable[int], size: Callable[[int], int], max_rows: int) -> Iterator[list[int]]:
    """Groups of ``indices`` with at most ``max_rows`` rows in total; one that is larger stands alone.

    Args:
        size: rows of an index. Similar sizes come together, so that little is padded where attention pads.
    """
    pack: list[int] = []
    rows = 0
    for index in sorted(indices, key=lambda i: (size(i), i)):
        if pack and rows + size(index) > max_rows:
            yield pack
            pack, rows = [], 0
        pack.append(index)
        rows += size(index)
    if pack:
        yield pack

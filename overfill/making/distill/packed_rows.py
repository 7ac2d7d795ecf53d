"""Packs transcripts end to end, without padding, for one forward pass of training. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from overfill.making.conversations import Transcript


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The tokens that one forward pass computes for several transcripts, end to end; a row is a token.

    The decoder learns the answer's tokens from ``Transcript.learn_start`` on. The row of the token before it predicts
    each of them.

    Attributes:
        token_ids, positions: [T] int64; positions are absolute.
        lengths: Number of rows of each transcript.
        prefixes: Number of tokens of each transcript before its rows. Their keys and values are given.
        predicting: [N] int64, indices of the rows that predict a token to learn.
        targets: [N] int64, the tokens to learn.
    """

    token_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    predicting: Tensor
    targets: Tensor

    @classmethod
    def of_answers(cls, transcripts: Sequence[Transcript]) -> PackedRows:
        """Packs what the decoder computes when it is given the full model's keys and values."""
        return _rows(transcripts, [t.decoder_start for t in transcripts])

    @classmethod
    def of_whole(cls, transcripts: Sequence[Transcript]) -> PackedRows:
        """Packs prompts and answers, for a model that reads both itself."""
        return _rows(transcripts, [0] * len(transcripts))

    @classmethod
    def of_prompts(cls, transcripts: Sequence[Transcript]) -> PackedRows:
        """Packs what the full model computes of the prompts; no row predicts a token."""
        prompts = [Transcript((*t.token_ids[: t.decoder_start], 0), t.decoder_start) for t in transcripts]
        rows = _rows(prompts, [0] * len(transcripts))
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
        first = len(token_ids) + transcript.learn_start - 1 - start
        token_ids += transcript.token_ids[start:-1]  # the last token predicts nothing
        lengths.append(len(transcript.token_ids) - 1 - start)
        predicting.append(torch.arange(first, len(token_ids)))
        targets += transcript.token_ids[transcript.learn_start :]
    return PackedRows(
        token_ids=torch.tensor(token_ids),
        positions=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]),
        lengths=tuple(lengths),
        prefixes=tuple(starts),
        predicting=torch.cat(predicting),
        targets=torch.tensor(targets, dtype=torch.int64),
    )


def learnt_tokens(transcript: Transcript) -> int:
    """Returns the number of answer tokens that a decoder learns."""
    return len(transcript.token_ids) - transcript.learn_start


def in_packs(indices: Iterable[int], size: Callable[[int], int], max_rows: int) -> Iterator[list[int]]:
    """Groups ``indices`` into packs of at most ``max_rows`` rows; a larger transcript is a pack of its own.

    Packs hold transcripts of similar size, which keeps the padding of padded attention small.

    Args:
        size: Returns the number of rows of an index.
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

"""Caches the full model's outputs in memory-mapped files, so that it computes each transcript once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from overfill.making.conversations import Transcript
from overfill.making.distill.packed_rows import learnt_tokens

_NUMPY: dict[torch.dtype, type[np.generic]] = {torch.float16: np.float16, torch.int32: np.int32}


@dataclass(frozen=True, slots=True)
class Column:
    """One kind of cached output.

    Attributes:
        per: Unit that has an entry: each prompt token that the full model computes, or each answer token that the
            decoder learns.
        shape: Shape of one transcript's tensor, with -1 for the number of tokens.
        dtype: Type of the elements in the file; float16 or int32.
    """

    name: str
    per: Literal["prompt", "learnt"]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        return self.shape.index(-1)

    def numbers(self, transcript: Transcript) -> int:
        """Returns the number of elements of one transcript."""
        return self.tokens(transcript) * -math.prod(self.shape)

    def tokens(self, transcript: Transcript) -> int:
        return transcript.decoder_start if self.per == "prompt" else learnt_tokens(transcript)

    def bytes(self, transcripts: Sequence[Transcript]) -> int:
        return sum(map(self.numbers, transcripts)) * self.dtype.itemsize


class TeacherCache:
    """A file per column with all transcripts in order, and ``done.bin`` with a byte per transcript.

    The processes of one machine may share a cache.

    Args:
        folder: Folder of the cache, created if needed. Contents written for another ``identity`` are deleted.
        identity: Identifies the full model, the transcripts and the columns.
    """

    def __init__(
        self, folder: Path, transcripts: Sequence[Transcript], columns: Sequence[Column], identity: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _start_over_unless(folder, identity)
        self._columns = [(column, _File(folder, column, transcripts)) for column in columns]
        self._done = _open(folder / "done.bin", len(transcripts), np.uint8)

    def __contains__(self, number: int) -> bool:
        return bool(self._done[number])

    def write(self, transcripts: Mapping[int, Transcript], computed: Mapping[str, Tensor]) -> None:
        """Stores the outputs of ``transcripts``; ``computed`` has one tensor per column, in their order."""
        for column, file in self._columns:
            lengths = [column.tokens(transcript) for transcript in transcripts.values()]
            for number, part in zip(transcripts, computed[column.name].split(lengths, column.dim), strict=True):
                file.write(number, part)
        for number in transcripts:
            self._done[number] = 1  # last: a killed process marks no half-written transcript as done

    def read(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Reads one CPU tensor per column for the transcripts ``numbers``, in the files' dtypes."""
        return {
            column.name: torch.cat([file.read(number) for number in numbers], column.dim)
            for column, file in self._columns
        }


class _File:
    def __init__(self, folder: Path, column: Column, transcripts: Sequence[Transcript]) -> None:
        self._column = column
        self._ends = [0, *accumulate(map(column.numbers, transcripts))]
        self._map = _open(folder / f"{column.name}.bin", self._ends[-1], _NUMPY[column.dtype])

    def write(self, number: int, tensor: Tensor) -> None:
        flat = tensor.to("cpu", self._column.dtype).contiguous().view(-1)
        self._map[self._ends[number] : self._ends[number + 1]] = flat.numpy()

    def read(self, number: int) -> Tensor:
        found = np.array(self._map[self._ends[number] : self._ends[number + 1]])
        return torch.from_numpy(found).view(self._column.shape)


def _start_over_unless(folder: Path, identity: str) -> None:
    file = folder / "identity.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) == identity:
        return
    for old in folder.glob("*.bin"):
        old.unlink()
    file.write_text(json.dumps(identity), encoding="utf-8")


def _open(file: Path, count: int, dtype: type[np.generic]) -> np.memmap:
    """Maps a file of ``count`` numbers; a new file is sparse and all zero."""
    if not file.exists():
        with file.open("wb") as new:
            new.truncate(count * np.dtype(dtype).itemsize)
    return np.memmap(file, dtype=dtype, mode="r+", shape=(count,))

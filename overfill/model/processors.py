"""Changes logits before sampling: penalties, bias, grammar and min_tokens. Rows that use none of them cost nothing.

A row's logits change by its own parameters and tokens only, element by element. So ``sample`` keeps its promise that a
token does not depend on the other rows. A processor derives its state from the answer's tokens, so that a migrated or
replayed sequence needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overfill.errors import InternalError
from overfill.model.upload import upload
from overfill.request.grammar import Grammars, Matcher
from overfill.request.params import SamplingParams

_WORD_BITS = 32

T = TypeVar("T")


class LogitProcessor:
    """Changes one sequence's logits. Make it with ``new_processor``.

    Args:
        matcher: state of the grammar at the start of the answer. None means no grammar.
        end_ids: tokens that end the answer; forbidden until the answer has ``min_tokens`` tokens.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], matcher: Matcher | None, end_ids: Collection[int] = ()
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.end_ids = np.fromiter(sorted(end_ids), np.int64)
        self._seen = 0
        self._biased = np.fromiter(params.logit_bias, np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        # Index of each penalised token in the two arrays below.
        self._index: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        if params.repetition_penalty != 1:
            for token in prompt:
                self._index_of(token)

    def catch_up(self, emitted: Sequence[int]) -> None:
        """Updates the state with the answer's new tokens. Raises GrammarFailed."""
        new = emitted[self._seen :]
        self._seen = len(emitted)
        if self.params.penalised:
            for token in new:
                index = self._index_of(token)  # before the addition, because it may replace the array
                self._counts[index] += 1
        if self.matcher is not None:
            self.matcher.accept(new)

    def needed(self, num_emitted: int) -> bool:
        """True if the processor changes the logits of the token after ``num_emitted`` others."""
        params = self.params
        lasting = params.penalised or bool(params.logit_bias) or self.matcher is not None
        return lasting or self._too_short(num_emitted)

    @property
    def end_forbidden(self) -> bool:
        """True while the answer is too short to end."""
        return self._too_short(self._seen)

    @property
    def penalised(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Penalised token ids, and how often each is in the answer (0 means in the prompt only)."""
        return self._ids[: len(self._index)], self._counts[: len(self._index)]

    @property
    def biased(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Biased token ids, and the bias of each."""
        return self._biased, self._bias

    def _too_short(self, num_emitted: int) -> bool:
        return num_emitted < self.params.min_tokens and len(self.end_ids) > 0

    def _index_of(self, token: int) -> int:
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[index] = token
        return index


def new_processor(
    params: SamplingParams, prompt: Sequence[int], grammars: Grammars | None, eos_ids: Sequence[int]
) -> LogitProcessor | None:
    """Makes the processor that ``params`` need; None if they leave logits as they are.

    Compiling a grammar takes milliseconds, the first one a second.

    Args:
        grammars: compiler of grammars; not None if ``params`` have a grammar.
        eos_ids: the model's end-of-sequence ids.

    Raises:
        InvalidRequest: the grammar is not supported for this model.
    """
    if not params.need_processor(eos_ids):
        return None
    matcher = None
    if params.grammar is not None:
        assert grammars is not None
        matcher = grammars.matcher(params.grammar)
    end_ids = params.end_ids(eos_ids) if params.min_tokens else frozenset()
    return LogitProcessor(params, prompt, matcher, end_ids)


@torch.inference_mode()
def process(
    logits: Tensor, processors: Sequence[LogitProcessor | None], emitted: Sequence[Sequence[int]]
) -> dict[int, Exception]:
    """Applies the processors to ``logits``, in place.

    Args:
        logits: [N, vocab] float32.
        processors: one per row. None leaves the row as it is.
        emitted: the answer so far, per row.

    Returns:
        Row -> error for rows that failed; their logits are meaningless.
    """
    failed: dict[int, Exception] = {}
    if not any(processors):
        return failed
    rows: list[tuple[int, LogitProcessor]] = []
    for row, processor in enumerate(processors):
        if processor is None:
            continue
        try:
            processor.catch_up(emitted[row])
        except Exception as error:
            failed[row] = error
        else:
            rows.append((row, processor))
    row_by_row(partial(_penalise, logits), [(row, p) for row, p in rows if p.params.penalised], failed)
    row_by_row(partial(_add_bias, logits), [(row, p) for row, p in rows if p.params.logit_bias], failed)
    row_by_row(partial(_mask, logits), [(row, p) for row, p in rows if p.matcher is not None], failed)
    row_by_row(
        partial(_forbid_end, logits), [(row, p) for row, p in rows if p.matcher is None and p.end_forbidden], failed
    )
    return failed


_Rows = Sequence[tuple[int, LogitProcessor]]
_Failed = dict[int, Exception]


def row_by_row(
    change: Callable[[Sequence[tuple[int, T]]], None], rows: Sequence[tuple[int, T]], failed: _Failed
) -> None:
    """Changes all rows at once. When that raises, changes them one by one, so that only the rows fail that raise.

    Args:
        change: writes its results once, at its end, so that one that raises has changed nothing.
        rows: each with its number.
        failed: receives number -> error.
    """
    try:
        change(rows)
    except Exception as error:
        if len(rows) == 1:
            failed[rows[0][0]] = error
            return
        for one in rows:
            row_by_row(change, [one], failed)


def _penalise(logits: Tensor, rows: _Rows) -> None:
    parts = [p.penalised for _, p in rows]
    sizes = [len(ids) for ids, _ in parts]
    if not sum(sizes):
        return
    ids = _tensor(np.concatenate([ids for ids, _ in parts]), logits)
    counts = _tensor(np.concatenate([counts for _, counts in parts]), logits)
    index = _tensor(np.repeat(np.array([row for row, _ in rows]), sizes), logits)

    def repeat_for_tokens(values: Sequence[float]) -> Tensor:
        """Repeats each row's value once per penalised token."""
        return _tensor(np.repeat(np.array(values, np.float32), sizes), logits)

    values = logits[index, ids]  # [penalised tokens of all rows]
    repetition = repeat_for_tokens([p.params.repetition_penalty for _, p in rows])
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= counts * repeat_for_tokens([p.params.frequency_penalty for _, p in rows])
    values -= (counts > 0) * repeat_for_tokens([p.params.presence_penalty for _, p in rows])
    logits[index, ids] = values


def _add_bias(logits: Tensor, rows: _Rows) -> None:
    if not rows:
        return
    parts = [p.biased for _, p in rows]
    ids = _tensor(np.concatenate([ids for ids, _ in parts]), logits)
    bias = _tensor(np.concatenate([bias for _, bias in parts]), logits)
    index = _tensor(np.repeat(np.array([row for row, _ in rows]), [len(ids) for ids, _ in parts]), logits)
    logits[index, ids] += bias  # correct because no row has a token twice


def _mask(logits: Tensor, rows: _Rows) -> None:
    if not rows:
        return
    vocab = logits.shape[1]
    words = np.zeros((len(rows), -(-vocab // _WORD_BITS)), np.int32)
    for line, (_, processor) in enumerate(rows):
        assert processor.matcher is not None
        processor.matcher.fill(words[line])
    # Numpy unpacks bits several times faster than torch does; a byte per token is cheap to move to the device.
    forbidden = np.unpackbits(~words.view(np.uint8), axis=1, count=vocab, bitorder="little").view(np.bool_)
    for line, (_, processor) in enumerate(rows):
        if processor.end_forbidden:
            with_end = forbidden[line].copy()
            with_end[processor.end_ids] = True
            if not with_end.all():  # otherwise the grammar allows only the end
                forbidden[line] = with_end
    if forbidden.all(axis=1).any():
        raise InternalError("the grammar allows no token")
    moved = _tensor(forbidden, logits)  # [rows, vocab]
    if len(rows) == len(logits):
        logits.masked_fill_(moved, -torch.inf)
    elif logits.device.type == "cpu":  # a call per row costs less than two copies of the rows
        for (row, _), mask in zip(rows, moved.unbind(), strict=True):
            logits[row].masked_fill_(mask, -torch.inf)
    else:
        index = _tensor(np.array([row for row, _ in rows]), logits)
        logits[index] = logits[index].masked_fill_(moved, -torch.inf)


def _forbid_end(logits: Tensor, rows: _Rows) -> None:
    """Forbids the end of answers that are too short, for rows without a grammar; ``_mask`` does so for the others."""
    if not rows:
        return
    ids = _tensor(np.concatenate([p.end_ids for _, p in rows]), logits)
    index = _tensor(np.repeat(np.array([row for row, _ in rows]), [len(p.end_ids) for _, p in rows]), logits)
    logits[index, ids] = -torch.inf


def _tensor(array: NDArray[np.generic], like: Tensor) -> Tensor:
    return upload(torch.from_numpy(array), like.device)

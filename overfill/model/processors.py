"""What changes logits before a token is chosen: penalties, bias, grammar, min_tokens. Costs nothing where unused.

Each row is changed by its own parameters and tokens only, element by element, so that what ``sample`` promises still
holds: a choice does not depend on the other rows. State is caught up from the tokens whenever a row is due; a
sequence that moves, or is replayed, needs nothing but its tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overfill.request.grammar import Grammars, Matcher
from overfill.request.params import SamplingParams

_WORD_BITS = 32


class LogitProcessor:
    """One sequence's penalties, bias, place in its grammar and least length. Made with ``new_processor``.

    Args:
        matcher: at the start of the answer; None without a grammar.
        end_ids: tokens that end the answer, and may not before it has ``min_tokens``.
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
        # Every token that a penalty touches has a place in the arrays below.
        self._index: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        if params.repetition_penalty != 1:
            for token in prompt:
                self._index_of(token)

    def catch_up(self, emitted: Sequence[int]) -> None:
        """Takes the tokens of the answer that are new. Raises GrammarFailed."""
        new = emitted[self._seen :]
        self._seen = len(emitted)
        if self.params.penalised:
            for token in new:
                index = self._index_of(token)  # first: it may replace the array
                self._counts[index] += 1
        if self.matcher is not None:
            self.matcher.accept(new)

    def needed(self, num_emitted: int) -> bool:
        """Whether it changes the logits of the token after ``num_emitted`` others."""
        params = self.params
        lasting = params.penalised or bool(params.logit_bias) or self.matcher is not None
        return lasting or self._too_short(num_emitted)

    @property
    def end_forbidden(self) -> bool:
        """Whether the answer may not end yet."""
        return self._too_short(self._seen)

    @property
    def penalised(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Tokens that a penalty touches, and how often each is in the answer (0: in the prompt only)."""
        return self._ids[: len(self._index)], self._counts[: len(self._index)]

    @property
    def biased(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token ids, and what is added to their logits."""
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
    """What ``params`` ask for; None when they leave logits as they are. Compiling a grammar takes milliseconds.

    Args:
        eos_ids: the model's own end-of-sequence ids.

    Raises:
        InvalidRequest: the grammar cannot be obeyed here.
    """
    end_ids = params.end_ids(eos_ids) if params.min_tokens else frozenset()
    if params.grammar is None and not params.penalised and not params.logit_bias and not end_ids:
        return None
    matcher = None
    if params.grammar is not None:
        assert grammars is not None
        matcher = grammars.matcher(params.grammar)
    return LogitProcessor(params, prompt, matcher, end_ids)


async def prepare_processor(
    params: SamplingParams, prompt: Sequence[int], grammars: Grammars | None, eos_ids: Sequence[int]
) -> LogitProcessor | None:
    """``new_processor`` for an event loop: a grammar, whose first one takes a second, is compiled in a thread."""
    if params.grammar is None:
        return new_processor(params, prompt, grammars, eos_ids)
    return await asyncio.to_thread(new_processor, params, prompt, grammars, eos_ids)


@torch.inference_mode()
def process(
    logits: Tensor, processors: Sequence[LogitProcessor | None], emitted: Sequence[Sequence[int]]
) -> dict[int, Exception]:
    """Changes ``logits`` in place.

    Args:
        logits: [N, vocab] float32.
        processors: one per row; None leaves the row alone.
        emitted: one per row; the answer so far.

    Returns:
        Row -> error, of rows that cannot go on; their logits mean nothing.
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
    _penalise(logits, [(row, p) for row, p in rows if p.params.penalised])
    _add_bias(logits, [(row, p) for row, p in rows if p.params.logit_bias])
    _mask(logits, [(row, p) for row, p in rows if p.matcher is not None], failed)
    _forbid_end(logits, [(row, p) for row, p in rows if p.matcher is None and p.end_forbidden])
    return failed


def _penalise(logits: Tensor, rows: Sequence[tuple[int, LogitProcessor]]) -> None:
    parts = [p.penalised for _, p in rows]
    sizes = [len(ids) for ids, _ in parts]
    if not sum(sizes):
        return
    ids = _tensor(np.concatenate([ids for ids, _ in parts]), logits)
    counts = _tensor(np.concatenate([counts for _, counts in parts]), logits)
    index = _tensor(np.repeat(np.array([row for row, _ in rows]), sizes), logits)

    def repeat_for_tokens(values: Sequence[float]) -> Tensor:
        return _tensor(np.repeat(np.array(values, np.float32), sizes), logits)

    values = logits[index, ids]  # [penalised tokens of all rows]
    repetition = repeat_for_tokens([p.params.repetition_penalty for _, p in rows])
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= counts * repeat_for_tokens([p.params.frequency_penalty for _, p in rows])
    values -= (counts > 0) * repeat_for_tokens([p.params.presence_penalty for _, p in rows])
    logits[index, ids] = values


def _add_bias(logits: Tensor, rows: Sequence[tuple[int, LogitProcessor]]) -> None:
    if not rows:
        return
    parts = [p.biased for _, p in rows]
    ids = _tensor(np.concatenate([ids for ids, _ in parts]), logits)
    bias = _tensor(np.concatenate([bias for _, bias in parts]), logits)
    index = _tensor(np.repeat(np.array([row for row, _ in rows]), [len(ids) for ids, _ in parts]), logits)
    logits[index, ids] += bias  # no token twice in a row


def _mask(logits: Tensor, rows: Sequence[tuple[int, LogitProcessor]], failed: dict[int, Exception]) -> None:
    if not rows:
        return
    vocab = logits.shape[1]
    words = np.zeros((len(rows), -(-vocab // _WORD_BITS)), np.int32)
    for line, (row, processor) in enumerate(rows):
        assert processor.matcher is not None
        try:
            processor.matcher.fill(words[line])
        except Exception as error:
            failed[row] = error
            words[line] = -1
    # Unpacked here, in one go: numpy is several times faster at it than torch, and a byte per token is little to move.
    allowed = np.unpackbits(words.view(np.uint8), axis=1, count=vocab, bitorder="little")
    for line, (_, processor) in enumerate(rows):
        if processor.end_forbidden:
            without_end = allowed[line].copy()
            without_end[processor.end_ids] = 0
            if without_end.any():  # else the grammar allows nothing but the end
                allowed[line] = without_end
    forbidden = _tensor(allowed == 0, logits)  # [rows, vocab]
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
        return
    index = torch.tensor([row for row, _ in rows], device=logits.device)
    logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)


def _forbid_end(logits: Tensor, rows: Sequence[tuple[int, LogitProcessor]]) -> None:
    """Rules out what would end answers that are too short. Rows without a grammar only."""
    if not rows:
        return
    ids = _tensor(np.concatenate([p.end_ids for _, p in rows]), logits)
    index = _tensor(np.repeat(np.array([row for row, _ in rows]), [len(p.end_ids) for _, p in rows]), logits)
    logits[index, ids] = -torch.inf


def _tensor(array: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)

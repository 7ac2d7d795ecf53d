"""vLLM's logits processor: lets OverFill's own sampling choose the tokens of rows that need it.

vLLM is asked for greedy sampling always, so a row's token is the greatest element of its logits. Rows that want just
that are left to vLLM. For the others this processor sees the logits first, chooses by the request's parameters, and
makes the chosen token the greatest. So both engines draw the same tokens from the same logits.

Penalties, bias and grammars change logits in place. Rows are copied only to draw from them, some at a time, which takes
170 MB at most (``model.sampling``). Before vLLM sizes its cache, it measures the memory of its own sampler drawing for
``max_num_seqs`` rows, which never happens afterwards. So the memory of large batches is set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

from overfill.engine.sequence import Processor
from overfill.engine.vllm.hooks import PLAIN, REQUEST_ID, ROW_SPEC, hub
from overfill.engine.work import Sampled
from overfill.errors import InternalError
from overfill.model.processors import process, row_by_row
from overfill.model.sampling import choose, logprobs, non_finite
from overfill.model.steps import SampledToken
from overfill.model.upload import upload

_TOKENS_AT_ONCE = 1 << 22
"""Logits that are copied at once, which bounds the memory of a large batch."""


class OverfillSampler(LogitsProcessor):  # type: ignore[misc]
    """Keeps track of which request is in which row, and asks the engine to sample."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[str, bool]] = {}  # row -> request, and whether vLLM chooses its token
        self._ids: list[str] = []
        self._chosen: list[int] = []

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        rows = self._rows
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            extra = params.extra_args or {}
            rows[row] = id, plain = extra.get(REQUEST_ID, ""), extra.get(PLAIN, True)
            if not plain and hub.runner is not None:
                hub.runner.row_added(id, extra.get(ROW_SPEC), prompt, output)
        for source, target, direction in batch_update.moved:
            moved, replaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                rows[source] = replaced
        self._ids = [rows[row][0] if row in rows else "" for row in range(batch_update.batch_size)]
        self._chosen = sorted(row for row, (_, plain) in rows.items() if not plain)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if hub.runner is not None:
            hub.runner.sample(logits, self._ids, self._chosen)
        return logits


class StepSampler:
    """Samples the tokens of one step. Tensor parallelism has one in each rank, and all choose the same tokens.

    Attributes:
        details: request -> its token with log-probabilities, where it wants them.
        errors: request -> why its token is void. Complete after ``finish``.
        chosen: request -> its token, unless vLLM chooses it; negative if its logits are not finite. Complete after
            ``finish``.
    """

    def __init__(self) -> None:
        self.details: dict[str, SampledToken] = {}
        self.errors: dict[str, Exception] = {}
        self.chosen: dict[str, int] = {}
        self._ids: Sequence[str] = ()
        self._logits: torch.Tensor | None = None
        self._tokens: list[tuple[list[str], torch.Tensor]] = []  # ``chosen``, on the device

    def sample(
        self, logits: torch.Tensor, ids: Sequence[str], rows: Sequence[int], sampled: Callable[[str], Sampled | None]
    ) -> None:
        """Makes the tokens of ``rows`` the greatest elements of their rows.

        Args:
            logits: [N, vocab] float32.
            ids: the request of each row.
            rows: rows whose token is not always the most likely one.
            sampled: returns a request's sequence, or None if it samples no token in this step.
        """
        self._ids = ids
        self._logits = logits
        found = {row: sequence for row in rows if (sequence := sampled(ids[row])) is not None}
        if not found:
            return
        processors: list[Processor | None] = [None] * len(logits)
        emitted: list[Sequence[int]] = [()] * len(logits)
        for row, sequence in found.items():
            processors[row], emitted[row] = sequence.processor, sequence.emitted
        refused = process(logits, processors, emitted)
        self.errors |= {ids[row]: error for row, error in refused.items()}
        # vLLM takes the most likely token of the others.
        drawn = [(row, s) for row, s in found.items() if not (s.sampling.greedy and s.sampling.logprobs is None)]
        size = max(1, _TOKENS_AT_ONCE // logits.shape[1])
        for start in range(0, len(drawn), size):
            self._choose(logits, drawn[start : start + size])

    def finish(self, taken: Mapping[str, int]) -> None:
        """Completes the results. Waits for the device, so call it once vLLM has taken the step's tokens.

        Args:
            taken: the token that vLLM has taken for each request that has one.
        """
        for ids, tokens in self._tokens:
            self.chosen.update(zip(ids, tokens.tolist(), strict=True))
        self._tokens.clear()
        self.errors |= {id: non_finite() for id, token in self.chosen.items() if token < 0 and id not in self.errors}
        logits, self._logits = self._logits, None
        greedy = [(row, id) for row, id in enumerate(self._ids) if id in taken and id not in self.chosen]
        if logits is None or not greedy:
            return
        # The most likely token of a row with a NaN is a NaN's place. So a row is sound if its token's logit is.
        places = torch.tensor([[row for row, _ in greedy], [taken[id] for _, id in greedy]])
        rows, columns = upload(places, logits.device)
        sound = logits[rows, columns].isfinite().tolist()
        for (_, id), fine in zip(greedy, sound, strict=True):
            if not fine:
                self.errors.setdefault(id, non_finite())

    def error(self, id: str, token: int) -> Exception | None:
        """Why ``token``, which vLLM has taken for a request, is void; None if it is right."""
        if error := self.errors.get(id):
            return error
        if self.chosen.get(id, token) != token:
            return InternalError("vLLM took another token than was sampled")
        return None

    def clear(self) -> None:
        """Drops the step's results."""
        self.details.clear()
        self.errors.clear()
        self.chosen.clear()
        self._tokens.clear()
        self._logits = None

    def _choose(self, logits: torch.Tensor, rows: Sequence[tuple[int, Sampled]]) -> None:
        """Chooses the tokens of ``rows``, and makes each the greatest element of its row."""
        index = upload(torch.tensor([row for row, _ in rows]), logits.device)
        own = logits if len(rows) == len(logits) else logits[index]
        ids = [self._ids[row] for row, _ in rows]
        chosen = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)

        def choose_for(part: Sequence[tuple[int, Sampled]]) -> None:
            places = slice(None) if len(part) == len(rows) else [place for place, _ in part]
            chosen[places] = choose(
                own[places],
                [s.sampling for _, s in part],
                [s.sampled_position for _, s in part],
                [s.sample_index for _, s in part],
            )

        failed: dict[int, Exception] = {}
        row_by_row(choose_for, [(place, sequence) for place, (_, sequence) in enumerate(rows)], failed)
        self.errors |= {ids[place]: error for place, error in failed.items()}
        drawn = chosen.clamp(min=0)
        wanted = {place: s.sampling.logprobs for place, (_, s) in enumerate(rows) if s.sampling.logprobs is not None}
        for place, token in zip(wanted, logprobs(own, drawn, wanted), strict=True):
            self.details[ids[place]] = token
        logits[index, drawn] = torch.inf
        self._tokens.append((ids, chosen))

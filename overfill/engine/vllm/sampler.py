"""vLLM's logits processor: lets OverFill's own sampling choose the token of every row.

vLLM is asked for greedy sampling always. This processor sees the logits first, chooses by the request's parameters, and
leaves the chosen token as the greatest element of its row. So both engines draw the same tokens from the same logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

from overfill.engine.vllm.internals import REQUEST_ID, ROW_SPEC, hub
from overfill.engine.work import Sampled, plain_greedy
from overfill.model.processors import process, row_by_row
from overfill.model.sampling import sample
from overfill.model.steps import SampledToken


class OverfillSampler(LogitsProcessor):  # type: ignore[misc]
    """Keeps track of which request is in which row, and asks the engine to sample."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._ids: dict[int, str] = {}  # row -> request

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        ids = self._ids
        for row in batch_update.removed:
            ids.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            args = params.extra_args or {}
            ids[row] = args.get(REQUEST_ID, "")
            if hub.runner is not None:
                hub.runner.row_added(ids[row], args.get(ROW_SPEC), prompt, output)
        for source, target, direction in batch_update.moved:
            moved, replaced = ids.pop(source, None), ids.pop(target, None)
            if moved is not None:
                ids[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                ids[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if hub.runner is not None:
            hub.runner.sample(logits, [self._ids.get(row) for row in range(len(logits))])
        return logits


class StepSampler:
    """Samples the tokens of one step.

    Attributes:
        tokens: request -> its token.
        errors: request -> why it has none.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, SampledToken] = {}
        self.errors: dict[str, Exception] = {}

    def sample(
        self, logits: torch.Tensor, ids: Sequence[str | None], sampled: Mapping[str, tuple[Sampled, int]]
    ) -> None:
        """Samples for the rows whose requests are in ``sampled``, and makes each token the greatest of its row.

        Args:
            logits: [N, vocab] float32.
            ids: the request of each row.
            sampled: request -> its sequence, and the position of the token.
        """
        rows = [row for row, id in enumerate(ids) if id in sampled]
        if not rows:
            return
        own = logits if len(rows) == len(logits) else logits[rows]
        named = [id for row in rows if (id := ids[row]) is not None]
        how = [sampled[id][0] for id in named]
        tokens: dict[int, SampledToken] = {}
        failed: dict[int, Exception] = {}

        def choose(part: Sequence[tuple[int, str]]) -> None:
            places = [place for place, _ in part]
            chosen, wrong = sample(
                own if len(part) == len(own) else own[places],
                [how[place].sampling for place in places],
                [sampled[id][1] for _, id in part],
                [how[place].sample_index for place in places],
            )
            tokens.update(zip(places, chosen, strict=True))
            failed.update({places[row]: error for row, error in wrong.items()})

        refused = process(own, [s.processor for s in how], [s.emitted for s in how])
        row_by_row(choose, list(enumerate(named)), failed)
        failed |= refused  # a refusal explains the row better than the broken logits that it causes
        for place, id in enumerate(named):
            if place in failed:
                self.errors[id] = failed[place]
            else:
                self.tokens[id] = tokens[place]
        forced = [place for place, sequence in enumerate(how) if place in failed or not plain_greedy(sequence)]
        if forced:
            index = torch.tensor([rows[place] for place in forced], device=logits.device)
            chosen = [0 if place in failed else tokens[place].token_id for place in forced]
            logits[index] = -torch.inf
            logits[index, torch.tensor(chosen, device=logits.device)] = 0.0

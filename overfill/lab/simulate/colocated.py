"""The turns of a modelled worker with both stages: one loop runs a decode step or a prefill step, never both."""

from __future__ import annotations

from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.decode import SimDecode
from overfill.lab.simulate.prefill import SimPrefill
from overfill.lab.simulate.profiles import PrefillModel
from overfill.routing.tier import Objectives

MIN_CHUNK = 64
"""Least number of prompt tokens of a step between two decode steps."""


class SimTurns:
    """Lets the two stages of a worker take turns.

    Without sequences, prompts are computed in full steps. Without prompts, decode runs. With both, one decode step and
    a prefill step alternate, whose tokens fit into the time that the decode step leaves of the ITL objective. It has
    all tokens of a full step if the oldest prompt would miss the TTFT objective at that pace.
    """

    def __init__(
        self, clock: Clock, prefill: SimPrefill, decode: SimDecode, model: PrefillModel, objectives: Objectives
    ) -> None:
        self._clock, self._prefill, self._decode, self._model = clock, prefill, decode, model
        self._objectives = objectives
        self._prefill_was_last = False
        prefill.on_ready = decode.on_ready = self._advance

    def check(self) -> None:
        """Raises AssertionError if both stages run, or if none does although there is work."""
        prefill, decode = self._prefill, self._decode
        if prefill.stepping and decode.stepping:
            raise AssertionError("both stages run a step")
        if not (prefill.stepping or decode.stepping) and (decode.runnable or prefill.oldest is not None):
            raise AssertionError("no stage runs, although there is work")

    def _advance(self) -> None:
        prefill, decode = self._prefill, self._decode
        if prefill.stepping:
            return
        if decode.stepping:
            if prefill.admit():
                decode.end_soon()
            return
        waiting = prefill.admit()
        if not (waiting and decode.runnable) or self._prefill_was_last:
            self._prefill_was_last = False
            decode.begin_phase(1 if waiting else None)
        if waiting and not decode.stepping:
            self._prefill_was_last = True
            prefill.begin_step(self._max_tokens() if decode.runnable else None)

    def _max_tokens(self) -> int | None:
        """Returns the most tokens of a prefill step between two decode steps; None means a full step."""
        oldest, step = self._prefill.oldest, self._decode.step_seconds
        rate = self._prefill.rate or 1 / self._model.seconds_per_token
        tokens = min(self._model.max_num_batched_tokens, max(MIN_CHUNK, int((self._objectives.itl - step) * rate)))
        assert oldest is not None
        first_token = self._clock.now + oldest.left / tokens * (step + tokens / rate)
        return tokens if first_token <= oldest.submitted + self._objectives.ttft else None

"""A modelled worker with both stages: one loop runs a decode step or a prefill step, never both."""

from __future__ import annotations

from overfill.engine.turns import Turns
from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.decode import SimDecode
from overfill.lab.simulate.prefill import SimPrefill


class SimTurns:
    """Lets the two stages of a modelled worker take turns, as ``ColocatedEngine`` does."""

    def __init__(self, clock: Clock, prefill: SimPrefill, decode: SimDecode, turns: Turns) -> None:
        self._clock, self._prefill, self._decode, self._turns = clock, prefill, decode, turns
        prefill.on_step, decode.on_step = turns.prefilled, turns.decoded
        prefill.on_ready = decode.on_ready = self._advance

    def check(self) -> None:
        """Raises AssertionError if both stages run, or if none does although there is work."""
        prefill, decode = self._prefill, self._decode
        if prefill.stepping and decode.stepping:
            raise AssertionError("both stages run a step")
        if not (prefill.stepping or decode.stepping) and (decode.runnable or prefill.running):
            raise AssertionError("no stage runs, although there is work")

    def _advance(self) -> None:
        if self._prefill.stepping:
            return
        if self._decode.stepping:
            if self._prefill.admit() is not None:
                self._decode.end_soon()
        elif self._turns.decode_first:
            self._step_decode() or self._step_prefill()
        else:
            self._step_prefill() or self._step_decode()

    def _step_decode(self) -> bool:
        self._decode.begin_phase(None if self._prefill.admit() is None else 1)
        return self._decode.stepping

    def _step_prefill(self) -> bool:
        oldest = self._prefill.admit()
        if oldest is None:
            return False
        waited = self._clock.now - oldest.submitted
        chunk = self._turns.chunk(self._decode.runnable, oldest.left, waited, alone=len(self._prefill.running) == 1)
        self._prefill.begin_step(chunk)
        return True

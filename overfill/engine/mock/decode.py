"""The decode engine of a mock: a step waits before it is computed, and messages are taken while it waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from overfill.engine.decode import DecodeEngine
from overfill.engine.mock.runner import MockRunner
from overfill.engine.sequence import DecodeSequence


class MockDecodeEngine(DecodeEngine):
    """``DecodeEngine`` whose steps take the time that the mock's options say."""

    def __init__(self, runner: MockRunner, *args: Any, **options: Any) -> None:
        super().__init__(runner, *args, **options)
        self._mock = runner
        self._began_ns = 0  # the step that waits now, or the latest one

    @property
    def delay(self) -> float:
        """Seconds until the next step is due."""
        running = self.num_running
        return max(0.0, self._began_ns / 1e9 + self._mock.step_seconds(running) - time.monotonic()) if running else 0.0

    def handle(self, message: Any) -> None:
        idle = not self.num_running
        super().handle(message)
        if idle:
            self._began_ns = time.monotonic_ns()

    def step(self) -> bool:
        """Computes a step that is due. Returns False when nothing runs, or when the step still waits."""
        if self.delay > 0:
            return False
        computed = super().step()
        self._began_ns = time.monotonic_ns()
        return computed

    def _append(self, sequence: DecodeSequence, start: int, tokens: Sequence[int]) -> None:
        self._mock.cache.put(sequence.blocks, tokens, start)  # no step writes an answer's KV
        super()._append(sequence, start, tokens)

    def _count_step(self, started_ns: int, sequences: int, tokens: int, replayed: int) -> None:
        super()._count_step(self._began_ns, sequences, tokens, replayed)

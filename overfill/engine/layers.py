"""Tells which layers of a prefill step's prompts are written, as soon as that is worth a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from overfill.engine.device import record_event
from overfill.engine.protocol import MIN_NOTIFY_BYTES
from overfill.engine.sequence import KvWritten

if TYPE_CHECKING:
    import torch


class LayerReports:
    """The layers of one step. An event covers all layers since the last one, so that small prompts cost one per step.

    Args:
        ends: for each prompt, its id, its number of tokens in the step, and the position after them.
        token_layer_bytes: bytes of one token's keys and values in one layer.
    """

    def __init__(
        self, ends: Sequence[tuple[str, int, int]], token_layer_bytes: int, device: torch.device | None
    ) -> None:
        self._device = device
        self._reported = [0] * len(ends)  # layers
        self._ends = ends
        self._enough = [-(-MIN_NOTIFY_BYTES // max(1, count * token_layer_bytes)) for _, count, _ in ends]  # layers
        self.num_written = 0

    def written(self) -> list[KvWritten]:
        """Notes that another layer is written. Returns what is worth a message."""
        self.num_written += 1
        return self._report(
            [
                place
                for place, (enough, reported) in enumerate(zip(self._enough, self._reported, strict=True))
                if self.num_written - reported >= enough
            ]
        )

    def rest(self, num_layers: int) -> list[KvWritten]:
        """What is left of a step that has written all layers."""
        self.num_written = num_layers
        return self._report([place for place, reported in enumerate(self._reported) if reported < num_layers])

    def _report(self, places: Sequence[int]) -> list[KvWritten]:
        if not places:
            return []
        event, events = record_event(self._device), []
        for place in places:
            id, _, end = self._ends[place]
            events.append(KvWritten(id, range(self._reported[place], self.num_written), end, event))
            self._reported[place] = self.num_written
        return events

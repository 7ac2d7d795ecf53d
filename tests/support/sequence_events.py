"""A decode engine's events, each of one sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from overfill.engine.sequence import DecodeEvent, SequenceEvent, StepSampled


def by_sequence(events: Iterable[DecodeEvent]) -> Iterator[SequenceEvent]:
    """The events, with a step's tokens one by one."""
    for event in events:
        if isinstance(event, StepSampled):
            yield from event.by_sequence()
        else:
            yield event

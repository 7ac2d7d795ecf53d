"""Tell how long judging takes before it starts, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from overfill.making.conversations import Transcript
from overfill.telemetry.progress import Report

Work = Callable[[Transcript], float]
"""Work that a transcript makes, in any unit."""

READ, JUDGED, WRITTEN = 1.0, 2.0, 6.0
"""Work per token: to read one, to compare the distributions of one with the full model's, and to write one.

Measured with a model of 135 M parameters; writing many answers together takes less, few answers more.
"""


def announce(
    transcripts: Sequence[Transcript],
    probe: Callable[[Sequence[Transcript]], object],
    probed: Work,
    parts: Sequence[Work],
    report: Report,
) -> Callable[[], None]:
    """Reports a step with the expected minutes in its name. Returns a function to call at the end of each part.

    Args:
        probe: Judges some transcripts. It is timed with the first one, whose work is ``probed``.
        parts: Work of each part.
    """
    totals = [sum(map(work, transcripts)) for work in parts]
    started = time.monotonic()
    probe(transcripts[:1])
    seconds = (time.monotonic() - started) * sum(totals) / probed(transcripts[0])
    step = f"Judging {len(transcripts)} conversations, about {max(1, round(seconds / 60))} min"
    ended = 0

    def end_part() -> None:
        nonlocal ended
        ended += 1
        report(step, round(100 * sum(totals[:ended]) / sum(totals)), 100)

    report(step, 0, 100)
    return end_part

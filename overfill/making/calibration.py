"""Get calibration text: shipped, generated, from a file, or from a data set on the hub."""

from __future__ import annotations

from pathlib import Path

from overfill.errors import InvalidRequest
from overfill.making.conversations import Conversation, read_conversations, shipped_conversations
from overfill.making.hub_data import hub_conversations, is_dataset
from overfill.telemetry.progress import Report, silent

_ANSWER_TOKENS = 150  # typical length of a generated answer


def calibration_text(source: str, full: Path, tokens: int, report: Report = silent) -> list[Conversation]:
    """Returns conversations for scoring and fitting decoders of the checkpoint in ``full``.

    Args:
        source: ``shipped``, ``self`` (``full`` generates them), a file of JSON lines, or the id of a hub data set.
        tokens: Approximate number of answer tokens to return.

    Raises:
        InvalidRequest: ``source`` has another form or cannot be read.
        InvalidPair: ``full`` writes almost nothing usable.
    """
    if source == "shipped":
        return shipped_conversations("calibration")
    count = max(32, tokens // _ANSWER_TOKENS)
    if source == "self":
        from overfill.making.synthetic_data import SELF_SEED, generate_conversations

        return list(generate_conversations(full, count, seed=SELF_SEED, report=report))
    if Path(source).exists():
        return read_conversations(Path(source))
    if not is_dataset(source):
        reason = f"{source} is neither `shipped`, nor `self`, nor a file, nor the id of a hub data set"
        raise InvalidRequest("calibration", reason)
    return hub_conversations(source, count)

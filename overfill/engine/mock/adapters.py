"""Slots for adapters without weights: an adapter's answers begin with its name and the beginning of its digest."""

from __future__ import annotations

from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest
from overfill.model.adapter import AdapterRecord, LoraAdapter


def adapter_mark(record: AdapterRecord) -> str:
    """Returns the text with which each answer of the adapter begins."""
    return f"[{record.name} {record.digest[:8]}] "


class MockAdapterSlots:
    """The slots of a mock decoder; see ``AdapterSlots``. They read an adapter's record and no weights.

    Attributes:
        marks: the tokens of each slot's ``adapter_mark``.
    """

    slot_bytes = 0

    def __init__(self, tokenizer: Tokenizer, num_slots: int, max_rank: int) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.marks: dict[int, list[int]] = {}
        self._tokenizer = tokenizer

    def stage(self, slot: int, adapter: LoraAdapter) -> None:
        """Keeps the adapter's mark. Raises InvalidRequest if its rank exceeds the slots'."""
        record = adapter.record
        if record.rank > self.max_rank:
            reason = f"{record.name!r} has rank {record.rank}, more than this worker's --max-adapter-rank"
            raise InvalidRequest("adapter", f"{reason} {self.max_rank}")
        self.marks[slot] = self._tokenizer.encode_continuation(adapter_mark(record))

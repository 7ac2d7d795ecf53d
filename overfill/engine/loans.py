"""Loans of cached blocks to other workers: references, without a sequence, a queue or an allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overfill.engine.device import record_event
from overfill.engine.sequence import Lend, Lent
from overfill.kv.prefix import PrefixCache

if TYPE_CHECKING:
    import torch


KEPT_SHARE = 4
"""Loans to peers leave one block in this many to sequences, so that borrowers cannot stop a worker with few blocks."""


class Loans:
    """The loans of one engine. Lent blocks are in use: they are neither evicted nor given to a sequence.

    Attributes:
        ids: the loans that have not ended. Each owns its references in ``prefix``.
    """

    def __init__(self, prefix: PrefixCache, device: torch.device | None) -> None:
        self.ids: set[str] = set()
        self._prefix = prefix
        self._device = device

    def lend(self, message: Lend, *, awaited: bool, spare: int = 0) -> Lent:
        """Begins a loan, which lasts until ``end``.

        Args:
            awaited: whether a sequence waits for blocks. Then peers get nothing, not even what other loans have, so
                that the sequence gets its blocks when the present loans have ended.
            spare: available blocks that live sequences will need.
        """
        prompt = self._prefix.blocks_of(()) if awaited and message.to_peer else message.prompt
        kept = max(spare, message.to_peer * self._prefix.pool.num_blocks // KEPT_SHARE)
        loan = self._prefix.lend(message.id, prompt, spare=kept)
        self.ids.add(message.id)
        # Earlier steps, which compute these blocks, may still be running on the device.
        event = record_event(self._device) if loan.blocks else None
        return Lent(message.id, loan.blocks, loan.cached_tokens, event)

    def end(self, id: str) -> bool:
        """Ends a loan. Returns False if ``id`` is none."""
        if id not in self.ids:
            return False
        self.ids.remove(id)
        self._prefix.release(id)
        return True

"""The input of one forward pass: new tokens of several sequences, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def token_adapters(slots: Sequence[int | None], query_lens: Sequence[int]) -> torch.Tensor | None:
    """Returns ``ForwardBatch.adapters`` of sequences with these slots and numbers of new tokens."""
    if all(slot is None for slot in slots):
        return None
    own = torch.tensor([-1 if slot is None else slot for slot in slots])
    return own.repeat_interleave(torch.tensor(query_lens))


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """New tokens of ``S`` sequences, ``T`` in total, in sequence order.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, absolute positions, for RoPE.
        slots: [T] int64, slots of the KV cache to which the pass writes each token's keys and values.
        query_lens: new tokens per sequence, on the host; all 1 in a decode step.
        context_lens: tokens per sequence after this pass (cached + new), on the host.
        block_tables: [rows, max_blocks] int64. A row covers its sequence's context; later entries are meaningless.
        context_lens_device: [S] int64, ``context_lens`` on the device.
        logits_indices: [N] int64, indices of the T tokens whose logits the pass returns.
        table_rows: [S] int64, each sequence's row of ``block_tables``. None means that sequence i has row i.
        adapters: [T] int64 on the host, slot of each token's adapter, or -1. None means that no token has one.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]
    block_tables: torch.Tensor
    context_lens_device: torch.Tensor
    logits_indices: torch.Tensor
    table_rows: torch.Tensor | None = None
    adapters: torch.Tensor | None = None

    def tables(self, width: int) -> torch.Tensor:
        """The first ``width`` blocks of each sequence's row. [S, width]"""
        cut = self.block_tables[:, :width]
        return cut if self.table_rows is None else cut.index_select(0, self.table_rows)

    @property
    def is_decode(self) -> bool:
        """True if every sequence has exactly one new token."""
        return all(n == 1 for n in self.query_lens)

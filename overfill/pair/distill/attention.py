"""Differentiable attention over packed rows: each transcript attends to its prefix and, causally, to itself.

Transcript by transcript on a CPU, where that wastes nothing; as one padded batch elsewhere, where many small
launches would cost more than the padding. What does not change from layer to layer is worked out once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from overfill.pair.distill.rows import Rows


class Attention(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor | None) -> Tensor:
        """
        Args:
            q: [T, heads, D], rotated.
            k, v: [T, kv_heads, D] of the same rows.
            prefix: [2, sum of prefixes, kv_heads, D], keys and values before the rows; None when there are none.

        Returns:
            [T, heads * D]
        """


def plan_attention(rows: Rows) -> Attention:
    """The form that suits the device that ``rows`` are on."""
    return PerTranscript.of(rows) if rows.token_ids.device.type == "cpu" else Padded.of(rows)


def _visible(new: int, prefix: int, device: torch.device) -> Tensor:
    """Which of ``prefix + new`` tokens each of the ``new`` ones sees. [new, prefix + new] bool"""
    return torch.ones(new, prefix + new, dtype=torch.bool, device=device).tril(prefix)


@dataclass(frozen=True, slots=True)
class PerTranscript:
    """One call per transcript, without padding."""

    lengths: list[int]
    prefixes: list[int]
    masks: list[Tensor | None]  # None: causal

    @classmethod
    def of(cls, rows: Rows) -> PerTranscript:
        device = rows.token_ids.device
        pairs = zip(rows.lengths, rows.prefixes, strict=True)
        masks = [_visible(new, prefix, device) if prefix else None for new, prefix in pairs]
        return cls(list(rows.lengths), list(rows.prefixes), masks)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor | None) -> Tensor:
        # split, not slices: the gradient of n slices would be n tensors of all rows.
        keys, values = list(k.split(self.lengths)), list(v.split(self.lengths))
        if prefix is not None:
            keys = [torch.cat(parts) for parts in zip(prefix[0].split(self.prefixes), keys, strict=True)]
            values = [torch.cat(parts) for parts in zip(prefix[1].split(self.prefixes), values, strict=True)]
        outputs = [
            scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for query, key, value, mask in zip(q.split(self.lengths), keys, values, self.masks, strict=True)
        ]
        return torch.cat(outputs).flatten(1)


@dataclass(frozen=True, slots=True)
class Padded:
    """One call for all transcripts, padded to the longest.

    The query heads that share a KV head become rows of one product, so that every kernel takes it.
    """

    query_slots: Tensor  # [T] int64, of the [S * A] padded rows
    key_slots: Tensor  # [sum of prefixes + T] int64, of the [S * L] padded keys; the prefixes' first
    mask: Tensor  # [S, 1, A, L] bool
    num: int

    @classmethod
    def of(cls, rows: Rows) -> Padded:
        device = rows.token_ids.device
        num, longest = len(rows.lengths), max(rows.lengths)
        context = max(n + p for n, p in zip(rows.lengths, rows.prefixes, strict=True))
        mask = torch.zeros(num, 1, longest, context, dtype=torch.bool)
        mask[..., 0] = True  # padding must see something: a softmax over nothing is NaN
        queries, own, prefixes = [], [], []
        for i, (new, prefix) in enumerate(zip(rows.lengths, rows.prefixes, strict=True)):
            mask[i, 0, :new, : prefix + new] = _visible(new, prefix, mask.device)
            queries.append(torch.arange(new) + i * longest)
            prefixes.append(torch.arange(prefix) + i * context)
            own.append(torch.arange(prefix, prefix + new) + i * context)
        slots = torch.cat(prefixes + own)
        return cls(torch.cat(queries).to(device), slots.to(device), mask.to(device), num)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor | None) -> Tensor:
        longest, context = self.mask.shape[2:]
        kv_heads, head_dim = k.shape[1:]
        group = q.shape[1] // kv_heads
        queries = self._pad(q, self.query_slots, longest).view(self.num, longest, kv_heads, group, head_dim)
        keys, values = (
            self._pad(x if prefix is None else torch.cat([prefix[i], x]), self.key_slots, context).transpose(1, 2)
            for i, x in enumerate((k, v))
        )
        out = scaled_dot_product_attention(
            queries.permute(0, 2, 3, 1, 4).reshape(self.num, kv_heads, group * longest, head_dim),
            keys,
            values,
            attn_mask=self.mask.repeat(1, 1, group, 1),
        )
        out = out.view(self.num, kv_heads, group, longest, head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(self.num * longest, -1)[self.query_slots]

    def _pad(self, x: Tensor, slots: Tensor, length: int) -> Tensor:
        """[rows, heads, D] -> [S, length, heads, D], zero where there is nothing."""
        padded = x.new_zeros(self.num * length, *x.shape[1:]).index_copy(0, slots, x)
        return padded.view(self.num, length, *x.shape[1:])

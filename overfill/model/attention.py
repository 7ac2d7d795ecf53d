"""Grouped-query attention over the paged KV cache: one form for decode steps, one for all other steps.

``plan_attention`` computes once per step what all layers share: slots to read, and masks. The step then calls the
plan for every layer, once the new tokens' keys and values are in the cache. Both forms use
``scaled_dot_product_attention`` (softmax in float32), and neither waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from overfill.kv.cache import KvCache
from overfill.model.batch import ForwardBatch


class AttentionPlan(Protocol):
    """Attention of one step, ready for every layer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attends in one layer.

        Args:
            q: [T, num_heads, D], rotated.
            k, v: [T, num_kv_heads, D], keys and values of the new tokens; the cache holds them too.
            layer: index of the cache's layer.

        Returns:
            [T, num_heads * D] in ``q``'s dtype.
        """


def plan_attention(batch: ForwardBatch, cache: KvCache) -> AttentionPlan:
    """Makes the plan of a step, in the form that fits ``batch``."""
    return _Decode.of(batch, cache) if batch.is_decode else _Varlen.of(batch, cache)


@dataclass(frozen=True, slots=True)
class _Decode:
    """Plan of a decode step, with one new token per sequence.

    It gathers all contexts into one padded batch. The query heads that share a KV head are the rows of one product.
    """

    cache: KvCache
    slots: Tensor  # [S * L] int64
    mask: Tensor  # [S, 1, 1, L] bool, true for positions of the context
    k: Tensor  # [S * L, num_kv_heads, D]: scratch for the gathered context, which all layers reuse,
    v: Tensor  # because fresh memory of this size can cost more than the gather

    @classmethod
    def of(cls, batch: ForwardBatch, cache: KvCache) -> _Decode:
        block_size = cache.block_size
        positions = torch.arange(max(batch.context_lens), device=batch.block_tables.device)
        mask = positions < batch.context_lens_device.unsqueeze(1)  # [S, L]
        # Padding reads the sequence's own first token, because a zero weight does not stop another sequence's NaN.
        positions = torch.where(mask, positions, 0)
        tables = batch.tables(-(-max(batch.context_lens) // block_size))
        blocks = tables.gather(1, positions // block_size)
        slots = (blocks * block_size + positions % block_size).flatten()
        return cls(cache, slots, mask[:, None, None, :], cache.new_scratch(len(slots)), cache.new_scratch(len(slots)))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        num_seqs, _, head_dim = q.shape
        num_kv_heads = k.shape[1]
        context = (num_seqs, -1, num_kv_heads, head_dim)  # transposed below to [S, kv_heads, L, D]
        keys, values = self.cache.gather(layer, self.slots, (self.k, self.v))
        out = scaled_dot_product_attention(
            q.reshape(num_seqs, num_kv_heads, -1, head_dim),  # [S, kv_heads, group, D]
            keys.view(context).transpose(1, 2),
            values.view(context).transpose(1, 2),
            attn_mask=self.mask,
        )
        return out.reshape(num_seqs, -1)


@dataclass(frozen=True, slots=True)
class _Segment:
    """New tokens of one sequence, and the context that they attend to.

    Attributes:
        rows: the new tokens' rows in the batch.
        slots: [context] int64, slots to gather. None means that the new tokens are the whole context, and that the
            cache would return the same values.
        mask: [new, context] bool. None means a single new token, or a context of new tokens only.
        causal: True if all of the context is new.
    """

    rows: slice
    slots: Tensor | None
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class _Varlen:
    """Plan of a step with any number of new tokens per sequence, computed one sequence at a time without padding."""

    cache: KvCache
    segments: list[_Segment]

    @classmethod
    def of(cls, batch: ForwardBatch, cache: KvCache) -> _Varlen:
        segments, block_size = [], cache.block_size
        start = 0
        tables = batch.tables(-(-max(batch.context_lens) // block_size))
        for table, new, context in zip(tables, batch.query_lens, batch.context_lens, strict=True):
            slots = mask = None
            if new < context or not cache.lossless:
                positions = torch.arange(context, device=table.device)
                slots = table[positions // block_size] * block_size + positions % block_size
                if 1 < new < context:
                    mask = positions <= positions[context - new :].unsqueeze(1)
            segments.append(_Segment(slice(start, start + new), slots, mask, new == context))
            start += new
        return cls(cache, segments)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        num_tokens, num_heads, head_dim = q.shape
        out = q.new_empty(num_tokens, num_heads * head_dim)
        for segment in self.segments:
            rows, slots = segment.rows, segment.slots
            keys, values = (k[rows], v[rows]) if slots is None else self.cache.gather(layer, slots)
            out[rows] = attend(q[rows], keys, values, segment.mask, segment.causal)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attends for one sequence. q: [new, heads, D]; k, v: [context, kv_heads, D]; returns [new, heads * D]."""
    new, _, head_dim = q.shape
    context, num_kv_heads, _ = k.shape
    grouped = q.reshape(new, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [kv_heads, group, new, D]
    shared = (num_kv_heads, grouped.shape[1], context, head_dim)
    out = scaled_dot_product_attention(
        grouped,
        k.transpose(0, 1).unsqueeze(1).expand(shared),  # a view: the heads of a group read the same memory
        v.transpose(0, 1).unsqueeze(1).expand(shared),
        attn_mask=mask,
        is_causal=is_causal,
    )
    return out.permute(2, 0, 1, 3).reshape(new, -1)

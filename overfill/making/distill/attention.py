"""Computes differentiable attention over packed rows: each transcript attends to its prefix and, causally, to itself.

On a CPU, attention runs transcript by transcript, without padding. Elsewhere it runs as one padded batch, because many
small launches would cost more than the padding. Masks and indices are computed once for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from overfill.making.distill.packed_rows import PackedRows

_MAX_SAVED_CONTEXT = 512
"""Longest context, in tokens, whose attention probabilities training saves: 4 MiB a layer for 9 heads in bfloat16."""


class Attention(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor | None) -> Tensor:
        """Computes attention of packed rows.

        Args:
            q: [T, heads, D], rotated.
            k, v: [T, kv_heads, D]; keys and values of the same rows.
            prefix: [2, sum of prefixes, kv_heads, D]; keys and values before the rows. None means no prefixes.

        Returns:
            [T, heads * D]
        """


def attention_for(rows: PackedRows) -> Attention:
    """Returns the faster implementation for the device of ``rows``."""
    return PerTranscript.of(rows) if rows.token_ids.device.type == "cpu" else Padded.of(rows)


def _visible(new: int, prefix: int, device: torch.device) -> Tensor:
    """Returns the causal mask of ``new`` tokens after a prefix. [new, prefix + new] bool"""
    return torch.ones(new, prefix + new, dtype=torch.bool, device=device).tril(prefix)


@dataclass(frozen=True, slots=True)
class PerTranscript:
    """Attention transcript by transcript, without padding.

    For short transcripts, training saves the probabilities for the backward pass. That takes two thirds of the time of
    torch's fused kernel, which recomputes them. Longer transcripts use the fused kernel, because the memory for
    probabilities grows with the square of the length.
    """

    lengths: list[int]
    prefixes: list[int]
    visible: list[Tensor]

    @classmethod
    def of(cls, rows: PackedRows) -> PerTranscript:
        device = rows.token_ids.device
        visible = [_visible(*sizes, device) for sizes in zip(rows.lengths, rows.prefixes, strict=True)]
        return cls(list(rows.lengths), list(rows.prefixes), visible)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and max(mask.shape[1] for mask in self.visible) <= _MAX_SAVED_CONTEXT:
            out: Tensor = _SavedProbabilityAttention.apply(q, k, v, prefix, self)  # type: ignore[no-untyped-call]
            return out
        outputs = [
            scaled_dot_product_attention(
                query[None],
                key[None],
                value[None],
                attn_mask=None if prefix is None else visible,
                is_causal=prefix is None,
                enable_gqa=True,
            )[0]
            for query, (key, value), visible in zip(
                q.transpose(0, 1).split(self.lengths, 1), self.contexts(k, v, prefix), self.visible, strict=True
            )
        ]
        return torch.cat(outputs, 1).transpose(0, 1).flatten(1)

    def contexts(self, k: Tensor, v: Tensor, prefix: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the keys and values that each transcript sees, each [kv_heads, context, D]."""
        own = zip(*(x.transpose(0, 1).split(self.lengths, 1) for x in (k, v)), strict=True)
        if prefix is None:
            yield from own
            return
        before = zip(*(x.split(self.prefixes, 1) for x in prefix.transpose(1, 2).unbind()), strict=True)
        for (key, value), (earlier_key, earlier_value) in zip(own, before, strict=True):
            yield torch.cat([earlier_key, key], 1), torch.cat([earlier_value, value], 1)


class _SavedProbabilityAttention(torch.autograd.Function):
    """Attention that saves probabilities; the query heads of a KV head are rows of one product."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor | None, plan: PerTranscript) -> Tensor:
        kv_heads, head_dim = k.shape[1:]
        ctx.plan, ctx.scale = plan, head_dim**-0.5
        queries = _grouped(q * ctx.scale, kv_heads)
        out = torch.empty_like(queries)
        kept = []
        places = zip(queries.split(plan.lengths, 2), out.split(plan.lengths, 2), plan.visible, strict=True)
        for (query, place, visible), (key, value) in zip(places, plan.contexts(k, v, prefix), strict=True):
            scores = query.flatten(1, 2) @ key.transpose(1, 2)
            scores.view(kv_heads, -1, *visible.shape).masked_fill_(~visible, float("-inf"))
            probabilities = scores.softmax(-1)
            place.copy_((probabilities @ value).view_as(place))
            kept += [probabilities, query, key, value]
        ctx.save_for_backward(*kept)
        result: Tensor = _ungrouped(out).flatten(1)
        return result

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        pieces = list(zip(saved, saved, saved, saved, strict=True))
        kv_heads, _, head_dim = pieces[0][2].shape
        grads = _grouped(out_grad.unflatten(1, (-1, head_dim)), kv_heads)
        q_grad, k_grads, v_grads = torch.empty_like(grads), [], []
        splits = zip(pieces, grads.split(ctx.plan.lengths, 2), q_grad.split(ctx.plan.lengths, 2), strict=True)
        for (probabilities, query, key, value), grad, place in splits:
            new = query.shape[2]
            rows = grad.flatten(1, 2)
            v_grads.append((probabilities.transpose(1, 2) @ rows)[:, -new:])
            scores_grad = torch._softmax_backward_data(
                rows @ value.transpose(1, 2), probabilities, -1, probabilities.dtype
            )
            k_grads.append((scores_grad.transpose(1, 2) @ query.flatten(1, 2))[:, -new:])
            place.copy_((scores_grad @ key).view_as(place))
        k_grad, v_grad = (torch.cat(parts, 1).transpose(0, 1) for parts in (k_grads, v_grads))
        return _ungrouped(q_grad) * ctx.scale, k_grad, v_grad, None, None


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Groups query heads by KV head. [T, heads, D] -> [kv_heads, heads of each, T, D]"""
    grouped: Tensor = x.unflatten(1, (kv_heads, -1))
    return grouped.permute(1, 2, 0, 3).contiguous()


def _ungrouped(x: Tensor) -> Tensor:
    """Inverts ``_grouped``. [kv_heads, heads of each, T, D] -> [T, heads, D]"""
    return x.flatten(0, 1).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Padded:
    """Attention in one call for all transcripts, padded to the longest.

    The query heads that share a KV head become rows of one product, a form that every kernel accepts.
    """

    query_slots: Tensor  # [T] int64, indices into the [S * A] padded rows
    key_slots: Tensor  # [sum of prefixes + T] int64, indices into the [S * L] padded keys, prefixes first
    mask: Tensor  # [S, 1, A, L] bool
    num: int  # S, the number of transcripts

    @classmethod
    def of(cls, rows: PackedRows) -> Padded:
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
        """Pads with zeros. [rows, heads, D] -> [S, length, heads, D]"""
        padded = x.new_zeros(self.num * length, *x.shape[1:]).index_copy(0, slots, x)
        return padded.view(self.num, length, *x.shape[1:])

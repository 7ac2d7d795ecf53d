"""Computes one layer at a time over packed transcripts, in plain float32 torch.

Scoring and fitting run each layer over all transcripts before the next layer. The engine's forward pass cannot do that,
because it runs one batch through all layers. The tokens of all transcripts lie end to end; a row is a token. There is
no padding, because attention runs transcript by transcript.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from overfill.making.conversations import Transcript
from overfill.model.attention import attend
from overfill.model.config import ModelConfig
from overfill.model.loading import LayerWeights, Weights
from overfill.model.rope import apply_rope, rope_tables

ROWS_AT_ONCE = 3072  # large enough for fast matrix products, small enough for the activations of one MLP


@dataclass(frozen=True, slots=True)
class TranscriptSpan:
    """The rows of one transcript: ``start..answer`` are its prompt, ``answer..end`` its answer.

    ``answer_start`` is the index of its first answer row among the answer rows of all transcripts.
    """

    start: int
    answer: int
    end: int
    answer_start: int

    @property
    def answer_end(self) -> int:
        return self.answer_start + self.end - self.answer


@dataclass(frozen=True, slots=True)
class PackedPart:
    """A group of whole transcripts that are computed together.

    Attributes:
        rows: Slice of these transcripts within all rows.
        answer_rows: Slice of their answers within the answer rows of all transcripts.
        answers: [answer rows] int64; indices of the answer rows within ``rows``.
    """

    spans: tuple[TranscriptSpan, ...]
    rows: slice
    answer_rows: slice
    answers: Tensor


@dataclass(frozen=True, slots=True)
class PackedTranscripts:
    """The tokens of all transcripts, end to end, divided into parts that fit memory.

    Attributes:
        token_ids, positions: [rows] int64.
        answers: [answer rows] int64; indices of the rows that belong to answers.
    """

    token_ids: Tensor
    positions: Tensor
    answers: Tensor
    parts: tuple[PackedPart, ...]

    @classmethod
    def of(cls, transcripts: Sequence[Transcript], rows_at_once: int = ROWS_AT_ONCE) -> PackedTranscripts:
        spans = []
        start = answer_start = 0
        for transcript in transcripts:
            length = len(transcript.token_ids)
            spans.append(TranscriptSpan(start, start + transcript.answer_start, start + length, answer_start))
            start, answer_start = start + length, spans[-1].answer_end
        return cls(
            token_ids=torch.tensor([token for t in transcripts for token in t.token_ids]),
            positions=torch.cat([torch.arange(len(t.token_ids)) for t in transcripts]),
            answers=torch.cat([torch.arange(s.answer, s.end) for s in spans]),
            parts=tuple(_parts(spans, rows_at_once)),
        )


def _parts(spans: Sequence[TranscriptSpan], rows_at_once: int) -> Iterator[PackedPart]:
    first = 0
    for index, span in enumerate(spans):
        if index + 1 == len(spans) or spans[index + 1].end - spans[first].start > rows_at_once:
            chosen = tuple(spans[first : index + 1])
            begin = chosen[0].start
            yield PackedPart(
                chosen,
                rows=slice(begin, span.end),
                answer_rows=slice(chosen[0].answer_start, span.answer_end),
                answers=torch.cat([torch.arange(s.answer - begin, s.end - begin) for s in chosen]),
            )
            first = index + 1


class LayerMath:
    """Arithmetic of one Llama-family layer over packed rows; expects weights from ``fold_norms``."""

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        self.config = config
        self._cos, self._sin = rope_tables(config.rope, config.head_dim, max_positions, torch.device("cpu"))

    def norm(self, x: Tensor) -> Tensor:
        """Applies RMSNorm without a gain. [rows, hidden]"""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)

    def project(self, layer: LayerWeights, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes rotated q [rows, heads, D] and k [rows, kv_heads, D], and v [rows, kv_heads, D]."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = linear(normed, layer.qkv, layer.qkv_bias).view(len(normed), heads + 2 * kv_heads, self.config.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self.norm(qk[:, :heads]) * layer.q_norm, self.norm(qk[:, heads:]) * layer.k_norm
            qk = torch.cat([q, k], dim=1)
        qk = apply_rope(qk, self._cos[positions], self._sin[positions])
        return qk[:, :heads], qk[:, heads:], v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes causal attention for the last ``len(q)`` tokens of one transcript. [rows, heads * D]"""
        new, context = len(q), len(k)
        mask = None if new == context else torch.ones(new, context, dtype=torch.bool).tril(context - new)
        return attend(q, k, v, mask, is_causal=mask is None)

    def neurons(self, layer: LayerWeights, normed: Tensor) -> Tensor:
        """Computes the MLP's activations, the inputs of the down projection. [rows, intermediate]"""
        gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return silu(gate) * up


def fold_norms(weights: Weights) -> Weights:
    """Multiplies every RMSNorm's gain into the projections that read it. The model's function stays the same.

    Changes ``weights`` in place, because a copy would double the memory. Only a head that is tied to the embedding
    becomes a copy, since the embedding must not change.
    """
    for layer in weights.layers:
        layer.qkv.mul_(layer.input_norm)
        layer.gate_up.mul_(layer.post_norm)
        layer.input_norm.fill_(1)
        layer.post_norm.fill_(1)
    tied = weights.head is weights.embedding
    head = weights.head * weights.norm if tied else weights.head.mul_(weights.norm)
    weights.norm.fill_(1)
    return replace(weights, head=head)


@dataclass(frozen=True, slots=True)
class FullLayer:
    """Activations of one full-model layer for one ``PackedPart``, a run of transcripts that fits memory.

    Attributes:
        keys, values: [rows, kv_heads, D]; keys are rotated.
        normed: [rows, hidden]; input of the projections before attention.
        middle: [rows, hidden]; the residual stream after attention.
        middle_normed: [rows, hidden]; input of the MLP.
        neurons: [rows, intermediate].
        out: [rows, hidden]; the residual stream after the MLP.
    """

    keys: Tensor
    values: Tensor
    normed: Tensor
    middle: Tensor
    middle_normed: Tensor
    neurons: Tensor
    out: Tensor


PromptKv = list[tuple[Tensor, Tensor]]
"""Keys and values that one full-model layer computed for each prompt, [prompt rows, kv_heads, D]."""


def run_full_layer(
    math: LayerMath, layer: LayerWeights, packed: PackedTranscripts, part: PackedPart, x: Tensor
) -> FullLayer:
    """Runs a full-model layer over the prompts and answers of ``part``; ``x`` is [rows of the part, hidden]."""
    normed = math.norm(x)
    attended, k, v = attend_part(math, layer, packed, part, normed)
    middle = x + attended
    middle_normed = math.norm(middle)
    neurons = math.neurons(layer, middle_normed)
    return FullLayer(
        keys=k,
        values=v,
        normed=normed,
        middle=middle,
        middle_normed=middle_normed,
        neurons=neurons,
        out=middle + linear(neurons, layer.down, layer.down_bias),
    )


def attend_part(
    math: LayerMath, layer: LayerWeights, packed: PackedTranscripts, part: PackedPart, normed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a full-model layer's attention over the transcripts of ``part``.

    Returns:
        Output of the o projection, [rows, hidden]; keys (rotated) and values, [rows, kv_heads, D].
    """
    q, k, v = math.project(layer, normed, packed.positions[part.rows])
    begin = part.rows.start
    pieces = [slice(span.start - begin, span.end - begin) for span in part.spans]
    attended = torch.cat([math.attend(q[rows], k[rows], v[rows]) for rows in pieces])
    return linear(attended, layer.o, layer.o_bias), k, v


def prompt_kv(layer: FullLayer, part: PackedPart) -> PromptKv:
    """Copies the keys and values of the prompts of ``part``."""
    begin = part.rows.start
    prompts = [slice(span.start - begin, span.answer - begin) for span in part.spans]
    return [(layer.keys[rows].clone(), layer.values[rows].clone()) for rows in prompts]


def attend_answers(
    math: LayerMath, layer: LayerWeights, packed: PackedTranscripts, stream: Tensor, prompts: PromptKv
) -> Tensor:
    """Computes a decoder layer's attention over the answers.

    Attention reads the full model's KV of the prompt and the decoder's own KV of the answer.

    Args:
        stream: [answer rows, hidden]; the decoder's residual stream.
        prompts: KV of the prompts of all parts.

    Returns:
        [answer rows, heads * D]
    """
    q, k, v = math.project(layer, math.norm(stream), packed.positions[packed.answers])
    attended = []
    spans = [span for part in packed.parts for span in part.spans]
    for span, (keys, values) in zip(spans, prompts, strict=True):
        rows = slice(span.answer_start, span.answer_end)
        attended.append(math.attend(q[rows], torch.cat([keys, k[rows]]), torch.cat([values, v[rows]])))
    return torch.cat(attended)

"""Simulate weight-only quantisation: round weights to a quantised model's values and keep the original dtype.

This shows the loss of precision. The sizes that a quantised model would have are computed in ``costs``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from overfill.making.evaluate.costs import INT4_GROUP, PRECISIONS, Precision, Rounding
from overfill.model.config import ModelConfig
from overfill.model.loading import Weights
from overfill.model.quantize import Int8Matrix
from overfill.model.transformer import Transformer

_MATRICES = ("qkv", "o", "gate_up", "down")


def fake_quantized_model(
    config: ModelConfig, weights: Weights, precision: Precision, max_positions: int
) -> Transformer:
    """Builds a model whose decode-step matrices are rounded; norms, biases and the embedding stay."""
    layer_rounding, head_rounding = PRECISIONS[precision]
    layers = tuple(
        replace(layer, **{name: fake_quantize(getattr(layer, name), layer_rounding) for name in _MATRICES})
        for layer in weights.layers
    )
    head, tail = fake_quantize(weights.head, head_rounding), weights.tail
    if tail is not None:
        tail = replace(
            tail, left=fake_quantize(tail.left, head_rounding), right=fake_quantize(tail.right, head_rounding)
        )
    return Transformer(config, Weights(weights.embedding, layers, weights.norm, head, tail), max_positions)


def fake_quantize(matrix: Tensor, rounding: Rounding) -> Tensor:
    """Quantises and dequantises ``matrix`` [out, in]; returns it in its own dtype.

    bf16 rounds each element. int8 is the form in which the services run int8 decoders. int4 is asymmetric, like
    llama.cpp's Q4_1: every 32 elements of a row share a scale and an offset, both float16.
    """
    if rounding == "bf16":
        return matrix.bfloat16().to(matrix.dtype)
    rounded = Int8Matrix.of(matrix).dequantised() if rounding == "int8" else _int4(matrix.float())
    return rounded.to(matrix.dtype)


def _int4(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    # Pads a short last group with its last element, which changes neither minimum nor maximum.
    padded = pad(matrix, (0, -columns % INT4_GROUP), mode="replicate").view(rows, -1, INT4_GROUP)
    low = padded.amin(-1, keepdim=True)
    scale = ((padded.amax(-1, keepdim=True) - low) / 15).half().float()
    low = low.half().float()
    steps = ((padded - low) / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 15)
    return (steps * scale + low).view(rows, -1)[:, :columns]

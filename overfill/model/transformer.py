"""The forward pass of a Llama-family model over a paged KV cache.

Tokens in, logits out. This module knows neither requests nor sampling; the caller builds the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import silu

from overfill.kv.cache import KvCache
from overfill.kv.spec import Quantization
from overfill.kv.tensors import TORCH_DTYPES
from overfill.model.attention import plan_attention
from overfill.model.batch import ForwardBatch
from overfill.model.config import ModelConfig
from overfill.model.head import logits_of
from overfill.model.loading import LayerWeights, Weights, load_int8_weights, load_weights
from overfill.model.lora import LoraSlots, RowTiles, TorchLoraSlots
from overfill.model.quantize import Matrix, linear
from overfill.model.rope import apply_rope, rope_tables
from overfill.model.steps import NO_HOOKS, LayerHooks

_Multiply = Callable[[Tensor, str, Matrix, Tensor | None], Tensor]
"""``x @ matrix.T + bias`` of a fused matrix, which the name says."""


class ForwardModel(Protocol):
    """A model that runs steps: ``Transformer``, which is the reference, or a faster implementation."""

    config: ModelConfig
    max_positions: int

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a step of one token reads."""

    @property
    def quantize(self) -> Quantization:
        """Format of the matrices."""

    def new_adapter_slots(self, num_slots: int, max_rank: int) -> LoraSlots:
        """Allocates the memory of ``num_slots`` adapters, once, before the first step that has one."""

    def forward(self, batch: ForwardBatch, cache: KvCache, hooks: LayerHooks = NO_HOOKS) -> Tensor: ...


@runtime_checkable
class GreedyModel(Protocol):
    """A model that returns the most likely tokens without storing all logits."""

    def most_likely(self, batch: ForwardBatch, cache: KvCache, hooks: LayerHooks = NO_HOOKS) -> Tensor:
        """Runs ``forward`` and returns the most likely token of each row, -1 for rows that are not finite. [N] int64"""


class Transformer:
    """A loaded model in torch, the reference implementation.

    Args:
        max_positions: number of positions that the RoPE tables cover; the model cannot compute later ones.

    Raises:
        ValueError: ``max_positions`` exceeds the checkpoint's config.
    """

    def __init__(self, config: ModelConfig, weights: Weights[Matrix], max_positions: int) -> None:
        if not 0 < max_positions <= config.max_positions:
            raise ValueError(f"max_positions={max_positions}; this checkpoint allows 1..{config.max_positions}")
        self.config = config
        self.weights = weights
        self.max_positions = max_positions
        self._cos, self._sin = rope_tables(config.rope, config.head_dim, max_positions, self.device)
        self._adapters: TorchLoraSlots | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int | None = None,
        quantize: Quantization = "none",
    ) -> Transformer:
        """Loads a Hugging Face checkpoint folder. Raises the errors of ``ModelConfig.load`` and ``load_weights``.

        Args:
            dtype: dtype of activations, and of weights that are not quantised.
            max_positions: number of positions that the model can compute. None means the config's.
            quantize: format of the matrices.
        """
        config = ModelConfig.load(folder)
        load = load_int8_weights if quantize == "int8" else load_weights
        weights = load(folder, config, dtype, device)
        return cls(config, weights, max_positions or config.max_positions)

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, as ``rope_tables`` returns them."""
        return self._cos, self._sin

    def new_adapter_slots(self, num_slots: int, max_rank: int) -> LoraSlots:
        self._adapters = TorchLoraSlots(self.config, num_slots, max_rank, self.dtype, self.device)
        return self._adapters

    def release_layers(self) -> list[LayerWeights[Matrix]]:
        """Hands the layers to the caller, which can free them one by one. The model cannot run any more."""
        layers = list(self.weights.layers)
        self.weights = replace(self.weights, layers=())
        return layers

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    @property
    def bytes_read(self) -> int:
        return self.weights.bytes_read

    @property
    def quantize(self) -> Quantization:
        return "none" if isinstance(self.weights.head, Tensor) else "int8"

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    def forward(self, batch: ForwardBatch, cache: KvCache, hooks: LayerHooks = NO_HOOKS) -> Tensor:
        """Writes the new tokens' keys and values into ``cache`` and computes the requested logits.

        Args:
            cache: KV cache with the model's dtype and device; layer ``i`` of the model uses its layer ``i``.
            hooks: functions that the pass calls at each layer.

        Returns:
            Logits of the N tokens in ``batch.logits_indices``, [N, vocab] float32.

        Raises:
            ValueError: the cache's shape or dtype differs from the model's.
        """
        check_cache(cache, self.config, self.dtype)
        with torch.inference_mode():
            hidden = self.weights.embedding[batch.token_ids]  # [T, hidden]
            cos, sin = self._cos[batch.positions], self._sin[batch.positions]
            attend = plan_attention(batch, cache)
            tiles = None if batch.adapters is None else RowTiles.of(batch.adapters, self.device)
            last = len(self.weights.layers) - 1
            for index, layer in enumerate(self.weights.layers):
                hooks.layer_start(index)
                multiply = self._multiply(index, tiles)
                q, k, v = self._project(layer, self._norm(hidden, layer.input_norm), cos, sin, multiply)
                cache.put(index, batch.slots, k, v)
                hooks.kv_written(index)
                attended = attend(q, k, v, index)
                # From here on only the rows of requested logits matter; tiles name rows of the whole step.
                if index == last and tiles is None:
                    attended, hidden = attended[batch.logits_indices], hidden[batch.logits_indices]
                hidden = hidden + multiply(attended, "o", layer.o, layer.o_bias)
                hidden = hidden + _mlp(layer, self._norm(hidden, layer.post_norm), multiply)
            if tiles is not None:
                hidden = hidden[batch.logits_indices]
            if len(batch.logits_indices) == 0:
                return torch.empty(0, self.config.vocab_size, dtype=torch.float32, device=self.device)
            normed = self._norm(hidden, self.weights.norm)
            return logits_of(normed, self.weights.head, self.weights.tail).float()

    def _multiply(self, layer: int, tiles: RowTiles | None) -> _Multiply:
        """Returns what computes the products of a layer's fused matrices, with those of the step's adapters."""
        if tiles is None:
            return lambda x, fused, matrix, bias: linear(x, matrix, bias)
        slots = self._adapters
        if slots is None:
            raise ValueError("a token has an adapter, and the model has no slots")

        def added(x: Tensor, fused: str, matrix: Matrix, bias: Tensor | None) -> Tensor:
            out = linear(x, matrix, bias)
            slots.add(out, x, fused, layer, tiles)
            return out

        return added

    def _project(
        self, layer: LayerWeights[Matrix], x: Tensor, cos: Tensor, sin: Tensor, multiply: _Multiply
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projects x, [T, hidden], to rotated q [T, heads, D] and k [T, kv_heads, D], and v [T, kv_heads, D]."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = multiply(x, "qkv", layer.qkv, layer.qkv_bias).view(len(x), heads + 2 * kv_heads, self.config.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            normed = self._norm(qk[:, :heads], layer.q_norm), self._norm(qk[:, heads:], layer.k_norm)
            qk = torch.cat(normed, dim=1)
        qk = apply_rope(qk, cos, sin)
        return qk[:, :heads], qk[:, heads:], v

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in float32; casts before it multiplies the weight, as Hugging Face does."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale).to(x.dtype) * weight


def check_cache(cache: KvCache, config: ModelConfig, dtype: torch.dtype) -> None:
    """Raises ValueError if ``cache`` does not have the shape and dtype of the model's KV."""
    spec = cache.spec
    ours = (config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    theirs = (spec.num_layers, spec.num_kv_heads, spec.head_dim, TORCH_DTYPES[spec.dtype])
    if ours != theirs:
        raise ValueError(f"the cache's (layers, KV heads, head_dim, dtype) are {theirs}; the model's are {ours}")


def _mlp(layer: LayerWeights[Matrix], x: Tensor, multiply: _Multiply) -> Tensor:
    gate, up = multiply(x, "gate_up", layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return multiply(silu(gate) * up, "down", layer.down, layer.down_bias)

"""The forward pass of a Llama-family model over a paged KV cache.

Tokens in, logits out. Knows neither requests nor sampling; whoever builds the batch decides what runs.
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
from overfill.kv.tensors import TORCH_DTYPES
from overfill.model.attention import plan_attention
from overfill.model.batch import ForwardBatch
from overfill.model.config import ModelConfig, Quantization
from overfill.model.head import logits_of
from overfill.model.loading import LayerWeights, Weights, load_int8_weights, load_weights
from overfill.model.quantize import Matrix, linear
from overfill.model.rope import apply_rope, rope_tables

LayerHook = Callable[[int], None]


class Model(Protocol):
    """What can run steps: ``Transformer``, which is the reference, and what is faster than it somewhere."""

    config: ModelConfig
    max_positions: int

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def bytes_read(self) -> int:
        """Of weights, by a step of one token."""

    @property
    def quantize(self) -> Quantization:
        """How the matrices are held."""

    def forward(
        self,
        batch: ForwardBatch,
        cache: KvCache,
        on_layer_start: LayerHook | None = None,
        on_kv_written: LayerHook | None = None,
    ) -> Tensor: ...


@runtime_checkable
class GreedyModel(Protocol):
    """A model that can name the most likely tokens without writing all logits down."""

    def most_likely(
        self,
        batch: ForwardBatch,
        cache: KvCache,
        on_layer_start: LayerHook | None = None,
        on_kv_written: LayerHook | None = None,
    ) -> Tensor:
        """As ``forward``, but [N] int64: the most likely token of each row, -1 where the logits are not finite."""


class Transformer:
    """One model, ready to run.

    Args:
        max_positions: positions the RoPE tables cover; tokens beyond cannot be computed.

    Raises:
        ValueError: ``max_positions`` is beyond what the checkpoint's config allows.
    """

    def __init__(self, config: ModelConfig, weights: Weights[Matrix], max_positions: int) -> None:
        if not 0 < max_positions <= config.max_positions:
            raise ValueError(f"max_positions={max_positions}; this checkpoint allows 1..{config.max_positions}")
        self.config = config
        self.weights = weights
        self.max_positions = max_positions
        self._cos, self._sin = rope_tables(config.rope, config.head_dim, max_positions, self.device)

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        quantize: Quantization = "none",
    ) -> Transformer:
        """Loads a Hugging Face checkpoint folder. ``max_positions``: the config's unless given.

        ``quantize`` makes the matrices int8; ``dtype`` is what everything else is, and what is computed in.
        ``progress`` and the errors raised are those of ``ModelConfig.load`` and ``load_weights``.
        """
        config = ModelConfig.load(folder)
        load = load_int8_weights if quantize == "int8" else load_weights
        weights = load(folder, config, dtype, device, progress)
        return cls(config, weights, max_positions or config.max_positions)

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, as ``rope_tables`` gives them."""
        return self._cos, self._sin

    def release_layers(self) -> list[LayerWeights[Matrix]]:
        """Gives the layers away, to be freed one by one; the model cannot run any more."""
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

    def forward(
        self,
        batch: ForwardBatch,
        cache: KvCache,
        on_layer_start: LayerHook | None = None,
        on_kv_written: LayerHook | None = None,
    ) -> Tensor:
        """Writes the new tokens' keys and values into ``cache`` and computes the logits that are asked for.

        Args:
            cache: layer ``i`` of the model uses layer ``i`` of the cache; same dtype and device as the model.
            on_layer_start: called with ``i`` before layer ``i``.
            on_kv_written: called with ``i`` before layer ``i``'s attention, once its keys and values are in
                the cache (on CUDA: once their writes are queued on the current stream). A hook that raises
                aborts the step.

        Returns:
            Logits, [N, vocab] float32, for the N rows of ``batch.logits_indices``.

        Raises:
            ValueError: the cache has another shape or dtype than the model's.
        """
        check_cache(cache, self.config, self.dtype)
        with torch.inference_mode():
            hidden = self.weights.embedding[batch.token_ids]  # [T, hidden]
            cos, sin = self._cos[batch.positions], self._sin[batch.positions]
            attend = plan_attention(batch, cache)
            last = len(self.weights.layers) - 1
            for index, layer in enumerate(self.weights.layers):
                if on_layer_start is not None:
                    on_layer_start(index)
                q, k, v = self._project(layer, self._norm(hidden, layer.input_norm), cos, sin)
                cache.put(index, batch.slots, k, v)
                if on_kv_written is not None:
                    on_kv_written(index)
                attended = attend(q, k, v, index)
                if index == last:  # behind its keys and values only the rows matter whose logits are asked for
                    attended, hidden = attended[batch.logits_indices], hidden[batch.logits_indices]
                hidden = hidden + linear(attended, layer.o, layer.o_bias)
                hidden = hidden + _mlp(layer, self._norm(hidden, layer.post_norm))
            if len(batch.logits_indices) == 0:
                return torch.empty(0, self.config.vocab_size, dtype=torch.float32, device=self.device)
            normed = self._norm(hidden, self.weights.norm)
            return logits_of(normed, self.weights.head, self.weights.tail).float()

    def _project(
        self, layer: LayerWeights[Matrix], x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [T, hidden] -> q [T, heads, D] and k [T, kv_heads, D], rotated, and v [T, kv_heads, D]."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = linear(x, layer.qkv, layer.qkv_bias).view(len(x), heads + 2 * kv_heads, self.config.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            normed = self._norm(qk[:, :heads], layer.q_norm), self._norm(qk[:, heads:], layer.k_norm)
            qk = torch.cat(normed, dim=1)
        qk = apply_rope(qk, cos, sin)
        return qk[:, :heads], qk[:, heads:], v

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in float32, cast before the weight as in Hugging Face."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale).to(x.dtype) * weight


def check_cache(cache: KvCache, config: ModelConfig, dtype: torch.dtype) -> None:
    """Raises ValueError unless ``cache`` has the shape and dtype of such a model's."""
    spec = cache.spec
    ours = (config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    theirs = (spec.num_layers, spec.num_kv_heads, spec.head_dim, TORCH_DTYPES[spec.dtype])
    if ours != theirs:
        raise ValueError(f"the cache's (layers, KV heads, head_dim, dtype) are {theirs}; the model's are {ours}")


def _mlp(layer: LayerWeights[Matrix], x: Tensor) -> Tensor:
    gate, up = linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return linear(silu(gate) * up, layer.down, layer.down_bias)

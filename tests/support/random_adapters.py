"""Adapters with random weights that change nearly every token of a small model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overfill.model.adapter import AdapterRecord, LoraAdapter, LowRank, Projection, projection_shapes
from overfill.model.config import ModelConfig


def random_adapter(
    config: ModelConfig, seed: int, rank: int = 4, only: Sequence[Projection] = (), scale: float = 1.0
) -> LoraAdapter:
    """An adapter with products for the projections in ``only``, by default all, in every layer."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    shapes = projection_shapes(config)
    products = {
        (layer, projection): LowRank(noise(rank, shapes[projection][1]), scale * noise(shapes[projection][0], rank))
        for layer in range(config.num_layers)
        for projection in only or shapes
    }
    return LoraAdapter(AdapterRecord(f"task-{seed}", f"{seed:064x}", "", rank), products)

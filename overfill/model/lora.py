"""Slots of a loaded model for LoRA adapters, and the low-rank products that a step adds to its projections.

The slots' memory is allocated once, in the layout of the fused matrices (``model.loading``). A step groups its rows by
slot, so that it reads each adapter once and its cost does not grow with rows × adapters.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overfill.errors import InvalidRequest
from overfill.model.adapter import LoraAdapter, LowRank, Projection, projection_shapes
from overfill.model.config import ModelConfig
from overfill.model.upload import upload

FUSED: Mapping[str, tuple[Projection, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The projections whose rows each fused matrix has, in order."""

_RANK_UNIT = 16  # as ``RANK_UNIT`` in native/adapters.h

_REST = 9
"""Time that copies into a slot wait, relative to the time that they compute."""

_TILE_ROWS = 16
"""Maximum number of a slot's rows that one product of the batched kernel computes."""


def round_up_rank(rank: int) -> int:
    """Returns the rank for which a slot has memory: kernels read whole vectors of ranks."""
    return -(-rank // _RANK_UNIT) * _RANK_UNIT


def slot_bytes(config: ModelConfig, max_rank: int, dtype: torch.dtype) -> int:
    """Returns the bytes of a slot for a product of every projection of every layer."""
    rank = round_up_rank(max_rank)
    elements = sum(rank * (rows + columns) for rows, columns in projection_shapes(config).values())
    return config.num_layers * elements * dtype.itemsize


def check_fits(adapter: LoraAdapter, config: ModelConfig, max_rank: int) -> None:
    """Raises InvalidRequest if the adapter's rank, layers or shapes are not those of the model and its slots."""
    name, shapes = adapter.record.name, projection_shapes(config)
    for (layer, projection), product in adapter.products.items():
        (rank, columns), (rows, inner) = product.down.shape, product.up.shape
        if rank > max_rank:
            reason = f"{name!r} has rank {rank}, more than this worker's --max-adapter-rank {max_rank}"
            raise InvalidRequest("adapter", reason)
        if not 0 <= layer < config.num_layers:
            raise InvalidRequest("adapter", f"{name!r} has layer {layer}; the decoder has {config.num_layers} layers")
        if (rows, columns) != shapes[projection] or inner != rank:
            raise InvalidRequest(
                "adapter",
                f"{name!r} has a {projection} of [{rows}, {inner}] × [{rank}, {columns}] in layer {layer}; the "
                f"decoder's is {list(shapes[projection])}",
            )


class LoraSlots(ABC):
    """A model's slots for adapters, an ``AdapterSlots``. Subclasses say how a product is stored.

    A slot holds adapters of any rank up to ``max_rank``; the rest of its rank is zeros.
    """

    def __init__(self, config: ModelConfig, num_slots: int, max_rank: int, dtype: torch.dtype) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.slot_bytes = slot_bytes(config, max_rank, dtype)
        self._config = config
        self._shapes = projection_shapes(config)

    def stage(self, slot: int, adapter: LoraAdapter) -> None:
        """Copies ``adapter`` into an unused slot, product by product, beside running steps.

        Steps may use all cores. The copies take a tenth of one core's time, so that a step of 100 ms loses 10 ms.

        Raises:
            InvalidRequest: the adapter's rank, layers or shapes are not those of this model and its slots.
        """
        check_fits(adapter, self._config, self.max_rank)
        with self._copying():
            began = time.thread_time()
            for layer in range(self._config.num_layers):
                self._clear(slot, layer)
                for projection in self._shapes:
                    if (product := adapter.products.get((layer, projection))) is not None:
                        self._put(slot, layer, projection, product)
                    time.sleep(_REST * (time.thread_time() - began))
                    began = time.thread_time()

    def _copying(self) -> AbstractContextManager[object]:
        """Encloses the copies of one adapter."""
        return nullcontext()

    @abstractmethod
    def _clear(self, slot: int, layer: int) -> None:
        """Removes a layer's products from ``slot``."""

    @abstractmethod
    def _put(self, slot: int, layer: int, projection: Projection, product: LowRank) -> None:
        """Stores a product in a layer that was cleared."""


class TorchLoraSlots(LoraSlots):
    """The slots of the reference model, in torch tensors on the model's device."""

    def __init__(
        self, config: ModelConfig, num_slots: int, max_rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, num_slots, max_rank, dtype)
        self._device = device
        self._rank = rank = round_up_rank(max_rank)
        shape = (config.num_layers, num_slots)
        self._down: dict[str, Tensor] = {}  # [layers, slots, parts * rank, in]
        self._up: dict[str, Tensor] = {}  # [layers, slots, out, rank], the rows of all parts
        self._rows: dict[str, list[int]] = {}  # of each part
        for fused, parts in FUSED.items():
            self._rows[fused] = rows = [self._shapes[part][0] for part in parts]
            columns = self._shapes[parts[0]][1]
            # Filled, not only reserved: memory that no page backs would be given to the KV cache too.
            self._down[fused] = torch.empty(*shape, len(parts) * rank, columns, dtype=dtype, device=device).zero_()
            self._up[fused] = torch.empty(*shape, sum(rows), rank, dtype=dtype, device=device).zero_()

    def add(self, out: Tensor, x: Tensor, fused: str, layer: int, tiles: RowTiles) -> None:
        """Adds the products of the rows in ``tiles`` to ``out``, [T, out], for the operands ``x``, [T, in]."""
        slots, rank = tiles.slots, self._rank
        gathered = x.index_select(0, tiles.gathered).view(len(slots), tiles.height, -1)
        inner = torch.bmm(gathered, self._down[fused][layer].index_select(0, slots).transpose(1, 2))
        up = self._up[fused][layer].index_select(0, slots).transpose(1, 2)  # [tiles, rank, out]
        parts = zip(inner.split(rank, 2), up.split(self._rows[fused], 2), strict=True)
        products = [torch.bmm(low, high) for low, high in parts]
        whole = products[0] if len(products) == 1 else torch.cat(products, 2)
        out.index_add_(0, tiles.rows, whole.flatten(0, 1).index_select(0, tiles.places))

    def _copying(self) -> AbstractContextManager[object]:
        # A stream of its own: copies would wait for the kernels of the engine's stream, and its kernels for them.
        return _SideStream(self._device) if self._device.type == "cuda" else nullcontext()

    def _clear(self, slot: int, layer: int) -> None:
        for tensor in (*self._down.values(), *self._up.values()):
            tensor[layer, slot].zero_()

    def _put(self, slot: int, layer: int, projection: Projection, product: LowRank) -> None:
        fused = next(fused for fused, parts in FUSED.items() if projection in parts)
        part, rank = FUSED[fused].index(projection), len(product.down)
        first_inner, first_row = part * self._rank, sum(self._rows[fused][:part])
        rows = self._rows[fused][part]
        self._down[fused][layer, slot, first_inner : first_inner + rank].copy_(product.down)
        self._up[fused][layer, slot, first_row : first_row + rows, :rank].copy_(product.up)


class _SideStream:
    """Runs its block's work in a CUDA stream of its own, and waits for it at the end."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._context = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)
        self._stream.synchronize()


@dataclass(frozen=True, slots=True)
class RowTiles:
    """A step's rows that have an adapter, sorted by slot and cut into tiles of equal height.

    Attributes:
        slots: [tiles] int64, the slot of each tile.
        gathered: [tiles * height] int64, row of the step at each place; unused places repeat a row.
        rows: [N] int64, the rows that have an adapter; each occurs once.
        places: [N] int64, place of each.
    """

    slots: Tensor
    gathered: Tensor
    rows: Tensor
    places: Tensor
    height: int

    @classmethod
    def of(cls, slots: Tensor, device: torch.device) -> RowTiles:
        """Cuts the rows with slots ``slots``, [T] int64 on the host, into tiles; -1 means no adapter."""
        every = slots.numpy()
        rows = np.flatnonzero(every >= 0)
        rows = rows[np.argsort(every[rows], kind="stable")]
        used, first, counts = np.unique(every[rows], return_index=True, return_counts=True)
        height = min(_TILE_ROWS, int(counts.max()))
        tiles = -(-counts // height)
        within = np.arange(len(rows)) - np.repeat(first, counts)
        places = np.repeat(np.cumsum(tiles) - tiles, counts) * height + within
        gathered = np.full(tiles.sum() * height, rows[0])
        gathered[places] = rows

        def tensor(values: NDArray[np.int64]) -> Tensor:
            return upload(torch.from_numpy(values), device)

        return cls(tensor(np.repeat(used, tiles)), tensor(gathered), tensor(rows), tensor(places), height)

"""Where a vLLM attention backend keeps keys and values inside a block, found by asking the backend to write.

Backends differ: the CPU's transposes keys and may pack pairs of them; FlashAttention has heads or tokens outermost. No
public function undoes that. So the backend writes known numbers into a scratch block, and their places are the layout.
It is described by strides, perhaps after an axis is split; anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_DIGIT = 128
"""Base of the numbers that are written; smaller ones are exact in bfloat16."""

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes keys and values, each [tokens, kv_heads, head_dim], into the slots of a cache: (k, v, cache, slots)."""


class UnknownLayout(Exception):
    """The backend's blocks cannot be described by strides."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a block, outermost factor first: index i is split into digits, each with its stride.

    Attributes:
        sizes, strides: sizes of the factors, whose product is the axis' length, and their strides in elements.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Layout of the keys, or of the values, in a block; ``offset`` is the place of the first element."""

    offset: int
    tokens: Axis
    heads: Axis
    dims: Axis

    def view(self, cache: torch.Tensor) -> torch.Tensor:
        """View of a layer's ``cache``, whose first axis is blocks: [num_blocks, *tokens, kv_heads, *head_dim]."""
        axes = (self.tokens, self.heads, self.dims)
        sizes = [size for axis in axes for size in axis.sizes]
        strides = [stride for axis in axes for stride in axis.strides]
        return torch.as_strided(
            cache, [cache.shape[0], *sizes], [cache.stride(0), *strides], cache.storage_offset() + self.offset
        )


def find_layouts(cache: torch.Tensor, write: Write) -> tuple[BlockLayout, BlockLayout]:
    """The layouts of keys and of values in ``cache``.

    Args:
        cache: one layer's, [num_blocks, kv_heads, block_size, 2 * head_dim] in any strides.
        write: the backend's own way to write.

    Raises:
        UnknownLayout: the blocks have no constant strides.
    """
    _, heads, block_size, content = cache.shape
    shape = (2, block_size, heads, content // 2)
    count = math.prod(shape)
    index = torch.arange(count).view(shape)
    slots = torch.arange(block_size, device=cache.device)
    found = torch.zeros(count, dtype=torch.int64)
    scale = 1
    while scale < count:
        digit = ((index // scale) % _DIGIT).to(cache.dtype).to(cache.device)
        scratch = torch.zeros_like(cache[:1])
        write(digit[0], digit[1], scratch, slots)
        found += scratch.cpu().reshape(-1).to(torch.int64) * scale
        scale *= _DIGIT
    if not torch.equal(found.sort().values, torch.arange(count)):
        raise UnknownLayout("a written block does not hold each element once")
    # Place of each logical element of the block, and from that, of each key and value.
    places = sum(
        torch.arange(size).view([-1 if a == axis else 1 for a in range(3)]) * cache.stride(axis + 1)
        for axis, size in enumerate(cache.shape[1:])
    )
    assert isinstance(places, torch.Tensor)
    where = torch.empty(count, dtype=torch.int64)
    where[found] = places.reshape(-1)
    keys, values = where.view(shape)
    return _layout(keys), _layout(values)


def _layout(places: torch.Tensor) -> BlockLayout:
    """The layout of one half, from the place of each element, [tokens, heads, dims]."""
    offset = int(places[0, 0, 0])
    alone = (places[:, 0, 0] - offset, places[0, :, 0] - offset, places[0, 0, :] - offset)
    if not torch.equal(places, offset + alone[0][:, None, None] + alone[1][None, :, None] + alone[2]):
        raise UnknownLayout("the place of an element depends on token, head and dimension together")
    tokens, heads, dims = (_axis(axis.tolist()) for axis in alone)
    if len(heads.sizes) > 1:
        raise UnknownLayout("the heads of a block have no single stride")
    return BlockLayout(offset, tokens, heads, dims)


def _axis(places: Sequence[int]) -> Axis:
    """Splits an axis into factors with constant strides."""
    sizes: list[int] = []
    strides: list[int] = []
    rest = list(places)
    while len(rest) > 1:
        stride = rest[1]
        run = next((i for i, place in enumerate(rest) if place != i * stride), len(rest))
        if len(rest) % run or any(
            rest[start + i] != rest[start] + i * stride for start in range(0, len(rest), run) for i in range(run)
        ):
            raise UnknownLayout(f"an axis of {len(places)} elements has no constant strides")
        sizes.insert(0, run)
        strides.insert(0, stride)
        rest = rest[::run]
    return Axis(tuple(sizes) or (1,), tuple(strides) or (0,))

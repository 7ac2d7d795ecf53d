"""vLLM's blocks as a ``KvStore``, in the layouts of its backends. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch

from overfill.engine.vllm import store
from overfill.engine.vllm.layout import find_layouts
from overfill.engine.vllm.store import DeviceBlocks, HostBlocks, VllmKvStore
from overfill.kv.chunks import Chunk, digest
from overfill.kv.ranges import KvRange
from overfill.kv.store import LayerTargets

LAYERS, BLOCKS, BLOCK, HEADS, DIM = 3, 11, 8, 4, 32
TABLE = [7, 2, 9, 4, 5]
"""Blocks of the sequence."""
EVERY = KvRange(0, LAYERS, 0, len(TABLE) * BLOCK, 0, HEADS)


class Transposed:
    """As vLLM's kernels for CPUs: keys with tokens innermost, in pairs of elements; values with tokens outermost."""

    @staticmethod
    def cache(heads: int) -> torch.Tensor:
        return torch.zeros(BLOCKS, heads, BLOCK, 2 * DIM, dtype=torch.bfloat16)

    @staticmethod
    def write(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        both = cache.view(cache.shape[0], cache.shape[1], 2, BLOCK * DIM)
        keys = both[:, :, 0].unflatten(2, (DIM // 2, BLOCK, 2))
        values = both[:, :, 1].unflatten(2, (BLOCK, DIM))
        for token, slot in enumerate(slots.tolist()):
            keys[slot // BLOCK, :, :, slot % BLOCK] = k[token].unflatten(1, (DIM // 2, 2))
            values[slot // BLOCK, :, slot % BLOCK] = v[token]


class TokensFirst:
    """As FlashAttention: tokens outermost, and keys beside values."""

    @staticmethod
    def cache(heads: int) -> torch.Tensor:
        return torch.zeros(BLOCKS, BLOCK, heads, 2 * DIM, dtype=torch.bfloat16).permute(0, 2, 1, 3)

    @staticmethod
    def write(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        for token, slot in enumerate(slots.tolist()):
            cache[slot // BLOCK, :, slot % BLOCK] = torch.cat([k[token], v[token]], dim=-1)


Backend = type[Transposed] | type[TokensFirst]


@pytest.fixture(params=[Transposed, TokensFirst])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param  # type: ignore[no-any-return]


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(
    params=[(HostBlocks, "cpu"), (DeviceBlocks, "cpu"), pytest.param((DeviceBlocks, "cuda"), marks=CUDA)],
    ids=["host", "device on a CPU", "device"],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the caches are. The copies of a device run on a CPU, too: their operations are the same there."""
    blocks, device = request.param
    monkeypatch.setattr(store, "blocks_of", blocks)
    return device  # type: ignore[no-any-return]


@pytest.fixture
def kv() -> torch.Tensor:
    """Keys and values of the sequence: [2, layers, tokens, heads, dim]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, LAYERS, EVERY.token_end, HEADS, DIM, generator=generator).to(torch.bfloat16)


RANGES = [
    EVERY,
    KvRange(0, 2, 3, 38, 0, HEADS),  # parts of blocks before and after whole ones
    KvRange(1, 3, 9, 14, 1, 3),  # within a block
    KvRange(2, 3, 16, 32, 2, HEADS),  # whole blocks of some heads
    KvRange(0, LAYERS, 6, 10, 3, HEADS),  # over the end of a block, without a whole one
]


def new_caches(backend: Backend, device: str, heads: int = HEADS) -> list[torch.Tensor]:
    return [backend.cache(heads).to(device) for _ in range(LAYERS)]


def fill(backend: Backend, caches: list[torch.Tensor], kv: torch.Tensor) -> None:
    """Lets the backend write the sequence."""
    slots = torch.tensor([TABLE[token // BLOCK] * BLOCK + token % BLOCK for token in range(kv.shape[2])])
    for layer, cache in enumerate(caches):
        backend.write(kv[0, layer].to(cache.device), kv[1, layer].to(cache.device), cache, slots)


def new_store(backend: Backend, caches: list[torch.Tensor], first_head: int = 0) -> VllmKvStore:
    return VllmKvStore(caches, find_layouts(caches[0].cpu(), backend.write), BLOCK, first_head)


def part(kv: torch.Tensor, kv_range: KvRange) -> bytearray:
    """The payload of a range."""
    layers, tokens, heads = (slice(*kv_range[at : at + 2]) for at in (0, 2, 4))
    return bytearray(kv[:, layers, tokens, heads].contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("kv_range", RANGES, ids=str)
def test_ranges_are_read_as_the_backend_wrote_them(
    backend: Backend, device: str, kv: torch.Tensor, kv_range: KvRange
) -> None:
    caches = new_caches(backend, device)
    fill(backend, caches, kv)
    chunk = Chunk(kv_range, bytearray(len(part(kv, kv_range))), header=b"header")
    new_store(backend, caches).read(TABLE, [chunk], {})
    assert chunk.payload == part(kv, kv_range)
    assert chunk.checksum == digest(b"header", chunk.payload)


@pytest.mark.parametrize("kv_range", RANGES, ids=str)
def test_a_range_is_written_as_the_backend_would(
    backend: Backend, device: str, kv: torch.Tensor, kv_range: KvRange
) -> None:
    layers, tokens, heads = (slice(*kv_range[at : at + 2]) for at in (0, 2, 4))
    only = torch.zeros_like(kv)
    only[:, layers, tokens, heads] = kv[:, layers, tokens, heads]
    expected, caches = new_caches(backend, device), new_caches(backend, device)
    fill(backend, expected, only.flip(1))
    reversed_layers = LayerTargets({layer: [LAYERS - 1 - layer] for layer in range(LAYERS)})
    assert new_store(backend, caches).write(TABLE, reversed_layers, [Chunk(kv_range, bytes(part(kv, kv_range)))]) == 1
    for found, wanted in zip(caches, expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_layer_of_the_full_model_goes_to_several_layers_or_to_none(
    backend: Backend, device: str, kv: torch.Tensor
) -> None:
    expected, caches = new_caches(backend, device), new_caches(backend, device)
    fill(backend, expected, kv[:, [0, 0, 2]])
    targets = LayerTargets({0: [0, 1], 2: [2]})
    assert new_store(backend, caches).write(TABLE, targets, [Chunk(EVERY, part(kv, EVERY))]) == 1
    for found, wanted in zip(caches, expected, strict=True):
        assert torch.equal(found, wanted)


def test_chunks_before_a_damaged_one_are_written(backend: Backend, device: str, kv: torch.Tensor) -> None:
    halves = [KvRange(0, LAYERS, start, start + 20, 0, HEADS) for start in (0, 20)]
    chunks = [Chunk(one, part(kv, one), header=b"header") for one in halves]
    for chunk in chunks:
        chunk.checksum = digest(b"header", chunk.payload)
    chunks[1].payload = bytes(len(chunks[1].payload))
    expected, caches = new_caches(backend, device), new_caches(backend, device)
    fill(backend, expected, kv[:, :, :20])
    assert (
        new_store(backend, caches).write(TABLE, LayerTargets({layer: [layer] for layer in range(LAYERS)}), chunks) == 1
    )
    for found, wanted in zip(caches, expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_rank_serves_and_takes_its_own_heads_of_the_full_model(
    backend: Backend, device: str, kv: torch.Tensor
) -> None:
    """Two ranks with two of four heads each, which ranges on the wire count from the full model's first."""
    own = EVERY._replace(head_start=2)
    source, target = new_caches(backend, device, 2), new_caches(backend, device, 2)
    fill(backend, source, kv[:, :, :, 2:])
    chunk = Chunk(own, bytearray(len(part(kv, own))))
    new_store(backend, source, first_head=2).read(TABLE, [chunk], {})
    assert chunk.payload == part(kv, own)
    every_layer = LayerTargets({layer: [layer] for layer in range(LAYERS)})
    second = new_store(backend, target, first_head=2)
    assert second.write(TABLE, every_layer, [chunk]) == 1
    for found, wanted in zip(target, source, strict=True):
        assert torch.equal(found, wanted)
    for outside in (EVERY, EVERY._replace(head_start=1, head_end=3), EVERY._replace(head_start=3, head_end=5)):
        chunk = Chunk(outside, bytearray(len(part(kv, outside))))
        with pytest.raises(IndexError, match="within heads 2:4"):
            second.read(TABLE, [chunk], {})
        with pytest.raises(IndexError, match="within heads 2:4"):
            second.write(TABLE, every_layer, [chunk])

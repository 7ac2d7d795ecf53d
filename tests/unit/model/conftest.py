"""Fixtures: tiny random checkpoints written by transformers, and a runner that steps a model over a paged cache."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.spec import KvCacheDtype
from overfill.model.batch import ForwardBatch
from overfill.model.config import HEAD_KEY
from overfill.model.head import tokens_in_row_order
from overfill.model.steps import LayerHooks
from overfill.model.transformer import Transformer

BLOCK_SIZE = 4
SaveModel = Callable[[PretrainedConfig], PreTrainedModel]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """Writes a checkpoint to ``tmp_path``; randomises parameters whose initial values would hide a mistake."""

    def save(config: PretrainedConfig) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
            if (parts := getattr(config, HEAD_KEY, None)) is not None:
                head, rank = model.lm_head.weight, parts["tail_rank"]
                rare = tokens_in_row_order(len(head), b64decode(parts.get("whole", "")))[parts["tokens"] :]
                head[rare] = torch.randn(len(rare), rank) @ torch.randn(rank, head.shape[1]) * 0.15 / rank**0.5
        model.save_pretrained(tmp_path)
        return model

    return save


class PagedRunner:
    """Runs sequences on one model and cache; their blocks are scattered over the pool."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int = 64,
        block_size: int = BLOCK_SIZE,
        kv_cache_dtype: KvCacheDtype = "auto",
    ) -> None:
        self.model = model
        spec = model.config.kv_spec(str(model.dtype).removeprefix("torch."))
        self.cache = KvCache(spec, num_blocks, block_size, model.device, kv_cache_dtype)
        # The model must not read cells that it has not written, so they hold NaN.
        for part in self.floating:
            part.fill_(float("nan"))
        self._pool = BlockPool(num_blocks, block_size)
        self._shuffled = torch.randperm(num_blocks).tolist()
        self._tables: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    @property
    def floating(self) -> tuple[Tensor, Tensor]:
        """The cache's parts that can hold NaN."""
        cache = self.cache
        return (cache.k, cache.v) if cache.k_scales is None else (cache.k_scales, cache.v_scales)

    def step(
        self,
        new: dict[str, Sequence[int]],
        logits: Sequence[int] | None = None,
        adapters: Mapping[str, int] | None = None,
        **hooks,
    ) -> Tensor:
        """Feeds each sequence its new tokens; returns the logits of all new tokens, or of the given rows.

        Args:
            adapters: slots of the sequences that have an adapter.
        """
        starts = [self._lengths.get(name, 0) for name in new]
        ends = [start + len(tokens) for start, tokens in zip(starts, new.values(), strict=True)]
        for name, end in zip(new, ends, strict=True):
            table = self._tables.setdefault(name, [])
            blocks = self._pool.acquire(name, self._pool.blocks_for(end) - len(table))
            assert blocks is not None
            table += [self._shuffled[block] for block in blocks]
            self._lengths[name] = end
        tables = [self._tables[name] for name in new]
        # Table rows are shuffled among unused ones, with invalid entries behind a sequence's blocks.
        rows = torch.randperm(len(tables) + 2)[: len(tables)]
        block_tables = torch.full((len(tables) + 2, max(map(len, tables)) + 1), 10**9)
        for row, table in zip(rows.tolist(), tables, strict=True):
            block_tables[row, : len(table)] = torch.tensor(table)
        spans = list(zip(tables, starts, ends, strict=True))
        total = sum(map(len, new.values()))
        slots = [(adapters or {}).get(name, -1) for name, tokens in new.items() for _ in tokens]
        batch = ForwardBatch(
            token_ids=torch.tensor([t for tokens in new.values() for t in tokens]),
            positions=torch.cat([torch.arange(start, end) for _, start, end in spans]),
            slots=torch.cat([self.cache.slots(table, start, end) for table, start, end in spans]),
            query_lens=[end - start for _, start, end in spans],
            context_lens=ends,
            block_tables=block_tables,
            context_lens_device=torch.tensor(ends),
            logits_indices=torch.arange(total) if logits is None else torch.tensor(logits, dtype=torch.int64),
            table_rows=rows,
            adapters=None if adapters is None else torch.tensor(slots),
        )
        return self.model.forward(batch, self.cache, LayerHooks(**hooks))


@pytest.fixture
def runner() -> type[PagedRunner]:
    return PagedRunner

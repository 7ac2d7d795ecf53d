"""Compares both forms of attention with the textbook formula over a plain list of keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from overfill.kv.cache import KvCache
from overfill.kv.spec import DTypeName, KvSpec, RopeSpec
from overfill.model.attention import plan_attention
from overfill.model.batch import ForwardBatch

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 8, 4


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook formula. q: [new, heads, D]; k, v: [context, kv_heads, D], of which the new tokens are the last."""
    rows = []
    for index, query in enumerate(q):
        seen = len(k) - len(q) + index + 1
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            weights = (k[:seen, shared] @ query[head] / math.sqrt(DIM)).softmax(0)
            rows.append(weights @ v[:seen, shared])
    return torch.stack(rows).view(len(q), HEADS * DIM)


class Case:
    """Makes sequences of (new, context) tokens, in shuffled blocks of a cache that is NaN elsewhere."""

    def __init__(self, lengths: list[tuple[int, int]], dtype: DTypeName = "float32") -> None:
        kind = getattr(torch, dtype)
        self.contexts = [tuple(torch.randn(2, c, KV_HEADS, DIM).to(kind)) for _, c in lengths]
        self.queries = [torch.randn(new, HEADS, DIM).to(kind) for new, _ in lengths]
        counts = [-(-context // BLOCK) for _, context in lengths]
        width = max(counts) + 2
        blocks = (torch.randperm(sum(counts)) + 1).split(counts)  # block 0 is padding and belongs to no sequence
        self.tables = torch.zeros(len(lengths), width, dtype=torch.int64)
        spec = KvSpec(1, KV_HEADS, DIM, dtype, RopeSpec())
        self.cache = KvCache(spec, sum(counts) + 1, BLOCK, torch.device("cpu"))
        self.k_cache, self.v_cache = self.cache.layer(0)
        self.k_cache.fill_(float("nan"))
        self.v_cache.fill_(float("nan"))
        for row, ((k, v), own) in enumerate(zip(self.contexts, blocks, strict=True)):
            self.tables[row, : len(own)] = own
            slots = (own[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[: len(k)]
            self.k_cache[slots], self.v_cache[slots] = k, v
        self.batch = ForwardBatch(
            token_ids=torch.empty(0),
            positions=torch.empty(0),
            slots=torch.empty(0),
            query_lens=[new for new, _ in lengths],
            context_lens=[context for _, context in lengths],
            block_tables=self.tables,
            context_lens_device=torch.tensor([context for _, context in lengths]),
            logits_indices=torch.empty(0),
        )

    def run(self) -> Tensor:
        news = self.batch.query_lens
        return plan_attention(self.batch, self.cache)(
            torch.cat(self.queries),
            torch.cat([k[-new:] for (k, _), new in zip(self.contexts, news, strict=True)]),
            torch.cat([v[-new:] for (_, v), new in zip(self.contexts, news, strict=True)]),
            0,
        )

    def expected(self) -> Tensor:
        return torch.cat(
            [textbook(q.float(), k.float(), v.float()) for q, (k, v) in zip(self.queries, self.contexts, strict=True)]
        )


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([(1, 1)], id="decode-first-token"),
        pytest.param([(1, 9), (1, 4), (1, 1), (1, 17), (1, 8)], id="decode-mixed-lengths"),
        pytest.param([(7, 7)], id="prefill"),
        pytest.param([(7, 7), (4, 4), (2, 2)], id="prefill-several"),
        pytest.param([(5, 13)], id="chunk-after-a-prefix"),
        pytest.param([(5, 13), (1, 6), (8, 8), (2, 3)], id="everything-at-once"),
    ],
)
def test_equals_the_textbook(lengths: list[tuple[int, int]]) -> None:
    case = Case(lengths)
    torch.testing.assert_close(case.run(), case.expected(), atol=2e-6, rtol=0)


def test_a_decode_step_reads_only_the_sequence_s_own_blocks() -> None:
    """NaN of a failed sequence stays in that sequence's rows."""
    case = Case([(1, 6), (1, 11), (1, 3)])
    want = case.expected()
    bad = case.tables[1, 0] * BLOCK
    case.k_cache[bad : bad + BLOCK] = case.v_cache[bad : bad + BLOCK] = float("nan")
    got = case.run()
    assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lengths", [[(1, 9), (1, 30)], [(30, 30)], [(9, 30)]])
def test_low_precision_is_close_and_keeps_its_dtype(dtype: DTypeName, lengths: list[tuple[int, int]]) -> None:
    case = Case(lengths, dtype)
    got = case.run()
    assert got.dtype == getattr(torch, dtype)
    torch.testing.assert_close(got.float(), case.expected(), atol=2e-2, rtol=0)

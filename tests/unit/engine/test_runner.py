"""Tests one step for many sequences: a failed row fails alone, and a block table is written once."""

import random

import pytest
import torch
from scheduling import GREEDY

from overfill.engine.runner import ModelRunner
from overfill.engine.sequence import (
    PrefillSequence,
)
from overfill.engine.work import Work
from overfill.errors import InternalError
from overfill.kv.cache import KvCache
from overfill.kv.spec import KvSpec, RopeSpec

BLOCK = 4


def new_cache(num_blocks):
    return KvCache(KvSpec(1, 1, 4, "float32", RopeSpec()), num_blocks, BLOCK, torch.device("cpu"))


class OneBroken:
    """A model that returns the most likely tokens itself, and -1 for its second row."""

    def most_likely(self, batch, cache, *hooks):
        return torch.tensor([7, -1, 9])


def test_a_broken_row_of_a_greedy_step_fails_alone():
    runner = ModelRunner(OneBroken(), new_cache(3))
    works = [Work([1], 0, [block], wants_logits=True) for block in range(3)]
    tokens, failed = runner.next_tokens(works, [PrefillSequence("", [], GREEDY)] * 3)
    assert [tokens[0].token_id, tokens[2].token_id] == [7, 9]
    assert list(failed) == [1]
    assert isinstance(failed[1], InternalError)


class Seen:
    """A model that records each sequence's blocks, and the slots of all new tokens."""

    def __init__(self):
        self.tables, self.slots = [], []

    def most_likely(self, batch, cache, *hooks):
        counts = [-(-context // BLOCK) for context in batch.context_lens]
        rows = batch.tables(max(counts))
        self.tables = [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]
        self.slots = batch.slots.tolist()
        return torch.ones(len(batch.logits_indices), dtype=torch.int64)


class Checked(ModelRunner):
    """Compares every step's tables and slots with ones computed from the works alone."""

    def next_tokens(self, works, specs, *hooks):
        result = super().next_tokens(works, specs, *hooks)
        assert self.model.tables == [list(work.blocks[: -(-work.end // BLOCK)]) for work in works]
        positions = [(work, p) for work in works for p in range(work.start, work.end)]
        assert self.model.slots == [work.blocks[p // BLOCK] * BLOCK + p % BLOCK for work, p in positions]
        return result


@pytest.mark.parametrize("seed", range(20))
def test_any_sequences_in_any_order_have_their_own_blocks(seed):
    """Sequences grow, end, are replaced, lose their blocks and skip steps."""
    draw = random.Random(seed)
    runner = Checked(Seen(), new_cache(1))
    running = []  # [blocks, tokens computed]
    for _ in range(120):
        while len(running) < draw.randint(1, 12):
            running.append([[], 0])
        for sequence in running:
            if draw.random() < 0.05:  # ended, preempted, or given other blocks: another list
                sequence[:] = [[draw.randrange(10_000) for _ in sequence[0]], sequence[1] // 2]
        draw.shuffle(running)
        works = []
        for sequence in running[: draw.randint(1, len(running))]:
            blocks, start = sequence
            end = start + draw.choice([1, 1, 1, draw.randint(1, 40)])
            blocks += [draw.randrange(10_000) for _ in range(-(-end // BLOCK) - len(blocks))]
            works.append(Work([1] * (end - start), start, blocks, wants_logits=True))
            sequence[1] = end
        runner.next_tokens(works, [PrefillSequence("", [], GREEDY)] * len(works))
        del running[draw.randint(1, 12) :]

"""Tests one step for many sequences: a failed row fails alone, and a block table is written once."""

import random

import pytest
import torch
from scheduling import GREEDY

from overfill.engine.decode import DecodeEngine
from overfill.engine.runner import ModelRunner
from overfill.engine.sequence import (
    DecodeSequence,
    Preempted,
    PrefillSequence,
    Release,
    Reserve,
    Reserved,
    Start,
    StopRule,
    Yielded,
)
from overfill.engine.work import Work
from overfill.errors import InternalError
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.prefix import PrefixCache
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.model.processors import new_processor
from overfill.request.params import SamplingParams

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


class MostLikely(OneBroken):
    """A model that returns the most likely tokens and refuses to compute logits."""

    def forward(self, *args):
        raise AssertionError("logits were asked for")

    def most_likely(self, batch, cache, *hooks):
        return torch.tensor([7])


def test_min_tokens_cost_nothing_once_they_are_reached():
    cache = KvCache(KvSpec(1, 1, 4, "float32", RopeSpec()), 1, 4, torch.device("cpu"))
    runner = ModelRunner(MostLikely(), cache)
    params = SamplingParams(temperature=0, min_tokens=2)
    processor = new_processor(params, [], None, [1])
    works = [Work([1], 0, [0], wants_logits=True)]

    def answer(emitted):
        return DecodeSequence("", [], emitted, params, StopRule(frozenset(), 9), processor=processor)

    assert runner.next_tokens(works, [answer([5, 6])])[0][0].token_id == 7
    with pytest.raises(AssertionError, match="logits were asked for"):
        runner.next_tokens(works, [answer([5])])


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


class Counted(list):
    """A sequence's blocks; counts how many of them are read."""

    looked_at = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        Counted.looked_at += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self):
        for block in super().__iter__():
            Counted.looked_at += 1
            yield block


def test_a_step_reads_new_blocks_only():
    runner = ModelRunner(Seen(), new_cache(1))
    tables = [Counted(range(1000 * i, 1000 * i + 250)) for i in range(64)]
    works = [Work([1], 999, table, wants_logits=True) for table in tables]
    runner.next_tokens(works, [PrefillSequence("", [], GREEDY)] * 64)
    for table in tables:
        table.append(7)
    for position in range(1000, 1004):
        Counted.looked_at = 0
        works = [Work([1], position, table, wants_logits=True) for table in tables]
        runner.next_tokens(works, [PrefillSequence("", [], GREEDY)] * 64)
        assert Counted.looked_at == (64 if position == 1000 else 0)
    assert runner.model.tables == [[*range(1000 * i, 1000 * i + 250), 7] for i in range(64)]


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


@pytest.mark.parametrize("seed", range(10))
def test_tables_are_right_when_sequences_lose_their_blocks_to_others(seed):
    """Uses a pool that is too small, and prompts that share prefixes."""
    draw = random.Random(seed)
    events, pool = [], BlockPool(24, BLOCK)
    runner, prefix = Checked(Seen(), new_cache(24)), PrefixCache(pool)
    engine = DecodeEngine(runner, pool, 8, 16, events.extend, prefix)
    prompts = [[draw.randrange(3) for _ in range(draw.randint(1, 20))] for _ in range(40)]
    waiting = [DecodeSequence(str(i), p, [], GREEDY, StopRule(frozenset(), 12)) for i, p in enumerate(prompts)]
    preemptions = 0
    for _ in range(400):
        if waiting:
            engine.handle(Reserve(waiting[0]))
            if any(isinstance(event, Reserved) and event.id == waiting[0].id for event in events):
                waiting.pop(0)
        for event in events:
            match event:
                case Reserved(id=id):
                    engine.handle(Start(id, 1))
                case Preempted(id=id):
                    preemptions += 1
                    engine.handle(Yielded(id))
        events.clear()
        if draw.random() < 0.05:
            engine.handle(Release(str(draw.randrange(40))))
        engine.step()
        engine.check()
    assert not waiting
    assert preemptions

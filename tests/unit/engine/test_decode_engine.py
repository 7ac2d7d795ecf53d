"""Tests the decode engine: continuous batching, preemption and resumption, without a lost block."""

import gc
import itertools
import math

import pytest
import torch
from counting import CountingRunner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from scheduling import GREEDY, EngineMachine, evict_all
from sequence_events import by_sequence

from overfill.engine import decode
from overfill.engine.decode import DecodeEngine
from overfill.engine.sequence import (
    ChangeAdapter,
    DecodeSequence,
    DecodeState,
    Lend,
    Lent,
    Preempted,
    Refused,
    Release,
    Reserve,
    Reserved,
    SequenceFailed,
    Start,
    StopRule,
    TokenSampled,
    Yielded,
)
from overfill.errors import InternalError, InvalidRequest
from overfill.kv.blocks import BlockPool
from overfill.kv.keys import codec_namespace
from overfill.kv.prefix import PrefixCache
from overfill.request.params import SamplingParams
from overfill.v1 import common_pb2


def new_engine(runner, pool, events, max_num_seqs=8, replay_budget=16):
    return DecodeEngine(runner, pool, max_num_seqs, replay_budget, lambda new: events.extend(by_sequence(new)))


def sequence(name, prompt=4, emitted=(), max_tokens=4, stop=()):
    return DecodeSequence(name, [0] * prompt, list(emitted), GREEDY, StopRule(frozenset(stop), max_tokens))


def tokens(events, name):
    return [e.token.token_id for e in events if isinstance(e, TokenSampled) and e.id == name and e.token]


def start(engine, sequence, first):
    """Reserves the sequence's blocks, and starts it as if its KV and its first token had arrived."""
    engine.handle(Reserve(sequence))
    engine.handle(Start(sequence.id, first))


def finish(engine):
    while engine.step():
        pass


def kinds(events):
    return [type(e) for e in events]


def test_an_idle_engine_keeps_the_shape_of_its_last_step_but_no_sequence(runner, pool, events):
    engine = new_engine(runner, pool, events)
    start(engine, sequence("ended"), 10)
    finish(engine)
    assert engine.step_shape == (1, 1)
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is DecodeSequence and each.id == "ended"]


def test_a_long_replay_takes_several_steps_of_the_budget(runner, pool, events):
    engine = new_engine(runner, pool, events, replay_budget=4)
    start(engine, sequence("a", emitted=range(10, 20), max_tokens=12), None)
    start(engine, sequence("b", max_tokens=3), 50)
    finish(engine)
    replayed = [step[0] for step in runner.steps if step[0][1] < 14 and step[0][0][0] < 50]
    assert replayed == [([10, 11, 12, 13], 4), ([14, 15, 16, 17], 8), ([18, 19], 12)]
    assert tokens(events, "a") == [20, 21]
    assert tokens(events, "b") == [51, 52]
    assert ([50], 4) in runner.steps[1]  # one decode step ran between two parts of the replay


def test_short_tails_are_mixed_with_running_answers_and_long_ones_pass_in_short_steps(runner, events, monkeypatch):
    monkeypatch.setattr(decode, "_MAX_PROMPT_BESIDE_ANSWERS", 5)
    monkeypatch.setattr(decode, "_MAX_MIXED_REPLAY", 3)
    runner.mixes_lengths = True
    engine = new_engine(runner, BlockPool(64, 4), events)
    engine.handle(ChangeAdapter(1, object()))
    start(engine, sequence("plain", max_tokens=9), 50)
    engine.step()
    for name, tail, emitted in (("a", 3, ()), ("b", 2, (7,)), ("c", 2, ()), ("long", 11, (8, 9))):
        joining = sequence(name, prompt=12, emitted=emitted)
        joining.answer_start, joining.adapter = 12 - tail, 1
        start(engine, joining, None)
    shapes = []
    while engine.step():
        shapes.append([len(tokens) for tokens, _ in runner.steps[-1]])
    assert shapes[:7] == [
        [3],  # "b", for which the next decode step has no room
        [1, 1, 3, 2],  # the running answer, "b", and the tails of "a" and "c"
        [5],  # the beginning of the long tail
        [1, 1, 1, 1],
        [5],
        [1, 1, 1, 3],  # "b" has ended, and the rest of the long tail rides with its emitted tokens
        [1, 1, 1, 1],
    ]
    assert {id: [e.index for e in events if isinstance(e, TokenSampled) and e.id == id] for id in "abc"} == {
        "a": [0, 1, 2, 3], "b": [1, 2, 3], "c": [0, 1, 2, 3]
    }  # fmt: skip


def scored(name, prompt, answer_start):
    sampling = SamplingParams(temperature=0, prompt_logprobs=1)
    made = DecodeSequence(name, prompt, [], sampling, StopRule(frozenset(), 2), answer_start=answer_start)
    made.scores = common_pb2.PromptLogprobs()
    return made


def ranks(events, name):
    """The ranks in the scores that came with the first token of ``name``, and the first token."""
    (first,) = [e for e in events if isinstance(e, TokenSampled) and e.id == name and e.index == 0]
    return list(first.scores.ranks), first.token.token_id


def test_the_rest_of_a_scored_prompt_passes_in_steps_of_a_bounded_number_of_tokens(runner, events):
    """The runner finds each token most likely after the one below it."""
    engine = new_engine(runner, BlockPool(32, 4), events)
    start(engine, scored("a", [1, 2, 3, *range(10, 18), 30, 31], 2), None)
    start(engine, scored("b", [1, 2, 3, 9], 3), None)
    start(engine, sequence("plain", max_tokens=6), 50)
    finish(engine)
    parts = [step for step in runner.steps if ([50 + len(step)], 4) not in step]
    assert max(sum(len(t) for t, _ in step) for step in parts) <= runner.max_scored
    assert [part for step in runner.steps for part in step if part[0][0] in (3, 15)] == [
        ([3, 10, 11, 12, 13, 14], 2),
        ([15, 16, 17, 30, 31], 8),
    ]
    assert ranks(events, "a") == ([2, 1, 1, 1, 1, 1, 1, 1, 2, 1], 32)
    assert ranks(events, "b") == ([], 10)
    assert [e.scores for e in events if isinstance(e, TokenSampled) and e.index] == [None] * 7
    assert tokens(events, "a") == [32, 33]


def test_steps_that_score_a_prompt_are_short_while_answers_wait(runner, events, monkeypatch):
    monkeypatch.setattr(decode, "_MAX_PROMPT_BESIDE_ANSWERS", 2)
    engine = new_engine(runner, BlockPool(32, 4), events)
    start(engine, sequence("plain", max_tokens=3), 50)
    start(engine, scored("a", list(range(10, 25)), 3), None)
    finish(engine)
    parts = [(len(part), len(step)) for step in runner.steps for part, _ in step if 13 <= part[0] < 25]
    assert parts == [(2, 1), (2, 1), (runner.max_scored, 1), (2, 1)]
    assert runner.steps[1] == [([50], 4)], "an answer's token came between two parts"
    assert ranks(events, "a") == ([1] * 11, 25)


def test_the_number_of_pending_tokens_is_that_of_the_list():
    waiting = scored("a", list(range(20)), 3)
    for waiting.computed, waiting.emitted in ((3, []), (19, []), (20, [7]), (3, [7, 8]), (21, [7, 8])):
        assert waiting.num_pending == len(waiting.pending()) > 0


def test_no_kv_from_answer_start_on_is_cached(runner, events):
    prefix = PrefixCache(BlockPool(32, 4))
    engine = DecodeEngine(runner, prefix.pool, 8, 16, events.extend, prefix)
    prompt = list(range(20))
    start(engine, scored("a", prompt, 10), None)
    finish(engine)
    engine.handle(Reserve(sequence("next", prompt=1)))
    again = scored("again", prompt, 18)
    engine.handle(Reserve(again))
    assert events[-1].held_tokens == 8, "two blocks of the full model's KV"
    for name in ("next", "again"):
        engine.handle(Release(name))


def test_all_full_blocks_before_answer_start_are_held_unless_the_prompt_is_scored(runner, events):
    prefix = PrefixCache(BlockPool(32, 4))
    engine = DecodeEngine(runner, prefix.pool, 8, 16, lambda new: events.extend(by_sequence(new)), prefix)
    prompt = list(range(12))
    start(engine, DecodeSequence("first", prompt, [], GREEDY, StopRule(frozenset(), 2)), 9)
    own = DecodeSequence("own", prompt, [], GREEDY, StopRule(frozenset(), 2), answer_start=8)
    for each in (own, scored("scored", prompt, 8), DecodeSequence("plain", prompt[:8], [], GREEDY, own.stop)):
        engine.handle(Reserve(each))
    assert {e.id: e.held_tokens for e in events if isinstance(e, Reserved)} == {
        "first": 0, "own": 8, "scored": 4, "plain": 4
    }  # fmt: skip
    engine.handle(Start("own", None))
    finish(engine)
    assert ([8, 9, 10, 11], 8) in [part for step in runner.steps for part in step]
    assert tokens(events, "own") == [12, 13]


def test_a_preempted_sequence_scores_its_prompt_anew(runner, events):
    engine = new_engine(runner, BlockPool(32, 4), events)
    whole = scored("a", list(range(20)), 2)
    start(engine, whole, None)
    engine.step()
    assert len(whole.scores.ranks) == runner.max_scored
    whole.state = DecodeState.YIELDING  # as when blocks run out
    engine.handle(Yielded("a"))
    engine.step()
    assert isinstance(events[-1], Reserved)
    engine.handle(Start("a", None))
    finish(engine)
    assert ranks(events, "a") == ([1] * 17, 20)


def test_scores_that_are_not_finite_fail_their_own_sequence_only(runner, pool, events):
    runner.spoilt = {0: math.nan}
    engine = new_engine(runner, pool, events)
    start(engine, scored("a", [1, 2, 3], 1), None)
    start(engine, scored("b", [1, 2, 3], 1), None)
    engine.step()
    assert [e.id for e in events if isinstance(e, SequenceFailed)] == ["a"]
    assert [e.id for e in events if isinstance(e, TokenSampled)] == ["b"]
    engine.handle(Release("a"))
    engine.handle(Release("b"))


def test_a_sequence_is_admitted_only_if_a_free_block_is_left_per_running_one(runner, events):
    pool = BlockPool(8, 4)
    engine = new_engine(runner, pool, events)
    engine.handle(Reserve(sequence("a", prompt=7)))
    engine.handle(Reserve(sequence("b", prompt=7)))
    engine.handle(Reserve(sequence("c", prompt=11)))
    assert isinstance(events[-1], Refused), "3 of the 4 free blocks, which leaves one for two"
    engine.handle(Reserve(sequence("d", prompt=7)))
    assert isinstance(events[-1], Reserved)


def test_a_preempted_sequence_resumes_only_if_a_free_block_is_left_per_running_one(runner, events):
    pool = BlockPool(9, 4)
    engine = new_engine(runner, pool, events)
    for name, prompt, most in (("long", 3, 20), ("short", 7, 6), ("young", 7, 12)):
        start(engine, sequence(name, prompt=prompt, max_tokens=most), 10)
    for _ in range(100):
        engine.step()
        told, events[:] = list(events), []
        for event in told:
            if isinstance(event, Preempted):
                engine.handle(Yielded(event.id))
            elif isinstance(event, Reserved):
                running = engine.load().running
                assert pool.num_free >= running, "one free block is left per running sequence"
                engine.handle(Start(event.id, 10))
    assert engine.load().running == engine.load().waiting == 0
    assert engine._pool.num_used == 0


def reserve_old_and_young(engine):
    """Starts two sequences that together need more blocks than the pool has."""
    for name, prompt, first in (("old", 10, 10), ("young", 14, 30)):
        start(engine, sequence(name, prompt=prompt, max_tokens=6), first)


def run_until_preempted(engine, events):
    for _ in range(50):
        engine.step()
        if Preempted in kinds(events):
            return
    raise AssertionError("nothing was preempted")


def test_when_blocks_run_out_the_youngest_is_preempted_and_resumes_with_its_tokens(runner, pool, events):
    engine = new_engine(runner, pool, events)
    reserve_old_and_young(engine)
    run_until_preempted(engine, events)
    assert [e.id for e in events if isinstance(e, Preempted)] == ["young"]
    before = tokens(events, "young")
    assert not engine.step() or tokens(events, "young") == before, "a yielding sequence is not computed"
    engine.handle(Yielded("young"))
    finish(engine)
    assert tokens(events, "old") == [11, 12, 13, 14, 15]
    assert [e.id for e in events if isinstance(e, Reserved)] == ["old", "young", "young"]
    engine.handle(Start("young", None))
    finish(engine)
    assert tokens(events, "young") == [31, 32, 33, 34, 35]


def test_preempted_sequences_come_before_new_ones(runner, pool, events):
    engine = new_engine(runner, pool, events)
    reserve_old_and_young(engine)
    run_until_preempted(engine, events)
    engine.handle(Yielded("young"))
    engine.handle(Reserve(sequence("new", prompt=1)))
    assert isinstance(events[-1], Refused)
    for name in ("old", "young"):
        engine.handle(Release(name))


def test_a_failed_step_fails_its_sequences_only(runner, pool, events):
    engine = new_engine(runner, pool, events)
    start(engine, sequence("a"), 10)
    runner.fail_next = MemoryError("no room")
    engine.step()
    assert kinds(events)[-1] is SequenceFailed
    assert not engine.step()
    engine.handle(Release("a"))
    start(engine, sequence("b"), 20)
    finish(engine)
    assert tokens(events, "b") == [21, 22, 23]


def test_logits_that_are_not_finite_fail_their_own_sequence_only(runner, pool, events, monkeypatch):
    """Makes the logits infinite, as an extreme penalty would."""
    compute = runner.run

    def run(works, *hooks):
        logits = compute(works, *hooks)
        for row, work in enumerate(works):
            if work.tokens[-1] == 21:
                logits[row, 5] = float("nan")
        return logits

    monkeypatch.setattr(runner, "run", run)
    engine = new_engine(runner, pool, events)
    for name, first in (("a", 10), ("b", 20), ("c", 30)):
        start(engine, sequence(name), first)
    finish(engine)
    assert [tokens(events, name) for name in "abc"] == [[11, 12, 13], [21], [31, 32, 33]]
    (failed,) = [event for event in events if isinstance(event, SequenceFailed)]
    assert failed.id == "b"
    assert isinstance(failed.error, InternalError)
    engine.handle(Release("b"))


def test_kv_of_a_request_that_is_invalid_stays_cached(runner, events, monkeypatch):
    """A client must not be able to empty the cache of the others."""
    prefix = PrefixCache(BlockPool(8, 4))
    engine = DecodeEngine(runner, prefix.pool, 8, 16, events.extend, prefix)
    refusal = InvalidRequest("too complex", "sampling.grammar")
    monkeypatch.setattr(runner, "next_tokens", lambda works, sequences: ([None], {0: refusal}))
    start(engine, sequence("a", prompt=9), 10)
    engine.step()
    engine.handle(Release("a"))
    assert [event.error for event in events if isinstance(event, SequenceFailed)] == [refusal]
    assert prefix.num_cached == 2


def test_prompts_that_share_a_long_prefix_are_all_shared_at_once(runner, events, monkeypatch):
    """Blocks that are published already do not count against a step's quota."""
    monkeypatch.setattr("overfill.engine.decode._MAX_PUBLISHED_BLOCKS", 4)
    pool = BlockPool(64, 4)
    prefix = PrefixCache(pool)
    engine = DecodeEngine(runner, pool, 8, 16, events.extend, prefix)
    for name in ("first", "second", "third", "fourth"):
        arriving = sequence(name, max_tokens=8)
        arriving.prompt = [*range(16), *name.encode()[:4], 0]  # four shared blocks, one of its own
        start(engine, arriving, 10)
        if name == "first":
            assert prefix._num_nodes == 4, "its last block waits for the next step"
            engine.step()
    engine.step()
    for name in ("first", "second", "third", "fourth"):
        engine.handle(Release(name))
    assert prefix.num_cached == 8
    prefix.check_integrity()


@pytest.mark.parametrize(("answer_start", "held"), [(24, 24), (None, 16)])
def test_a_prompt_whose_publication_takes_several_steps_is_held_at_once_from_answer_start(
    runner, events, monkeypatch, answer_start, held
):
    """Otherwise a sequence that comes between two steps would receive the rest again."""
    monkeypatch.setattr("overfill.engine.decode._MAX_PUBLISHED_BLOCKS", 4)
    prefix = PrefixCache(BlockPool(64, 4))
    engine = DecodeEngine(runner, prefix.pool, 8, 64, events.extend, prefix)
    prompt = list(range(27))
    for name in ("first", "second"):
        arriving = DecodeSequence(name, prompt, [], GREEDY, StopRule(frozenset(), 4), answer_start=answer_start)
        start(engine, arriving, None if answer_start else 30)
    other = DecodeSequence("other", [9, *prompt], [], GREEDY, arriving.stop, answer_start=25)
    engine.handle(Reserve(other))
    assert [e.held_tokens for e in events if isinstance(e, Reserved)] == [0, held, 0]
    finish(engine)
    engine.check()
    prefix.check_integrity()


def answered(prefix, events, prompt, **options):
    """Answers ``prompt`` with ten tokens in an engine with blocks of 4 tokens; returns prompt and answer."""
    returns_kv = options.pop("returns_kv", True)
    engine = DecodeEngine(CountingRunner(), prefix.pool, 8, 16, events.extend, prefix, returns_kv=returns_kv)
    if options.get("adapter") is not None:
        engine.handle(ChangeAdapter(options["adapter"], object()))
    answering = DecodeSequence("a", list(prompt), [], GREEDY, StopRule(frozenset(), 10), **options)
    start(engine, answering, None if answering.answer_start else 20)
    finish(engine)
    prefix.check_integrity()
    assert prefix.num_used == 0
    return [*prompt, *answering.emitted]


def lent_tokens(prefix, tokens, namespace=""):
    loan = prefix.lend("loan", prefix.blocks_of(tokens, namespace))
    prefix.release("loan")
    return loan.cached_tokens


@pytest.mark.parametrize("length", [1, 3, 4, 6, 8])
def test_a_decoder_that_is_the_reader_leaves_its_answer_in_the_cache(events, length):
    prefix = PrefixCache(BlockPool(32, 4))
    whole = answered(prefix, events, range(length))
    assert len(whole) == length + 10
    assert lent_tokens(prefix, whole) == (len(whole) - 1) // 4 * 4, "the last token's KV is not computed"


def test_what_the_reader_computes_of_a_prompt_without_an_adapter_is_returned_too(events):
    prefix = PrefixCache(BlockPool(32, 4))
    whole = answered(prefix, events, range(11), answer_start=6)
    assert lent_tokens(prefix, whole) == 20


@pytest.mark.parametrize(
    "options",
    [{"returns_kv": False}, {"adapter": 0}, {"cache_namespace": codec_namespace("t", "int8")}],
    ids=["pruned", "adapter", "lossy"],
)
def test_no_answer_of_another_decoder_an_adapter_or_behind_lossy_kv_is_published(events, options):
    prefix = PrefixCache(BlockPool(32, 4))
    whole = answered(prefix, events, range(6), **options)
    assert lent_tokens(prefix, whole, options.get("cache_namespace", "")) == 4, "the prompt's block"
    assert prefix.num_cached == 1


def test_an_answer_that_is_cancelled_or_preempted_leaves_what_was_computed_and_a_failed_one_nothing(runner, events):
    prefix = PrefixCache(BlockPool(32, 4))
    engine = DecodeEngine(runner, prefix.pool, 8, 16, events.extend, prefix, returns_kv=True)
    for name, token in (("cancelled", 0), ("preempted", 1), ("failed", 2)):
        running = DecodeSequence(name, [token] * 6, [], GREEDY, StopRule(frozenset(), 30))
        start(engine, running, 20)
        for _ in range(7):
            engine.step()
        whole = [*running.prompt, *running.emitted]
        assert lent_tokens(prefix, whole) == 12, "a block is published when it is full"
        if name == "failed":
            runner.fail_next = MemoryError("no room")
            engine.step()
        elif name == "preempted":
            running.state = DecodeState.YIELDING
            engine.handle(Yielded(name))
        engine.handle(Release(name))
        assert lent_tokens(prefix, whole) == (0 if name == "failed" else 12)
        prefix.check_integrity()


def test_a_failed_answer_of_which_nothing_was_published_leaves_nothing(runner, events):
    prefix = PrefixCache(BlockPool(32, 4))
    engine = DecodeEngine(runner, prefix.pool, 8, 16, events.extend, prefix, returns_kv=True)
    failing = sequence("a", prompt=3, emitted=range(8), max_tokens=20)
    start(engine, failing, None)
    engine.step()
    assert (failing.computed, prefix.num_cached) == (11, 0)
    runner.fail_next = MemoryError("no room")
    engine.step()
    engine.handle(Release("a"))
    assert prefix.num_available == prefix.pool.num_free == 32


def test_a_preempted_answer_takes_no_returned_block_for_its_prompt(runner, pool, events):
    """It resumes with its prompt's blocks only, and replays its answer."""
    prefix = PrefixCache(pool)
    engine = DecodeEngine(runner, pool, 8, 64, lambda new: events.extend(by_sequence(new)), prefix, returns_kv=True)
    start(engine, sequence("a", prompt=6, max_tokens=12), 20)
    for _ in range(7):
        engine.step()
    engine._preempt_youngest([])
    engine.handle(Yielded("a"))
    engine.step()
    assert [e.held_tokens for e in events if isinstance(e, Reserved)] == [0, 4]
    engine.handle(Start("a", None))
    finish(engine)
    assert tokens(events, "a") == list(range(21, 32))
    prefix.check_integrity()
    evict_all(prefix)


def test_returned_blocks_count_against_the_quota_between_two_steps(runner, events, monkeypatch):
    monkeypatch.setattr("overfill.engine.decode._MAX_PUBLISHED_BLOCKS", 3)
    prefix = PrefixCache(BlockPool(64, 4))
    engine = DecodeEngine(runner, prefix.pool, 8, 100, events.extend, prefix, returns_kv=True)
    running, beside = (
        sequence(name, prompt=5, emitted=range(n, n + 38), max_tokens=100) for n, name in enumerate("ab")
    )
    start(engine, running, None)
    start(engine, beside, None)
    counts = []
    for _ in range(24):
        engine.step()
        counts.append(prefix._num_nodes)
    assert max(after - before for before, after in itertools.pairwise([1, *counts])) == 3
    whole = [*running.prompt, *running.emitted]
    assert lent_tokens(prefix, whole) == (running.computed - 1) // 4 * 4, "later steps catch up"
    for name in "ab":
        engine.handle(Release(name))
    assert prefix.num_used == 0
    prefix.check_integrity()


def test_a_sequence_whose_blocks_are_lent_to_others_is_preempted_and_resumes(runner, pool, events):
    prefix = PrefixCache(pool)
    engine = DecodeEngine(runner, pool, 8, 64, lambda new: events.extend(by_sequence(new)), prefix)
    start(engine, DecodeSequence("before", [9] * 17, [], GREEDY, StopRule(frozenset(), 2)), 20)
    finish(engine)
    engine.handle(Lend("loan", prefix.blocks_of([9] * 17)))
    assert (events[-1].tokens, engine.load().blocks_used, engine.load().running) == (16, 4, 0)
    start(engine, sequence("a", prompt=10, max_tokens=12), 20)
    run_until_preempted(engine, events)
    engine.handle(Yielded("a"))
    assert not engine.step()
    engine.check()
    engine.handle(Release("loan"))
    engine.handle(Lend("later", prefix.blocks_of([9] * 17), to_peer=True))
    assert events[-1].tokens == 0, "the preempted sequence waits for the blocks"
    engine.handle(Release("later"))
    engine.step()
    engine.handle(Start("a", None))
    finish(engine)
    assert tokens(events, "a") == list(range(21, 32))
    engine.check()
    evict_all(prefix)


def test_blocks_that_running_sequences_will_need_are_not_lent(runner, pool, events):
    prefix = PrefixCache(pool)
    engine = DecodeEngine(runner, pool, 8, 64, lambda new: events.extend(by_sequence(new)), prefix)
    start(engine, DecodeSequence("before", [9] * 17, [], GREEDY, StopRule(frozenset(), 2)), 20)
    finish(engine)
    start(engine, sequence("a", prompt=18, max_tokens=4), 20)
    available = prefix.num_available
    engine.handle(Lend("loan", prefix.blocks_of([9] * 17)))
    assert (available, events[-1].tokens, prefix.num_available) == (3, 8, 1)
    finish(engine)
    assert not [event for event in events if isinstance(event, Preempted)]
    assert tokens(events, "a") == list(range(21, 24))
    engine.handle(Release("loan"))
    evict_all(prefix)


class DecodeMachine(EngineMachine):
    """Runs arrivals, steps, late answers and cancellations in any order: all tokens are right, no block is lost."""

    memory_error = torch.OutOfMemoryError
    returns_kv = False

    def __init__(self):
        super().__init__()
        prefix, returns_kv = self.prefix, self.returns_kv
        self.engine = DecodeEngine(self.runner, prefix.pool, 4, 16, self.take, prefix, returns_kv=returns_kv)
        self.lent: set[str] = set()
        self.first: dict[str, int] = {}
        self.answer: dict[str, list[int]] = {}
        self.receiving: set[str] = set()
        self.must_yield: set[str] = set()
        self.must_release: set[str] = set()

    def take(self, events):
        for event in by_sequence(events):
            match event:
                case Lent(id=id):
                    self.lent.add(id)
                case Reserved(id=id):
                    self.receiving.add(id)
                case Refused(id=id):
                    self.forget(id)
                case Preempted(id=id):
                    self.receiving.discard(id)
                    self.must_yield.add(id)
                case SequenceFailed(id=id):
                    self.must_release.add(id)
                case TokenSampled(id=id, index=index, token=token, finish=finish):
                    assert index == len(self.answer[id])
                    assert token.token_id == self.answer[id][-1] + 1
                    self.answer[id].append(token.token_id)
                    if finish is not None:
                        self.forget(id)

    def forget(self, id):
        self.answer.pop(id, None)
        self.receiving.discard(id)
        self.must_yield.discard(id)
        self.must_release.discard(id)

    # At most 40 tokens, the pool's capacity: admission refuses larger requests before they reach the engine.
    @rule(prompt=st.integers(1, 16), emitted=st.integers(0, 12), more=st.integers(2, 12))
    def arrive(self, prompt, emitted, more):
        number = self.new_number()
        name = f"s{number}"
        said = [number % 20 + i for i in range(emitted)]
        self.answer[name] = said or [number % 20]
        self.engine.handle(Reserve(sequence(name, prompt=prompt, emitted=said, max_tokens=emitted + more)))

    @precondition(lambda self: self.receiving)
    @rule(data=st.data())
    def kv_arrives(self, data):
        name = data.draw(st.sampled_from(sorted(self.receiving)))
        self.receiving.discard(name)
        self.engine.handle(Start(name, self.answer[name][0]))

    @precondition(lambda self: self.must_yield)
    @rule(data=st.data())
    def yields(self, data):
        name = data.draw(st.sampled_from(sorted(self.must_yield)))
        self.must_yield.discard(name)
        self.engine.handle(Yielded(name))

    @precondition(lambda self: self.must_release)
    @rule(data=st.data())
    def a_failed_one_is_released(self, data):
        self.release(data.draw(st.sampled_from(sorted(self.must_release))))

    @precondition(lambda self: self.answer)
    @rule(data=st.data())
    def cancelled(self, data):
        self.release(data.draw(st.sampled_from(sorted(self.answer))))

    @rule(prompt=st.integers(1, 16), first=st.integers(0, 19), answer=st.integers(0, 12))
    def lend(self, prompt, first, answer):
        name = f"loan{self.new_number()}"
        tokens = [*[0] * prompt, *range(first, first + answer)]
        self.engine.handle(Lend(name, self.prefix.blocks_of(tokens)))
        assert name in self.lent

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def end_loan(self, data):
        name = data.draw(st.sampled_from(sorted(self.lent)))
        self.lent.remove(name)
        self.engine.handle(Release(name))

    def release(self, name):
        self.forget(name)
        self.engine.handle(Release(name))

    def teardown(self):
        for name in self.lent:
            self.engine.handle(Release(name))
        for _ in range(2000):
            if not self.answer:
                break
            for name in sorted(self.must_yield):
                self.must_yield.discard(name)
                self.engine.handle(Yielded(name))
            for name in sorted(self.must_release):
                self.release(name)
            for name in sorted(self.receiving):
                self.receiving.discard(name)
                self.engine.handle(Start(name, self.answer[name][0]))
            self.engine.step()
        assert not self.answer, "a sequence never ended"
        assert self.prefix.num_used == 0


class CachingDecodeMachine(DecodeMachine):
    """Makes all prompts start with the same tokens."""

    caches = True


class ReturningDecodeMachine(CachingDecodeMachine):
    """Publishes answers too."""

    returns_kv = True


TestDecodeMachine = DecodeMachine.TestCase
TestCachingDecodeMachine = CachingDecodeMachine.TestCase
TestReturningDecodeMachine = ReturningDecodeMachine.TestCase
TestDecodeMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

"""Tests the prefill engine: chunks under a token budget, prefix sharing, and no lost block."""

import itertools
import math

import pytest
from counting import CountingRunner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from scheduling import GREEDY, EngineMachine, evict_all

from overfill.engine import prefill, token_cost
from overfill.engine.prefill import PrefillEngine
from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
    Imported,
    KvWritten,
    LayerStarted,
    Lend,
    Lent,
    PrefillScheduled,
    PrefillSequence,
    PromptComputed,
    Release,
    SequenceFailed,
    Submit,
)
from overfill.errors import InternalError
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.request.params import SamplingParams
from overfill.v1 import common_pb2


def new_engine(runner, pool, events, max_num_batched_tokens=8, max_num_seqs=4):
    return PrefillEngine(runner, pool, max_num_batched_tokens, max_num_seqs, events.extend)


def prompt(name, length, **options):
    return PrefillSequence(name, list(range(length)), GREEDY, **options)


def release(engine, names):
    for name in names:
        engine.handle(Release(name))


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize(("worth_telling", "told"), [(1, [[0], [1], [2]]), (640, [[0, 1], [2]]), (2**20, [[0, 1, 2]])])
def test_kv_is_announced_once_it_is_worth_a_message(pool, monkeypatch, worth_telling, told):
    monkeypatch.setattr("overfill.engine.layers.MIN_NOTIFY_BYTES", worth_telling)
    lists = []
    engine = PrefillEngine(CountingRunner(num_layers=3), pool, 8, 4, lists.append)
    engine.handle(Submit(prompt("a", 5)))
    engine.step()
    layers = [[layer for e in of(KvWritten, events) for layer in e.layers] for events in lists]
    assert [some for some in layers if some] == told
    assert isinstance(lists[0][0], PrefillScheduled), "without waiting for anything"
    engine.handle(Release("a"))


def test_layers_are_told_of_prompts_with_a_trace_only(pool, events):
    engine = new_engine(CountingRunner(num_layers=3), pool, events)
    for name in "ab":
        engine.handle(Submit(prompt(name, 4, trace=name == "b")))
    engine.step()
    assert [(event.id, event.layer) for event in of(LayerStarted, events)] == [("b", 0), ("b", 1), ("b", 2)]
    release(engine, "ab")


def test_kv_of_short_prompts_is_announced_without_delaying_long_ones(pool, monkeypatch):
    monkeypatch.setattr("overfill.engine.layers.MIN_NOTIFY_BYTES", 640)
    lists = []
    engine = PrefillEngine(CountingRunner(num_layers=3), pool, 20, 4, lists.append)
    engine.handle(Submit(prompt("long", 10)))
    engine.handle(Submit(prompt("short", 4)))
    engine.step()
    layers = [[(e.id, layer) for e in of(KvWritten, events) for layer in e.layers] for events in lists]
    short = [("short", 0), ("short", 1), ("short", 2)]
    assert [some for some in layers if some] == [[("long", 0)], [("long", 1)], [("long", 2), *short]]
    release(engine, ("long", "short"))


def test_several_prompts_share_a_step_in_order_of_arrival(runner, pool, events):
    engine = new_engine(runner, pool, events)
    for name in "abc":
        engine.handle(Submit(prompt(name, 5)))
    engine.step()
    assert [len(t) for t, _ in runner.steps[0]] == [5, 3]
    engine.step()
    assert [(len(t), start) for t, start in runner.steps[1]] == [(2, 3), (5, 0)]
    release(engine, "abc")


def test_a_long_prompt_does_not_starve_short_ones_nor_they_it(runner, events):
    pool = BlockPool(64, 4)
    engine = new_engine(runner, pool, events)
    engine.handle(Submit(prompt("long", 40)))
    engine.step()
    engine.handle(Submit(prompt("longer", 60)))
    engine.handle(Submit(prompt("short", 4)))
    engine.step()
    assert [e.id for e in of(PromptComputed, events)] == ["short"]
    for index in range(3):  # the long prompt advances, however many short ones arrive
        engine.handle(Submit(prompt(f"next-{index}", 8)))
    steps = 0
    while "long" not in [e.id for e in of(PromptComputed, events)]:
        engine.step()
        steps += 1
    assert steps <= 7  # 28 tokens, at least 4 of them in each step
    while engine.step():
        pass
    release(engine, ("long", "longer", "short", "next-0", "next-1", "next-2"))
    assert pool.num_used == 0


def test_logits_that_are_not_finite_fail_their_own_prompt_only(runner, pool, events):
    runner.spoilt = {0: math.inf}
    engine = new_engine(runner, pool, events)
    engine.handle(Submit(prompt("a", 3)))
    engine.handle(Submit(prompt("b", 3)))
    engine.step()
    assert [(e.id, type(e.error)) for e in of(SequenceFailed, events)] == [("a", InternalError)]
    assert [e.id for e in of(PromptComputed, events)] == ["b"]
    release(engine, "ab")


def scored(name, tokens, **options):
    sampling = SamplingParams(temperature=0, prompt_logprobs=1)
    return PrefillSequence(name, tokens, sampling, scores=common_pb2.PromptLogprobs(), **options)


def test_a_prompt_is_scored_in_steps_of_a_bounded_number_of_tokens(runner, events):
    """The runner finds each token most likely after the one below it, with a logit of 10; all others have 0."""
    engine = new_engine(runner, BlockPool(64, 4), events, max_num_batched_tokens=20)
    tokens = [*range(9), 3, 4, 5, 6, 7, 0]
    engine.handle(Submit(scored("a", tokens)))
    engine.handle(Submit(scored("b", tokens[:2])))
    engine.handle(Submit(prompt("plain", 15)))
    while engine.step():
        pass
    assert [[len(t) for t, _ in step] for step in runner.steps] == [[3, 2, 15], [6], [6]]
    (a,) = [e for e in of(PromptComputed, events) if e.id == "a"]
    likely, unlikely = 10 - math.log(math.exp(10) + 63), -math.log(math.exp(10) + 63)
    expected = [likely if b == a + 1 else unlikely for a, b in itertools.pairwise(tokens)]
    assert list(a.scores.logprobs) == pytest.approx(expected, abs=1e-5)
    assert list(a.scores.ranks) == [1 if value == likely else 2 for value in expected]
    assert list(a.scores.top_ids) == [token + 1 for token in tokens[:-1]]
    assert list(a.scores.top_logprobs) == pytest.approx([likely] * 14, abs=1e-5)
    assert a.first.token_id == 1
    release(engine, ("a", "b", "plain"))


def test_a_scored_prompt_takes_nothing_from_the_prefix_cache_and_puts_nothing_in(runner, events):
    prefix = PrefixCache(BlockPool(64, 4))
    engine = PrefillEngine(runner, prefix.pool, 20, 8, events.extend, prefix)
    for name, kind in (("cached", prompt), ("found", prompt), ("scored", lambda n, k: scored(n, list(range(k))))):
        engine.handle(Submit(kind(name, 9)))
        while engine.step():
            pass
    assert [e.cached_tokens for e in of(PrefillScheduled, events)] == [0, 8, 0]
    assert prefix.num_leaked == 0
    assert len(events[-1].scores.logprobs) == 8
    release(engine, ("cached", "found", "scored"))
    evict_all(prefix)


def test_scores_that_are_not_finite_fail_their_own_prompt_only(runner, pool, events):
    runner.spoilt = {1: math.nan}
    engine = new_engine(runner, pool, events)
    engine.handle(Submit(scored("a", [1, 2, 3])))
    engine.handle(Submit(scored("b", [1, 2, 3])))
    engine.step()
    assert [(e.id, type(e.error)) for e in of(SequenceFailed, events)] == [("a", InternalError)]
    assert [e.id for e in of(PromptComputed, events)] == ["b"]
    release(engine, "ab")


def test_equal_prompts_that_arrive_together_are_computed_once(events):
    runner = CountingRunner(block_size=16)
    prefix = PrefixCache(BlockPool(300, 16))
    engine = PrefillEngine(runner, prefix.pool, 2048, 8, events.extend, prefix)
    for name in "abcdefgh":
        engine.handle(Submit(prompt(name, 512)))
    while engine.step():
        prefix.check_integrity()
    assert [[len(t) for t, _ in step] for step in runner.steps] == [[512], [16] * 7]
    assert [e.cached_tokens for e in of(PrefillScheduled, events)] == [0] + [496] * 7
    assert len(of(PromptComputed, events)) == 8
    assert len({e.first.token_id for e in of(PromptComputed, events)}) == 1
    assert engine.load().blocks_used == 32 + 7, "each prompt has its own last block"
    release(engine, "abcdefgh")
    evict_all(prefix)


def test_four_decode_workers_get_a_prompt_that_answer_start_cuts_for_little_more_than_one(events):
    """Each asks for KV only, since the decoder samples the first token."""
    runner = CountingRunner(block_size=16)
    prefix = PrefixCache(BlockPool(300, 16))
    engine = PrefillEngine(runner, prefix.pool, 2048, 8, events.extend, prefix)
    for name in "abcd":
        engine.handle(Submit(prompt(name, 1000, sample_first_token=False)))
    while engine.step():
        pass
    assert len(of(PromptComputed, events)) == 4
    assert sum(len(tokens) for step in runner.steps for tokens, _ in step) <= 1.1 * 1000
    release(engine, "abcd")


def test_prompts_wait_for_shared_blocks_and_no_longer(runner, events):
    prefix = PrefixCache(BlockPool(100, 4))
    engine = PrefillEngine(runner, prefix.pool, 8, 8, events.extend, prefix)
    first, same, other = prompt("first", 24), prompt("same", 15), prompt("other", 8)
    same.prompt[8:] = [99] * 7  # the first two blocks are equal
    other.prompt[:] = [77] * 8
    for sequence in (first, same, other):
        engine.handle(Submit(sequence))
    engine.step()
    assert [e.id for e in of(ChunkComputed, events)] == ["first", "other"]
    while engine.step():
        prefix.check_integrity()
    assert {e.id: e.cached_tokens for e in of(PrefillScheduled, events)} == {"first": 0, "other": 0, "same": 8}
    assert sorted(e.id for e in of(PromptComputed, events)) == ["first", "other", "same"]
    release(engine, ("first", "same", "other"))
    evict_all(prefix)


def test_prompts_do_not_wait_for_failed_or_released_ones_nor_without_a_cache(runner, pool, events):
    prefix = PrefixCache(pool)
    engine = PrefillEngine(runner, pool, 16, 4, events.extend, prefix)
    for name in ("a", "b", "c"):
        engine.handle(Submit(prompt(name, 8)))
    runner.fail_next = MemoryError("no room")
    engine.step()
    assert [e.id for e in of(SequenceFailed, events)] == ["a"]
    engine._running["b"].cancelled = True
    while engine.step():
        pass
    assert [e.id for e in of(PromptComputed, events)] == ["c"]
    release(engine, ("a", "b", "c"))
    evict_all(prefix)
    plain = new_engine(runner, pool, events, max_num_batched_tokens=16)
    for name in ("d", "e"):
        plain.handle(Submit(prompt(name, 8)))
    plain.step()
    assert [e.id for e in of(PromptComputed, events)] == ["c", "d", "e"]
    for name in ("d", "e"):
        plain.handle(Release(name))


def test_a_failed_step_leaves_nothing_in_the_cache(runner, pool, events):
    prefix = PrefixCache(pool)
    engine = PrefillEngine(runner, pool, 8, 4, events.extend, prefix)
    engine.handle(Submit(prompt("a", 16)))
    engine.step()
    runner.fail_next = MemoryError("no room")
    engine.step()
    assert prefix.num_used == 4
    engine.handle(Release("a"))
    assert prefix.num_used == prefix.num_cached == 0, "the blocks of the step before are forgotten too"
    prefix.check_integrity()


def test_an_importing_prompt_waits_while_others_are_computed_and_computes_the_rest(runner, events):
    prefix = PrefixCache(BlockPool(100, 4))
    engine = PrefillEngine(runner, prefix.pool, 64, 8, events.extend, prefix)
    other = PrefillSequence("other", [77] * 9, GREEDY)
    for sequence in (prompt("a", 18, imports=True), other):
        engine.handle(Submit(sequence))
    assert [s.id for s in engine.queue()] == ["a", "other"]
    engine.step()
    (awaiting,) = of(AwaitingImport, events)
    assert (awaiting.id, len(awaiting.blocks), awaiting.cached_tokens) == ("a", 5, 0)
    assert [e.id for e in of(PromptComputed, events)] == ["other"]
    assert not engine.step(), "nothing is computed until the import ends"
    assert not list(engine.queue())
    engine.handle(Imported("a", 12))
    assert engine.step()
    scheduled = of(PrefillScheduled, events)[-1]
    assert (scheduled.id, scheduled.blocks, scheduled.cached_tokens) == ("a", awaiting.blocks, 12)
    assert [len(t) for t, _ in runner.steps[-1]] == [6]
    assert [e.id for e in of(PromptComputed, events)] == ["other", "a"]
    release(engine, ("a", "other"))
    prefix.check_integrity()
    assert prefix.acquire("again", prefix.blocks_of(range(18)), 5).cached_tokens == 16, "what was imported is shared"
    prefix.release("again")
    evict_all(prefix)


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (12, 8), (11, 8)])
def test_a_prompt_of_which_no_full_block_is_missing_imports_nothing(runner, events, length, cached):
    """One token is always computed."""
    prefix = PrefixCache(BlockPool(100, 4))
    engine = PrefillEngine(runner, prefix.pool, 64, 8, events.extend, prefix)
    if cached:
        engine.handle(Submit(prompt("before", cached + 1)))
        engine.step()
    engine.handle(Submit(prompt("a", length, imports=True)))
    engine.step()
    assert not of(AwaitingImport, events)
    assert of(PromptComputed, events)[-1].id == "a"
    release(engine, ("before", "a"))
    evict_all(prefix)


def test_a_prompt_without_a_prefix_cache_or_with_scores_imports_nothing(runner, pool, events):
    off = new_engine(runner, pool, events, max_num_batched_tokens=16)
    off.handle(Submit(prompt("a", 12, imports=True)))
    off.step()
    prefix = PrefixCache(BlockPool(100, 4))
    on = PrefillEngine(runner, prefix.pool, 64, 8, events.extend, prefix)
    on.handle(Submit(scored("b", list(range(5)), imports=True)))
    on.step()
    assert [e.id for e in of(PromptComputed, events)] == ["a", "b"]
    assert not of(AwaitingImport, events)
    off.handle(Release("a"))
    on.handle(Release("b"))


def test_prompts_wait_for_blocks_that_another_imports_and_then_import_their_own(runner, events):
    prefix = PrefixCache(BlockPool(100, 4))
    engine = PrefillEngine(runner, prefix.pool, 64, 8, events.extend, prefix)
    same, longer = prompt("same", 13, imports=True), prompt("longer", 21, imports=True)
    for sequence in (prompt("first", 13, imports=True), same, longer):
        engine.handle(Submit(sequence))
    for _ in range(2):
        assert not engine.step()
        assert [e.id for e in of(AwaitingImport, events)] == ["first"]
    engine.handle(Imported("first", 8))
    engine.step()
    assert [e.id for e in of(AwaitingImport, events)] == ["first"], "its third block is computed by this step"
    engine.step()
    awaiting = of(AwaitingImport, events)[-1]
    assert (awaiting.id, awaiting.cached_tokens) == ("longer", 12), "same has no full block left to import"
    engine.handle(Imported("longer", 12))
    engine.step()
    cached = {e.id: e.cached_tokens for e in of(PrefillScheduled, events)}
    assert cached == {"first": 8, "same": 12, "longer": 12}
    prefix.check_integrity()
    release(engine, ("first", "same", "longer"))
    evict_all(prefix)


def test_no_earlier_step_touches_blocks_that_are_imported(events):
    """The servicer's writes do not wait for what the device still computes, such as a cancelled prompt's step."""
    runner, done = CountingRunner(), []
    runner.synchronize = lambda: done.append(len(events))
    prefix = PrefixCache(BlockPool(100, 4))
    engine = PrefillEngine(runner, prefix.pool, 64, 8, events.extend, prefix)
    engine.handle(Submit(prompt("a", 13, imports=True)))
    engine.step()
    assert done == [0]
    assert of(AwaitingImport, events)
    release(engine, "a")


def test_blocks_of_an_importing_prompt_are_never_replaced_by_published_ones(runner, events):
    prefix = PrefixCache(BlockPool(100, 4))
    engine = PrefillEngine(runner, prefix.pool, 64, 8, events.extend, prefix)
    engine.handle(Submit(prompt("a", 13, imports=True)))
    engine.step()
    (awaiting,) = of(AwaitingImport, events)
    before = list(awaiting.blocks)
    assert prefix.acquire("same", prefix.blocks_of(range(13)), 4) is not None
    prefix.publish("same", 12)
    engine.step()
    assert awaiting.blocks == before == engine._running["a"].blocks
    engine.handle(Imported("a", 8))
    engine.step()
    scheduled = of(PrefillScheduled, events)[-1]
    assert scheduled.blocks[:2] == before[:2], "its own blocks hold what it imported"
    assert scheduled.blocks[2] == prefix.allocation("same").blocks[2]
    assert scheduled.cached_tokens == 12
    prefix.release("same")
    release(engine, "a")
    prefix.check_integrity()
    evict_all(prefix)


def test_a_prompt_that_ends_while_it_imports_frees_its_blocks_and_lets_others_go_on(runner, events):
    prefix = PrefixCache(BlockPool(100, 4))
    engine = PrefillEngine(runner, prefix.pool, 64, 8, events.extend, prefix)
    leaving = prompt("leaving", 13, imports=True)
    for sequence in (leaving, prompt("same", 13, imports=True)):
        engine.handle(Submit(sequence))
    engine.step()
    leaving.cancelled = True
    engine.step()
    assert [e.id for e in of(AwaitingImport, events)] == ["leaving", "same"]
    engine.handle(Release("leaving"))
    engine.handle(Imported("leaving", 12))  # was on its way
    assert prefix.num_used == 4, "the other's blocks"
    engine.handle(Release("same"))
    engine.check()
    assert prefix.num_used == prefix.num_cached == 0, "nothing is published that was not imported"


def test_cached_blocks_are_lent_between_two_layers_of_a_step(events):
    prefix = PrefixCache(BlockPool(100, 4))
    engine = PrefillEngine(CountingRunner(num_layers=3), prefix.pool, 64, 8, events.extend, prefix)
    engine.handle(Submit(prompt("a", 9)))
    engine.step()
    release(engine, "a")
    asked = [[], [], [Lend("loan", prefix.blocks_of(range(18)))]]
    engine.new_loans = lambda: asked.pop(0)
    events.clear()
    engine.handle(Submit(PrefillSequence("b", [77] * 9, GREEDY)))
    engine.step()
    assert [type(event) for event in events] == [PrefillScheduled, Lent, KvWritten, ChunkComputed, PromptComputed]
    (lent,) = of(Lent, events)
    assert (lent.id, lent.tokens, len(lent.blocks), lent.event) == ("loan", 8, 2, None)
    assert not asked
    engine.new_loans = tuple
    release(engine, "b")
    engine.check()
    assert (engine.load().running, engine.load().blocks_used) == (0, 2), "a loan is no sequence"
    engine.handle(Release("loan"))
    engine.check()
    assert engine.load().blocks_used == 0
    evict_all(prefix)


def test_a_prompt_waits_for_lent_blocks_and_starts_when_they_are_given_back(runner, pool, events):
    prefix = PrefixCache(pool)
    engine = PrefillEngine(runner, pool, 64, 4, events.extend, prefix)
    engine.handle(Submit(prompt("a", 9)))
    engine.step()
    release(engine, "a")
    engine.handle(Lend("loan", prefix.blocks_of(range(9))))
    engine.handle(Submit(PrefillSequence("large", [77] * 32, GREEDY)))
    assert not engine.step()
    engine.handle(Release("loan"))
    assert engine.step()
    assert of(PromptComputed, events)[-1].id == "large"
    release(engine, ["large"])
    evict_all(prefix)


def test_loans_leave_blocks_to_prompts_and_take_none_for_which_one_waits(runner, pool, events):
    prefix = PrefixCache(pool)
    engine = PrefillEngine(runner, pool, 64, 4, events.extend, prefix)
    engine.handle(Submit(prompt("a", 32)))
    engine.step()
    release(engine, "a")
    whole = prefix.blocks_of(range(32))

    def lend(name):
        engine.handle(Lend(name, whole, to_peer=name != "disk"))
        return of(Lent, events)[-1].tokens

    assert lend("first") == lend("second") == 24, "a quarter of the blocks is left"
    engine.handle(Submit(PrefillSequence("short", [77] * 8, GREEDY)))
    assert engine.step()
    release(engine, ["short"])
    engine.handle(Submit(PrefillSequence("large", [78] * 32, GREEDY)))
    assert not engine.step()
    assert lend("third") == 0, "the loans would have no end"
    assert lend("disk") == 24, "it keeps prompts most of all when memory is short"
    for loan in ("first", "second", "third", "disk"):
        engine.handle(Release(loan))
    assert engine.step()
    assert of(PromptComputed, events)[-1].id == "large"
    release(engine, ["large"])
    evict_all(prefix)


def test_the_load_names_the_cost_of_a_token_as_measured_lately(pool, events, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(prefill.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(token_cost, "_HALF_LIFE", 8)
    runner = CountingRunner()
    engine = new_engine(runner, pool, events)

    def cost_after(seconds, tokens=8, **options):
        """Token cost after a step of ``seconds``."""

        def take(layer):
            clock[0] += seconds / 2

        monkeypatch.setattr(runner, "on_layer", take)
        engine.handle(Submit(prompt("a", tokens, **options)))
        engine.step()
        engine.handle(Release("a"))
        return engine.load().token_seconds

    assert engine.load().token_seconds == 0, "unknown"
    assert cost_after(0.8) == pytest.approx(0.1)
    assert cost_after(1.6) == pytest.approx((0.4 + 1.6) / (4 + 8)), "the step before counts half"
    runner.fail_next = MemoryError("no room")
    before = engine.load().token_seconds
    assert cost_after(9.9) == before
    monkeypatch.setattr(prefill, "on_cpu", lambda device: False)
    assert cost_after(0.01, sample_first_token=False) == before, "its kernels may still run"
    both = cost_after(1.59)
    assert both == pytest.approx((1.6 + 0.25 * 2.0) / (16 + 0.25 * 12))


class PrefillMachine(EngineMachine):
    """Runs prompts, imports, steps, failures and releases in any order: all prompts are computed, no block is lost."""

    def __init__(self):
        super().__init__()
        self.engine = PrefillEngine(self.runner, self.prefix.pool, 7, 3, self.take, self.prefix)
        self.sequences: dict[str, PrefillSequence] = {}
        self.computed: dict[str, int] = {}
        self.importing: dict[str, AwaitingImport] = {}
        self.lent: set[str] = set()
        self.ended: set[str] = set()

    def take(self, events):
        for event in events:
            self.take_one(event)

    def take_one(self, event):
        match event:
            case AwaitingImport(id=id, blocks=blocks, cached_tokens=cached):
                assert self.caches
                assert cached + 4 < len(self.sequences[id].prompt)
                self.importing[id] = AwaitingImport(id, list(blocks), cached)
            case Lent(id=id):
                self.lent.add(id)
            case PrefillScheduled(id=id, cached_tokens=cached):
                assert cached == 0 or self.caches
                assert id not in self.importing
                self.computed[id] = cached
            case ChunkComputed(id=id, token_start=start, token_end=end):
                assert start == self.computed[id]
                self.computed[id] = end
            case PromptComputed(id=id, first=first):
                assert self.computed[id] == len(self.sequences[id].prompt)
                assert first.token_id == self.sequences[id].prompt[-1] + 1
                self.ended.add(id)
            case SequenceFailed(id=id):
                self.ended.add(id)

    @rule(length=st.integers(1, 40), imports=st.booleans())
    def arrive(self, length, imports):
        name = f"p{self.new_number()}"
        self.sequences[name] = prompt(name, length, imports=imports)
        self.computed[name] = 0
        self.engine.handle(Submit(self.sequences[name]))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data):
        self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))].cancelled = True

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data):
        self.forget(data.draw(st.sampled_from(sorted(self.sequences))))

    @precondition(lambda self: self.importing)
    @rule(data=st.data())
    def imported(self, data):
        awaiting = self.importing[data.draw(st.sampled_from(sorted(self.importing)))]
        most = (len(self.sequences[awaiting.id].prompt) - 1) // 4
        self.end_import(awaiting.id, 4 * data.draw(st.integers(awaiting.cached_tokens // 4, most)))

    def end_import(self, name, tokens):
        assert self.sequences[name].blocks == self.importing.pop(name).blocks, "a block was replaced under its writer"
        self.engine.handle(Imported(name, tokens))

    @rule(length=st.integers(1, 40))
    def lend(self, length):
        name = f"loan{self.new_number()}"
        self.engine.handle(Lend(name, self.prefix.blocks_of(range(length))))
        assert name in self.lent

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def end_loan(self, data):
        name = data.draw(st.sampled_from(sorted(self.lent)))
        self.lent.remove(name)
        self.engine.handle(Release(name))

    def forget(self, name):
        self.sequences.pop(name).cancelled = True
        self.importing.pop(name, None)
        self.ended.discard(name)
        self.engine.handle(Release(name))

    def teardown(self):
        for name in self.lent:
            self.engine.handle(Release(name))
        for _ in range(1000):
            if not self.sequences:
                break
            for name in [n for n, s in self.sequences.items() if n in self.ended or s.cancelled]:
                self.forget(name)
            for awaiting in list(self.importing.values()):
                self.end_import(awaiting.id, awaiting.cached_tokens)
            self.engine.step()
        assert not self.sequences, "a prompt was never computed"
        assert self.prefix.num_used == 0


class CachingPrefillMachine(PrefillMachine):
    """Makes all prompts start with the same tokens."""

    caches = True


TestCachingPrefillMachine = CachingPrefillMachine.TestCase
TestCachingPrefillMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPrefillMachine = PrefillMachine.TestCase
TestPrefillMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

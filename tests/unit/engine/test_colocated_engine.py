"""Tests a worker with both stages: its own prompts reach the decode sequences' blocks, and no block is lost."""

import random
from dataclasses import replace

import pytest
import torch
from counting import CountingRunner
from scheduling import GREEDY
from sequence_events import by_sequence

from overfill.engine.colocated import ColocatedEngine
from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.runner import ModelRunner
from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
    DecodeSequence,
    Imported,
    KvWritten,
    LayerStarted,
    Lend,
    Preempted,
    PrefillHere,
    PrefillScheduled,
    PrefillSequence,
    PromptComputed,
    Release,
    Reserve,
    Reserved,
    SequenceFailed,
    Start,
    StopRule,
    Submit,
    TokenSampled,
    Yielded,
)
from overfill.engine.turns import Turns
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.prefix import PrefixCache
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.telemetry.engine_load import EngineLoad

BLOCK_SIZE = 4
LAYER_MAP = [2, 0]


class WritingRunner(CountingRunner):
    """Writes KV that tells the token and the layer: token + 100 * layer, and its negative."""

    copy_kv = ModelRunner.copy_kv

    def __init__(self, num_layers, num_blocks):
        super().__init__(num_layers, BLOCK_SIZE)
        spec = KvSpec(num_layers, 1, 1, "float32", RopeSpec())
        self.cache = KvCache(spec, num_blocks, BLOCK_SIZE, self.device)

    def run(self, works, *hooks):
        logits = super().run(works, *hooks)
        for work in works:
            slots = self.cache.slots(work.blocks, work.start, work.end)
            for layer in range(self.cache.spec.num_layers):
                kv = torch.tensor(work.tokens, dtype=torch.float32).view(-1, 1, 1) + 100 * layer
                self.cache.put(layer, slots, kv, -kv)
        return logits


class FixedTurns(Turns):
    """Lets one stage go first until the test changes it."""

    def decoded(self, seconds):
        pass

    def prefilled(self, tokens, seconds):
        pass


class Worker:
    """A worker with both stages, and what its two servicers are told.

    Attributes:
        told: events for the decode stage's servicer.
        told_others: events for the prefill stage's servicer.
    """

    def __init__(self, prefill_blocks=16, decode_blocks=16, max_tokens=8, turns=None, cached=True):
        self.told, self.told_others = [], []
        self.full, self.decoder = WritingRunner(3, prefill_blocks), WritingRunner(2, decode_blocks)
        self.full_prefix = PrefixCache(BlockPool(prefill_blocks, BLOCK_SIZE), enabled=cached)
        self.decoder_prefix = PrefixCache(BlockPool(decode_blocks, BLOCK_SIZE), enabled=cached)
        pools = self.full_prefix.pool, self.decoder_prefix.pool
        self.engine = ColocatedEngine(
            lambda emit: PrefillEngine(self.full, pools[0], max_tokens, 8, emit, self.full_prefix),
            DecodeEngine(self.decoder, pools[1], 8, 16, self.tell, self.decoder_prefix),
            self.full,
            self.decoder,
            LAYER_MAP,
            turns or Turns(max_tokens),
            self.told_others.extend,
            self.tell,
        )

    def tell(self, events):
        self.told.extend(by_sequence(events))

    def handle(self, *messages):
        for message in messages:
            self.engine.handle(message)
            self.engine.check()

    def step(self):
        computed = self.engine.step()
        self.engine.check()
        return computed

    def run(self):
        while self.step():
            pass

    def of(self, kind, id):
        return [event for event in self.told if isinstance(event, kind) and event.id == id]

    def reserve(self, name, prompt, max_tokens=4, emitted=()):
        sequence = DecodeSequence(name, list(prompt), list(emitted), GREEDY, StopRule(frozenset(), max_tokens))
        self.handle(Reserve(sequence))
        assert isinstance(self.told[-1], Reserved), self.told[-1]
        return sequence

    def prefill(self, sequence, id=None, **options):
        """Asks for the prompt of a reserved sequence, under ``id``."""
        prompt = PrefillSequence(id or f"prompt of {sequence.id}", list(sequence.prompt), GREEDY, **options)
        held = self.of(Reserved, sequence.id)[-1].held_tokens
        self.handle(PrefillHere(prompt, sequence.id, held))
        return prompt

    def start(self, sequence):
        """Starts the sequence on its computed prompt; runs it to its end and returns its tokens after the first."""
        (computed,) = self.of(PromptComputed, f"prompt of {sequence.id}")
        self.handle(Start(sequence.id, computed.first.token_id))
        self.run()
        return [event.token.token_id for event in self.of(TokenSampled, sequence.id)]

    def kv(self, sequence):
        """Keys of the prompt in the decode sequence's blocks, by layer."""
        slots = self.decoder.cache.slots(sequence.blocks, 0, len(sequence.prompt))
        halves = [self.decoder.cache.gather(layer, slots) for layer in range(2)]
        assert all(torch.equal(k, -v) for k, v in halves)
        return [k.flatten().tolist() for k, _ in halves]

    def assert_empty(self):
        self.engine.check()
        load = self.engine.load()
        assert (load.prefill.blocks_used, load.blocks_used) == (0, 0)
        assert load.prefill.running + load.prefill.waiting + load.running + load.waiting == 0
        assert not self.engine._here


def kv_of(prompt):
    return [[float(token + 100 * layer) for token in prompt] for layer in LAYER_MAP]


PROMPT = list(range(20, 31))


@pytest.mark.parametrize("length", [1, 4, 7, 11, 24])
def test_a_prompt_computed_here_is_answered_on_the_full_model_s_kv(length):
    worker = Worker()
    sequence = worker.reserve("a", range(20, 20 + length))
    prompt = worker.prefill(sequence)
    worker.run()
    (scheduled,) = worker.of(PrefillScheduled, prompt.id)
    (computed,) = worker.of(PromptComputed, prompt.id)
    assert worker.told == [worker.told[0], scheduled, computed]
    assert worker.told_others == []
    assert computed.time_ns >= scheduled.time_ns
    assert worker.kv(sequence) == kv_of(sequence.prompt)
    assert worker.engine.load().prefill.blocks_used == 0, "the prompt's blocks are free before the decoder starts"
    last = 20 + length - 1
    assert computed.first.token_id == last + 1
    assert worker.start(sequence) == [last + 2, last + 3, last + 4]
    worker.handle(Release(prompt.id))
    worker.assert_empty()


def test_a_prompt_of_this_worker_is_imported_beside_running_answers_and_then_lent():
    worker = Worker()
    other = worker.reserve("other", [1, 2, 3], max_tokens=50)
    worker.handle(Start("other", 4))
    sequence = worker.reserve("a", PROMPT)
    prompt = worker.prefill(sequence, imports=True)
    for _ in range(4):
        worker.step()
    assert len(other.emitted) > 2
    (awaiting,) = worker.of(AwaitingImport, prompt.id)
    slots = worker.full.cache.slots(awaiting.blocks, 0, 8)
    for layer in range(3):
        kv = torch.tensor(PROMPT[:8], dtype=torch.float32).view(-1, 1, 1) + 100 * layer
        worker.full.cache.put(layer, slots, kv, -kv)
    worker.handle(Imported(prompt.id, 8))
    while not worker.of(PromptComputed, prompt.id):
        worker.step()
    assert [step for step in worker.full.steps if step] == [[(PROMPT[8:], 8)]]
    assert worker.kv(sequence) == kv_of(PROMPT)
    worker.handle(Lend("loan", worker.full_prefix.blocks_of(PROMPT)))
    assert [(lent.id, lent.tokens) for lent in worker.told_others] == [("loan", 8)]
    assert worker.engine.load().prefill.blocks_used == 2
    worker.handle(Release("loan"), Release("a"), Release("other"))
    worker.assert_empty()


@pytest.mark.parametrize("held", [3, 4, 8, 10])
def test_held_tokens_are_not_copied(held):
    worker = Worker(cached=False)
    sequence = worker.reserve("a", PROMPT)
    prompt = PrefillSequence("p", PROMPT, GREEDY)
    worker.decoder.cache.k.fill_(-1.0)
    worker.decoder.cache.v.fill_(1.0)
    worker.handle(PrefillHere(prompt, "a", held))
    worker.run()
    assert worker.kv(sequence) == [[-1.0] * held + of_layer[held:] for of_layer in kv_of(PROMPT)]
    worker.handle(Release("a"))
    worker.assert_empty()


def preempted_worker(steps):
    """Makes a worker whose sequence "young" was preempted when ``steps`` chunks of its prompt had been computed."""
    turns = FixedTurns(4)
    worker = Worker(decode_blocks=7, max_tokens=4, turns=turns, cached=False)
    old = worker.reserve("old", PROMPT[:3], max_tokens=18)
    worker.prefill(old)
    worker.run()
    worker.handle(Start("old", 23))
    young = worker.reserve("young", PROMPT, max_tokens=4)
    if not steps:
        worker.handle(Submit(PrefillSequence("other", list(range(60)), GREEDY)))  # takes nearly all blocks
    prompt = worker.prefill(young)
    turns.decode_first = False
    for _ in range(steps):
        worker.step()
    turns.decode_first = True
    while not worker.of(Preempted, "young"):
        worker.step()
    assert prompt.computed <= 8, "the prompt was computed before the preemption"
    assert bool(prompt.computed) == bool(steps)
    return worker, young, prompt


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_sequence_that_is_preempted_before_its_prompt_is_computed_gets_its_kv_later(steps, released):
    worker, young, prompt = preempted_worker(steps)
    worker.handle(*([Release(prompt.id)] if released else []), Yielded("young"))
    while len(worker.of(Reserved, "young")) == 1:
        worker.step()
    worker.decoder.cache.k.zero_()
    worker.handle(Release("other"))
    worker.run()
    assert not worker.of(PromptComputed, prompt.id), "of blocks that the sequence does not have any more"
    assert not worker.decoder.cache.k.any()
    again = worker.prefill(young, "again")
    worker.run()
    assert worker.kv(young) == kv_of(PROMPT)
    worker.handle(Start("young", worker.of(PromptComputed, again.id)[0].first.token_id))
    worker.run()
    assert [e.token.token_id for e in worker.of(TokenSampled, "young")] == [32, 33, 34]
    worker.assert_empty()


def test_a_prompt_that_is_asked_for_after_the_preemption_is_not_computed():
    """The servicer sent the message before it knew of the preemption."""
    worker, _, prompt = preempted_worker(1)
    worker.handle(Release(prompt.id))
    stale = PrefillSequence("stale", PROMPT, GREEDY)
    worker.handle(PrefillHere(stale, "young", 0), PrefillHere(stale, "unknown", 0), Yielded("young"))
    worker.run()
    assert stale.computed == 0
    worker.handle(Release("stale"), Release("young"))
    worker.assert_empty()


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("prompt_first", [True, False])
def test_release_in_any_state_of_the_local_prompt(steps, prompt_first):
    worker = Worker(max_tokens=4)
    prompt = worker.prefill(worker.reserve("a", PROMPT))
    for _ in range(steps):
        worker.step()
    prompt.cancelled = True
    messages = [Release(prompt.id), Release("a")]
    told = len(worker.told)
    worker.handle(*(messages if prompt_first else reversed(messages)))
    worker.assert_empty()
    worker.run()
    assert len(worker.told) == told
    assert len(worker.full.steps) == steps


def test_a_decode_sequence_that_ends_alone_leaves_its_prompt_nothing_to_tell():
    worker = Worker(max_tokens=4)
    worker.prefill(worker.reserve("a", PROMPT))
    worker.step()
    worker.handle(Release("a"))
    other = worker.reserve("b", [50] * 11)  # has the blocks that "a" had
    worker.run()
    assert not worker.of(PromptComputed, "prompt of a")
    assert worker.kv(other) == [[0.0] * 11] * 2
    worker.handle(Release("b"))
    worker.assert_empty()


def test_a_failed_prefill_step_fails_its_prompts_and_leaves_the_answers_alone():
    worker = Worker()
    running = worker.reserve("running", PROMPT[:3], max_tokens=9)
    worker.prefill(running)
    worker.run()
    worker.handle(Start("running", 23))
    sequence = worker.reserve("a", PROMPT[:4])
    prompt = worker.prefill(sequence)
    worker.handle(Submit(PrefillSequence("remote", [50] * 4, GREEDY)))
    worker.full.fail_next = MemoryError("no room")
    worker.run()
    assert worker.told[-1].id == "running"
    (failed,) = worker.of(SequenceFailed, prompt.id)
    assert isinstance(failed.error, MemoryError)
    assert [type(e) for e in worker.told_others if e.id == "remote"] == [PrefillScheduled, SequenceFailed]
    assert worker.engine.load().prefill.blocks_used == 1, "the remote prompt's, until its Release"
    assert [e.token.token_id for e in worker.of(TokenSampled, "running")] == list(range(24, 32))
    worker.prefill(sequence, "again")
    worker.run()
    assert worker.kv(sequence) == kv_of(sequence.prompt)
    worker.handle(Release("remote"), Release(prompt.id), Release("a"))
    worker.assert_empty()


def test_a_copy_that_fails_fails_its_prompt(monkeypatch):
    worker = Worker()
    prompt = worker.prefill(worker.reserve("a", PROMPT))

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(WritingRunner, "copy_kv", fail)
    worker.run()
    assert isinstance(worker.of(SequenceFailed, prompt.id)[0].error, torch.OutOfMemoryError)
    assert not worker.of(PromptComputed, prompt.id)
    worker.handle(Release("a"))
    worker.assert_empty()


def test_prompts_of_other_workers_keep_their_blocks_and_get_all_their_events():
    worker = Worker(max_tokens=16)
    sequence = worker.reserve("a", PROMPT)
    prompt = worker.prefill(sequence)
    worker.handle(Submit(PrefillSequence("remote", [50] * 5, GREEDY, trace=True)))
    worker.run()
    assert {event.id for event in worker.told} == {"a", prompt.id}
    assert {event.id for event in worker.told_others} == {"remote"}
    kinds = {type(event) for event in worker.told_others}
    assert kinds == {PrefillScheduled, LayerStarted, KvWritten, ChunkComputed, PromptComputed}
    assert len(worker.full.steps[0]) == 2, "one step computed both"
    assert worker.engine.load().prefill.blocks_used == 2
    assert worker.start(sequence) == [32, 33, 34]
    worker.handle(Release("remote"))
    worker.assert_empty()


def test_each_step_runs_one_engine_and_the_turns_limit_its_tokens():
    asked = []

    class Short(Turns):
        def chunk(self, decoding, remaining, waited, *, alone):
            asked.append((decoding, remaining, waited >= 0))
            return 3 if decoding else 8

    worker = Worker(turns=Short(8))
    running = worker.reserve("running", PROMPT[:3], max_tokens=5)
    worker.prefill(running)
    worker.run()
    worker.handle(Start("running", 23))
    worker.prefill(worker.reserve("a", PROMPT))
    worker.full.steps.clear()
    asked.clear()
    worker.run()
    assert [len(step[0][0]) for step in worker.full.steps] == [3, 3, 3, 2]
    assert asked[:4] == [(True, 11, True), (True, 8, True), (True, 5, True), (False, 2, True)]
    assert len(worker.decoder.steps) == 4
    worker.handle(Release("a"))
    worker.assert_empty()


@pytest.mark.parametrize("prefix", ["full_prefix", "decoder_prefix"])
def test_check_finds_a_lost_block_of_either_pool(prefix):
    worker = Worker()
    pool = getattr(worker, prefix).pool
    (block,) = pool.acquire("lost", 1)
    with pytest.raises(AssertionError):
        worker.engine.check()
    pool.release("lost", [block])


def test_capacity_that_either_stage_frees_counts():
    full, free = EngineLoad(8, 8, 3, 1), EngineLoad(7, 8, 3, 1)
    before = replace(full, prefill=full)
    assert replace(full, prefill=free).freed_capacity_since(before)
    assert replace(free, prefill=full).freed_capacity_since(before)
    assert not before.freed_capacity_since(before)


def test_random_requests_lose_no_block_and_get_right_answers():
    """Local and remote prompts share small pools; a quarter of them is cancelled, and sequences are preempted."""
    assert sum(map(run_randomly, range(20))) > 100, "preemptions, or the test proves little"


def run_randomly(seed):
    """Returns how many sequences were preempted."""
    chance = random.Random(seed)
    worker = Worker(prefill_blocks=9, decode_blocks=7, max_tokens=6)
    preempted = 0
    live, answers, number, taken = {}, {}, 0, 0
    for turn in range(400):
        if turn < 250 and chance.random() < 0.2:
            number += 1
            prompt = [(number % 3) * 7 + i for i in range(chance.randrange(1, 14))]
            if chance.random() < 0.25:
                live[f"remote {number}"] = None
                worker.handle(Submit(PrefillSequence(f"remote {number}", prompt, GREEDY)))
            else:
                sequence = DecodeSequence(f"{number}", prompt, [], GREEDY, StopRule(frozenset(), 12))
                live[sequence.id] = sequence
                worker.handle(Reserve(sequence))
        worker.step()
        while taken < len(worker.told):
            event = worker.told[taken]
            taken += 1
            id = event.id.removeprefix("prompt of ").partition("/")[0]
            if (sequence := live.get(id)) is None:
                continue
            match event:
                case Reserved():
                    worker.prefill(sequence, f"prompt of {id}/{taken}", sample_first_token=not sequence.emitted)
                case Preempted():
                    preempted += 1
                    worker.handle(Yielded(id))
                case PromptComputed(first=first):
                    assert worker.kv(sequence) == kv_of(sequence.prompt)
                    worker.handle(Start(id, first and first.token_id))
                case TokenSampled(finish=finish) if finish is not None:
                    answers[id] = live.pop(id)
        for id in [id for id in live if id.startswith("remote") and chance.random() < 0.1]:
            live.pop(id)
            worker.handle(Release(id))
        if live and chance.random() < 0.04:
            id = chance.choice(list(live))
            live.pop(id)
            worker.handle(Release(id))
    assert answers
    for sequence in answers.values():
        last = sequence.prompt[-1]
        assert sequence.emitted == [last + i for i in range(1, 13)]
    worker.handle(*(Release(id) for id in live))
    worker.run()
    worker.assert_empty()
    return preempted

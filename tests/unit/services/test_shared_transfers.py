"""Tests that sequences of one prompt make one transfer, and that none of them waits in vain, whatever ends first."""

import asyncio
import random
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
from counting import CountingRunner
from sequence_events import by_sequence

from overfill.engine.decode import DecodeEngine
from overfill.engine.mock.store import MockKvStore
from overfill.engine.sequence import DecodeSequence, DecodeState, Preempted, Share, Start, StopRule, Yielded
from overfill.errors import InvalidRequest, TransferFailed, Unavailable
from overfill.kv.blocks import BlockPool
from overfill.kv.cut_blocks import CutBlocks
from overfill.kv.prefix import PrefixCache
from overfill.kv.receiver import PullStats
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.request.params import SamplingParams
from overfill.telemetry.metrics import DecodeMetrics
from overfill.v1 import common_pb2, decode_pb2
from services.decode.sequence_session import SequenceSession

SPEC = KvSpec(2, 1, 4, "float32", RopeSpec())
PROMPT = list(range(30, 44))
START = 10  # two blocks of 4, and a third one cut
SAME_BEGINNING = [*PROMPT[:9], *range(7), 43]


class Inline(Executor):
    """Calls at once, so that a turn of the loop is a step of the test."""

    def submit(self, call, /, *arguments):
        future = Future()
        future.set_result(call(*arguments))
        return future


class Pull:
    """A handoff that writes the prompt's KV when the test says so."""

    codec = common_pb2.KV_CODEC_RAW

    def __init__(self, worker, session):
        self.worker, self.session = worker, session
        self.stats = PullStats(cached_tokens=0)
        self.blocks, self.held = session.blocks, session.held_tokens
        self.end = asyncio.get_running_loop().create_future()
        self.timeout = self.cancelled = None

    async def run(self, timeout, on_first_token, on_in_place):
        self.timeout, self.cancelled = timeout, False
        try:
            await self.end
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        sequence = self.session.sequence
        missing = sequence.prompt[self.held : sequence.num_shared]
        if missing:
            self.worker.store.put(self.blocks, missing, self.held)
        on_in_place()

    @property
    def running(self):
        return not self.end.done()


class Worker:
    """A decode worker with a real engine and prefix cache; each call of ``add`` is a request of a router."""

    def __init__(self, num_blocks=64, enabled=True):
        self.prefix = PrefixCache(BlockPool(num_blocks, 4), enabled=enabled)
        self.store = MockKvStore(SPEC, num_blocks, 4)
        self.engine = DecodeEngine(CountingRunner(), self.prefix.pool, 32, 512, self.take, self.prefix)
        self.transfers, self.metrics = {}, DecodeMetrics()
        self.cut_blocks = CutBlocks(self.store, SPEC, 2, Inline())
        self.sessions, self.tasks, self.told, self.pulls, self.sent = {}, {}, {}, [], []
        self.load = decode_pb2.WorkerLoad

    def own_assignment(self, prompt_tokens):
        return None

    def send(self, message):
        if isinstance(message, Start):
            sequence = self.sessions[message.id].sequence
            if sequence.blocks:
                shared = sequence.prompt[: sequence.num_shared]
                assert self.store.holds(sequence.blocks, shared), f"{message.id} runs without its prompt"
        self.sent.append(message)
        self.engine.handle(message)

    def take(self, events):
        for event in by_sequence(events):
            if not self.tasks[event.id].done():
                self.sessions[event.id].take(event)

    @asynccontextmanager
    async def new_handoff(self, target, session):
        self.pulls.append(Pull(self, session))
        yield self.pulls[-1]

    def add(self, id, *, answer_start=START, namespace="raw/", assigned=False, prompt=PROMPT, emitted=()):
        sequence = DecodeSequence(
            *(id, list(prompt), list(emitted), SamplingParams(temperature=0), StopRule(frozenset(), 3 + len(emitted))),
            cache_namespace=namespace,
            prompt_blocks=self.prefix.blocks_of(prompt[:answer_start], namespace),
            answer_start=answer_start,
        )
        start = decode_pb2.StartDecode()
        if assigned:
            start.assign_prefill.worker_id = "p"
        told = self.told[id] = []
        served = SimpleNamespace(
            start=start,
            commands=asyncio.Queue(),
            put=told.append,
            put_token=lambda index, token: told.append(
                decode_pb2.SequenceUpdate(tokens=decode_pb2.Tokens(first_index=index, ids=[token]))
            ),
            time_left=lambda: 60.0,
        )
        self.sessions[id] = SequenceSession(served, sequence, self)
        self.tasks[id] = asyncio.ensure_future(self.sessions[id].run())

    def assign(self, id):
        self.sessions[id].inbox.put_nowait(decode_pb2.AssignPrefill(worker_id=f"p-{id}"))

    def preempt(self, id):
        """Takes the blocks of a sequence, as the engine does when an older one needs them."""
        sequence = self.sessions[id].sequence
        if sequence.state in (DecodeState.RECEIVING, DecodeState.RUNNING) and sequence.blocks:
            sequence.state = DecodeState.YIELDING
            self.engine._emit([Preempted(id)])

    def kinds(self, id):
        return [update.WhichOneof("message") for update in self.told[id]]

    def has_prompt(self, id):
        return self.told[id][0].reserved.has_prompt

    def tokens(self, id):
        return [token for update in self.told[id] for token in update.tokens.ids]

    def needs(self, *ids):
        """What each sequence has told of why it needs a prefill worker."""
        return [
            [update.need_prefill.detail for update in self.told[id] if update.HasField("need_prefill")] for id in ids
        ]

    async def finish(self, *ids):
        """Computes until the answers of ``ids`` are whole."""
        await settle()
        while self.engine.step():
            await settle()
        await asyncio.wait_for(asyncio.gather(*(self.tasks[id] for id in ids)), 5)
        for id in ids:
            assert self.kinds(id)[-1] == "done", id
            assert self.tokens(id) == [44, 45, 46], id


async def settle():
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.fixture
async def worker():
    worker = Worker()
    yield worker
    for task in worker.tasks.values():
        task.cancel()
    await asyncio.wait(worker.tasks.values(), timeout=5)
    assert all(task.done() for task in worker.tasks.values())
    assert worker.transfers == {}
    assert worker.prefix.num_used == 0
    worker.prefix.check_integrity()


async def four(worker):
    """Four sequences of one prompt, of which "a" leads."""
    for id in "abcd":
        worker.add(id, assigned=id in "ab")
        await settle()
    (pull,) = worker.pulls
    assert [worker.has_prompt(id) for id in "abcd"] == [False, True, True, True]
    return pull


async def test_sequences_that_come_at_once_share_one_transfer_and_its_blocks(worker):
    pull = await four(worker)
    assert pull.timeout is None, "the leader's deadline is not the others'"
    used = worker.prefix.num_used
    pull.end.set_result(None)
    await settle()
    tables = [worker.sessions[id].sequence.blocks for id in "abcd"]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 4, "each writes its own tokens into the block that answer_start cuts"
    assert worker.prefix.num_used == used - 3 * 2
    await worker.finish(*"abcd")
    done = [worker.told[id][-1].done for id in "abcd"]
    assert [each.prefill_worker_id for each in done] == ["p"] * 4
    assert [each.usage.cached_tokens for each in done] == [0, START, START, START]
    assert len(worker.pulls) == 1
    shared = worker.metrics.registry.get_sample_value
    assert shared("overfill_decode_shared_prompts_total", {"from": "transfer"}) == 3
    assert shared("overfill_decode_shared_prompt_tokens_total") == 3 * START


async def test_blocks_that_were_on_their_way_when_the_prompt_came_are_asked_for_again(worker, monkeypatch):
    worker.add("a", assigned=True)
    await settle()
    late = []
    monkeypatch.setattr(worker.engine, "_emit", late.extend)
    worker.add("b", assigned=True)
    worker.add("c")
    await settle()
    monkeypatch.undo()
    worker.pulls[0].end.set_result(None)
    await settle()
    worker.take(late)
    await worker.finish(*"abc")
    assert [worker.has_prompt(id) for id in "bc"] == [True, True]
    assert len(worker.pulls) == 1


async def test_a_failure_before_the_blocks_are_there_is_no_request_for_a_prefill_worker(worker, monkeypatch):
    worker.add("a", assigned=True)
    await settle()
    late = []
    monkeypatch.setattr(worker.engine, "_emit", late.extend)
    worker.add("b")
    await settle()
    monkeypatch.undo()
    worker.pulls[0].end.set_exception(TransferFailed("stalled"))
    await settle()
    assert worker.told["b"] == []
    worker.take(late)
    await settle()
    assert worker.kinds("b") == ["reserved"]
    assert not worker.has_prompt("b")


@pytest.mark.parametrize("answer_start", [8, 10])
async def test_a_later_sequence_begins_at_once(worker, answer_start):
    for id in "ab":
        worker.add(id, assigned=True, answer_start=answer_start)
        await settle()
        if id == "a":
            worker.pulls[0].end.set_result(None)
        else:
            assert worker.has_prompt("b")
        await worker.finish(id)
    assert len(worker.pulls) == 1
    assert worker.metrics.registry.get_sample_value("overfill_decode_shared_prompts_total", {"from": "cache"}) == 1


async def one_fails_after_another(worker, error):
    worker.add("a", assigned=True)
    await settle()
    worker.pulls[0].end.set_result(None)
    await worker.finish("a")
    worker.add("b")
    await settle()
    worker.engine._runner.fail_next = error
    worker.engine.step()
    await asyncio.wait([worker.tasks["b"]], timeout=5)
    assert worker.tasks["b"].exception() is not None


async def test_after_a_failure_no_sequence_takes_kv_that_may_be_the_cause(worker):
    await one_fails_after_another(worker, RuntimeError("not finite"))
    for chunk in worker.cut_blocks._kept.values():
        chunk.payload[:] = bytes(len(chunk.payload))
    for id in "cd":
        worker.add(id, assigned=True)
        await settle()
        if id == "c":
            assert worker.pulls[1].held == 0
            worker.pulls[1].end.set_result(None)
        await worker.finish(id)
    assert len(worker.pulls) == 2


async def test_an_invalid_request_takes_no_prompt_from_the_others(worker):
    await one_fails_after_another(worker, InvalidRequest("x", "bad"))
    worker.add("c", assigned=True)
    await worker.finish("c")
    assert len(worker.pulls) == 1


async def test_sequences_that_wait_for_a_prefill_worker_follow_the_first_that_gets_one(worker):
    for id in "abc":
        worker.add(id)
    await settle()
    worker.assign("b")
    await settle()
    worker.assign("a")
    await settle()
    (pull,) = worker.pulls
    pull.end.set_result(None)
    await worker.finish(*"abc")
    assert worker.told["a"][-1].done.prefill_worker_id == "p-b"


@pytest.mark.parametrize("other", [{"namespace": "raw/tenant"}, {"namespace": "int8/"}, {"prompt": [9, *PROMPT[1:]]}])
async def test_nothing_else_is_shared(worker, other):
    worker.add("a", assigned=True)
    worker.add("b", assigned=True, **other)
    await settle()
    assert [pull.held for pull in worker.pulls] == [0, 0]
    for pull in worker.pulls:
        pull.end.set_result(None)
    await worker.finish(*"ab")


LONGER = [*PROMPT, *range(3, 20)]


@pytest.mark.parametrize(
    ("starts", "follow", "held"),
    [
        ((17, 9, 10), True, [0]),  # the cut blocks of the shorter prompts are in the longer one's blocks
        ((9, 17, 10), True, [0, 8, 8]),  # each of the others asks for its rest
        ((9, 25), False, [0, 0]),  # less than half of the longer prompt is on its way
    ],
)
async def test_prompts_that_begin_alike_receive_what_they_have_in_common_once(worker, starts, follow, held):
    for id, answer_start in zip("abc", starts, strict=False):
        worker.add(id, prompt=LONGER, answer_start=answer_start, assigned=id == "a" or not follow)
        await settle()
    assert [worker.has_prompt(id) for id in worker.tasks] == [False] + [follow] * (len(starts) - 1)
    worker.pulls[0].end.set_result(None)
    await settle()
    assert [message.followers for message in worker.sent if isinstance(message, Share)] == [("b", "c")] * follow
    for id, pull in zip("bc", held[1:] if follow else [], strict=False):
        assert worker.told[id][-1].need_prefill.reason == decode_pb2.NeedPrefill.REASON_REST, pull
    for id in worker.tasks:
        worker.assign(id)
    await settle()
    for pull in worker.pulls[1:]:
        pull.end.set_result(None)
    await settle()
    while worker.engine.step():
        await settle()
    assert [worker.kinds(id)[-1] for id in worker.tasks] == ["done"] * len(starts)
    assert [pull.held for pull in worker.pulls] == held


@pytest.mark.parametrize("sharing", ["no answer_start", "no prefix cache"])
async def test_without_answer_start_or_cache_each_sequence_receives_its_prompt_by_its_deadline(sharing):
    worker = Worker(enabled=sharing != "no prefix cache")
    for id in "ab":
        worker.add(id, assigned=True, answer_start=None if sharing == "no answer_start" else START, emitted=[44])
    await settle()
    assert [pull.timeout for pull in worker.pulls] == [60.0, 60.0]
    assert not worker.has_prompt("b")
    for task in worker.tasks.values():
        task.cancel()
    await asyncio.wait(worker.tasks.values())


async def test_the_transfer_goes_on_when_its_leader_has_ended(worker):
    pull = await four(worker)
    leader = worker.sessions["a"].sequence
    for _ in range(2):
        worker.tasks["a"].cancel()
        await settle()
    assert pull.cancelled is False
    assert leader.blocks, "the transfer still writes into them"
    pull.end.set_result(None)
    await worker.finish(*"bcd")
    assert worker.tasks["a"].cancelled()
    assert len(worker.pulls) == 1


async def test_the_last_follower_ends_the_transfer_of_a_leader_that_has_ended(worker):
    pull = await four(worker)
    for id in "abcd":
        assert not pull.cancelled, "others wait"
        worker.tasks[id].cancel()
        await settle()
    assert pull.cancelled
    assert all(task.done() for task in worker.tasks.values())


async def test_a_leader_goes_on_for_itself_when_its_followers_have_ended(worker):
    pull = await four(worker)
    for id in "bcd":
        worker.tasks[id].cancel()
    await settle()
    assert not pull.cancelled
    pull.end.set_result(None)
    await worker.finish("a")


@pytest.mark.parametrize("error", [TransferFailed("stalled"), Unavailable("stalled"), InvalidRequest("x", "stalled")])
@pytest.mark.parametrize("leader_ended", [False, True])
async def test_each_asks_again_after_a_failure_and_the_first_that_gets_a_prefill_worker_leads(
    worker, error, leader_ended
):
    pull = await four(worker)
    if leader_ended:
        worker.tasks["a"].cancel()
        await settle()
    pull.end.set_exception(error)
    await settle()
    assert [len(needs) for needs in worker.needs(*"bcd")] == [1, 1, 1]
    assert all("stalled" in need for needs in worker.needs(*"bcd") for need in needs)
    alone = leader_ended or isinstance(error, InvalidRequest)
    assert worker.tasks["a"].done() == alone, "a refusal of the leader's request is its own"
    worker.assign("c")
    await settle()
    worker.assign("b")
    await settle()
    assert len(worker.pulls) == 2
    worker.pulls[1].end.set_result(None)
    await worker.finish(*("bcd" if alone else "abcd"))
    if alone:
        await asyncio.wait([worker.tasks["a"]])


@pytest.mark.parametrize("leader_ended", [False, True])
async def test_a_preempted_leader_gives_its_blocks_back_at_once(worker, leader_ended):
    pull = await four(worker)
    if leader_ended:
        worker.tasks["a"].cancel()
        await settle()
    sent, worker.send = [], lambda message, send=worker.send: (sent.append(message), send(message))
    worker.sessions["a"].inbox.put_nowait(Preempted("a"))
    await settle()
    assert pull.cancelled
    assert [len(needs) for needs in worker.needs(*"bcd")] == [1, 1, 1]
    assert leader_ended or sent == [Yielded("a")]
    worker.assign("d")
    await settle()
    worker.pulls[1].end.set_result(None)
    await worker.finish(*"bcd")


async def test_the_end_of_the_worker_ends_all(worker):
    pull = await four(worker)
    worker.tasks["a"].cancel()
    await settle()
    for session in worker.sessions.values():
        session.inbox.put_nowait(Unavailable("the worker ends"))
    await asyncio.wait(worker.tasks.values(), timeout=5)
    assert pull.cancelled
    assert all(task.done() for task in worker.tasks.values())
    for id in "bcd":
        assert isinstance(worker.tasks[id].exception(), Unavailable)


async def test_a_leader_that_ends_while_the_cut_block_is_copied_still_shares_the_prompt(worker, monkeypatch):
    pull = await four(worker)
    keep = worker.cut_blocks.keep

    async def cancelled_meanwhile(key, blocks):
        worker.tasks["a"].cancel()
        await asyncio.sleep(0)
        await keep(key, blocks)

    monkeypatch.setattr(worker.cut_blocks, "keep", cancelled_meanwhile)
    pull.end.set_result(None)
    await settle()
    monkeypatch.undo()
    await worker.finish(*"bcd")
    assert len(worker.pulls) == 1


async def test_a_defect_of_the_leader_leaves_no_follower_waiting(worker, monkeypatch):
    pull = await four(worker)
    monkeypatch.setattr(worker.cut_blocks, "keep", AsyncMock(side_effect=IndexError("outside the cache")))
    pull.end.set_result(None)
    await settle()
    monkeypatch.undo()
    assert isinstance(worker.tasks["a"].exception(), IndexError)
    worker.assign("b")
    await settle()
    assert worker.pulls[1].held == 8, "its full blocks are in place"
    worker.pulls[1].end.set_result(None)
    await worker.finish(*"bcd")


@pytest.mark.parametrize("seed", [*range(40), 599, 1077, 1122])  # the last ones have found defects
async def test_no_order_of_events_leaves_a_sequence_waiting(worker, monkeypatch, seed):
    draw = random.Random(seed)
    ids, cancelled = "abcdefg"[: draw.randint(3, 7)], set()
    for id in ids:
        prompt, answer_start = draw.choice([(PROMPT, START), (PROMPT, START), (PROMPT, 8), (SAME_BEGINNING, 13)])
        worker.add(id, assigned=draw.random() < 0.5, answer_start=answer_start, prompt=prompt)

    def live():
        return [id for id in ids if not worker.tasks[id].done() and id not in cancelled]

    late, take = [], worker.engine._emit
    monkeypatch.setattr(worker.engine, "_emit", late.extend)  # events of the engine arrive some time later

    for _ in range(40):
        for _ in range(draw.randint(0, 4)):
            await asyncio.sleep(0)
        if draw.random() < 0.5:
            take(late)
            late.clear()
        running = [pull for pull in worker.pulls if pull.running]
        event, id = draw.randrange(8), draw.choice(live() or ids)
        if event == 0 and running:
            draw.choice(running).end.set_result(None)
        elif event == 1 and running:
            draw.choice(running).end.set_exception(TransferFailed("stalled"))
        elif event == 2:
            cancelled.add(id)
            worker.tasks[id].cancel()
        elif event in (3, 4):
            worker.assign(id)
        elif event == 5:
            worker.preempt(id)
        elif event == 6:
            worker.engine.step()
        worker.prefix.check_integrity()
    monkeypatch.undo()
    take(late)
    for _ in range(20):
        await settle()
        for id in live():
            if worker.needs(id)[0] or not worker.has_prompt(id):  # the router knows that it needs a prefill worker
                worker.assign(id)
        await settle()
        for pull in worker.pulls:
            if pull.running:
                pull.end.set_result(None)
        await settle()
        worker.engine.step()
    await settle()
    assert all(task.done() for task in worker.tasks.values())
    for id in set(ids) - cancelled:
        worker.tasks[id].result()
        assert worker.tokens(id) == [44, 45, 46]

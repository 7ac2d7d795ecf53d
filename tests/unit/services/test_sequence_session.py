"""Tests the messages that a session of one attempt sends to the engine, for different orders of events."""

import asyncio
import gc
import weakref
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from counting import CountingRunner

from overfill.engine.decode import DecodeEngine
from overfill.engine.sequence import (
    DecodeSequence,
    DecodeState,
    FinishReason,
    Preempted,
    Release,
    Reserve,
    Reserved,
    SequenceFailed,
    Start,
    StepSampled,
    StopRule,
    Yielded,
)
from overfill.errors import InternalError, StepFailed, TransferFailed, Unavailable
from overfill.kv.blocks import BlockPool
from overfill.kv.ranks import RankLost
from overfill.kv.receiver import PullStats
from overfill.model.steps import SampledToken
from overfill.request.params import SamplingParams
from overfill.telemetry.metrics import DecodeMetrics
from overfill.v1 import common_pb2, decode_pb2
from services.decode.sequence_session import PullEnded, SequenceSession
from services.decode.servicer import DecodeServicer


class Pull:
    """A pull whose steps the test takes; after a cancellation it holds its blocks for a while."""

    codec = common_pb2.KV_CODEC_RAW

    def __init__(self):
        self.stats = PullStats()
        self.done = asyncio.Event()
        self.let_go = asyncio.Event()
        self.running = self.cancelled = False
        self.error = None

    def end(self, error=None):
        self.error = error
        self.done.set()
        self.let_go.set()

    async def run(self, timeout, on_first_token, on_in_place):
        self.running = True
        self.on_in_place = on_in_place
        try:
            await self.done.wait()
            if self.error is not None:
                raise self.error
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            await self.let_go.wait()
            self.running = False


class SessionHarness:
    """A session with a real engine core and a scripted handoff."""

    def __init__(self):
        self.servicer = DecodeServicer(SimpleNamespace(blocks_of=None, ranks=()), None, None, None)
        self.transfers, self.cut_blocks = {}, None
        self.pool = BlockPool(8, 4)
        self.engine = DecodeEngine(CountingRunner(), self.pool, 8, 512, self.take)
        sequence = DecodeSequence("s", [1, 2, 3], [7], SamplingParams(temperature=0), StopRule(frozenset(), 4))
        self.sent = []
        self.told = []
        self.pulls = []
        self.own, self.load, self.metrics = None, decode_pb2.WorkerLoad, DecodeMetrics()
        served = SimpleNamespace(
            start=decode_pb2.StartDecode(emitted_token_ids=[7]),
            commands=asyncio.Queue(),
            put=self.told.append,
            put_token=lambda index, token: self.told.append(
                decode_pb2.SequenceUpdate(tokens=decode_pb2.Tokens(first_index=index, ids=[token]))
            ),
            time_left=lambda: None,
        )
        self.session = SequenceSession(served, sequence, self)

    def own_assignment(self, prompt_tokens):
        return self.own

    def take(self, events):
        self.servicer._sessions["s"] = self.session
        self.servicer.on_events(events)

    def send(self, message):
        self.sent.append(message)
        self.engine.handle(message)

    @asynccontextmanager
    async def new_handoff(self, target, session):
        self.pulls.append(Pull())
        yield self.pulls[-1]

    async def assign(self):
        """Assigns a prefill worker and returns the pull that follows, if one does."""
        before = len(self.pulls)
        self.session.inbox.put_nowait(decode_pb2.AssignPrefill(worker_id="p"))
        await settle()
        return self.pulls[-1] if len(self.pulls) > before else None

    def preempt(self):
        self.session.sequence.state = DecodeState.YIELDING  # as the engine does
        self.session.inbox.put_nowait(Preempted("s"))

    @property
    def kinds(self):
        """Kinds of the updates that the router has got."""
        return [update.WhichOneof("message") for update in self.told]


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def harness():
    harness = SessionHarness()
    harness.task = asyncio.ensure_future(harness.session.run())
    await settle()
    yield harness
    for pull in harness.pulls:
        pull.let_go.set()
    harness.task.cancel()
    await asyncio.wait([harness.task])
    assert harness.pool.num_used == 0
    harness.pool.check_integrity()


async def test_the_end_of_a_pull_that_was_given_up_starts_nothing(harness):
    pull = await harness.assign()
    sequence = harness.session.sequence
    # The pull has finished already when the session hears of the preemption.
    harness.preempt()
    harness.session.inbox.put_nowait(PullEnded(1, "p", None))
    pull.let_go.set()
    await settle()
    assert isinstance(harness.sent[-1], Yielded)
    harness.engine.step()  # the engine gives it new blocks
    await settle()
    assert sequence.state is DecodeState.RECEIVING, "new blocks hold no KV yet"
    assert sequence.computed == 0


@pytest.mark.parametrize("error", [StepFailed("prefill failed"), InternalError("bug"), Unavailable("gone")])
async def test_the_router_learns_that_a_failed_step_has_ended_the_prefill_worker(harness, error):
    pull = await harness.assign()
    pull.end(error)
    await settle()
    need = harness.told[-1].need_prefill
    assert (need.worker_id, need.detail) == ("p", str(error))
    assert need.reason == decode_pb2.NeedPrefill.REASON_PREFILL_FAILED
    assert need.step_failed == isinstance(error, StepFailed)


async def test_a_lost_rank_of_this_worker_ends_the_attempt(harness):
    """Another prefill worker could not help, and the router would give up after a few."""
    pull = await harness.assign()
    pull.end(RankLost("rank 1 is lost"))
    with pytest.raises(Unavailable, match="rank 1 is lost"):
        await harness.task
    assert harness.kinds == ["reserved"]


async def test_the_router_learns_of_a_failed_step_of_this_worker(harness):
    failure = SequenceFailed("s", RuntimeError("no memory"), ends_engine=True)
    harness.session.inbox.put_nowait(failure)
    with pytest.raises(StepFailed, match="decode failed and ended its worker: no memory"):
        await harness.task


async def test_a_failed_pull_that_was_given_up_asks_for_nothing(harness):
    pull = await harness.assign()
    harness.preempt()
    harness.session.inbox.put_nowait(PullEnded(1, "p", Unavailable("gone")))
    pull.let_go.set()
    await settle()
    assert harness.kinds == ["reserved"]


async def test_blocks_are_given_up_only_when_the_pull_has_let_go_of_them(harness):
    pull = await harness.assign()
    harness.preempt()
    await settle()
    assert pull.running
    assert not any(isinstance(m, Yielded) for m in harness.sent)
    pull.let_go.set()
    await settle()
    assert isinstance(harness.sent[-1], Yielded)


async def test_cancelled_twice_it_still_waits_for_the_pull_before_the_engine_forgets(harness):
    pull = await harness.assign()
    for _ in range(2):
        harness.task.cancel()
        await settle()
    assert pull.running
    assert not any(isinstance(m, Release) for m in harness.sent)
    pull.let_go.set()
    await asyncio.wait([harness.task])
    assert isinstance(harness.sent[-1], Release)


async def test_decoding_starts_before_the_prefill_worker_has_said_its_last_word(harness):
    pull = await harness.assign()
    pull.on_in_place()
    await settle()
    assert isinstance(harness.sent[-1], Start)
    while harness.engine.step():
        await settle()
    assert harness.told[-1].WhichOneof("message") == "done"
    assert not harness.task.done(), "the blocks are released after the pull"
    pull.end()
    await asyncio.wait([harness.task])
    assert not pull.cancelled, "the prefill worker would count the handoff as cancelled"
    assert isinstance(harness.sent[-1], Release)


async def test_the_first_decoded_token_tells_of_the_handoff_for_a_router_that_ends_the_answer(harness):
    harness.session.sequence.stop = StopRule(frozenset(), 5)
    pull = await harness.assign()
    pull.stats.cached_tokens, pull.stats.peer_tokens, pull.stats.disk_tokens = 3, 2, 1
    pull.end()
    pull.on_in_place()
    await settle()
    while harness.engine.step():
        await settle()
    *tokens, done = harness.told[1:]
    assert [update.tokens.HasField("so_far") for update in tokens] == [True, False, False, False]
    so_far = tokens[0].tokens.so_far
    assert (so_far.codec, so_far.prefill_worker_id) == (common_pb2.KV_CODEC_RAW, "p")
    usage = so_far.usage
    assert (usage.cached_tokens, usage.peer_tokens, usage.disk_tokens) == (3, 2, 1)
    assert 0 < so_far.decode_ns < done.done.decode_ns


async def test_the_cached_tokens_are_those_of_the_first_prefill_that_began(harness):
    """A second one finds the blocks that a first one left, which a broken transfer ended before its first token."""
    for cached, error in ((None, Unavailable("full")), (0, TransferFailed("damaged")), (2, None)):
        pull = await harness.assign()
        pull.stats.cached_tokens = cached
        if error is None:
            pull.on_in_place()
        pull.end(error)
        await settle()
    while harness.engine.step():
        await settle()
    assert harness.told[-1].done.usage.cached_tokens == 0


async def test_an_error_after_the_kv_is_in_place_asks_for_no_other_prefill(harness):
    pull = await harness.assign()
    pull.on_in_place()
    pull.end(Unavailable("gone"))
    await settle()
    assert harness.kinds == ["reserved"]


async def test_new_blocks_after_the_kv_was_in_place_take_the_next_assignment(harness):
    """vLLM preempts a running sequence without ``Preempted``; its second ``Reserved`` is all that the session sees."""
    for number in range(3):
        pull = await harness.assign()
        assert len(harness.pulls) == number + 1, "the router holds a prefill slot for the assignment"
        pull.on_in_place()
        await settle()
        assert [type(message) for message in harness.sent[1:]] == [Start] * (number + 1)
        harness.session.inbox.put_nowait(Reserved("s", [number], 0))
        await settle()
        assert harness.session.blocks != [number], "the prefill worker has not said its last word"
        pull.end()
        await settle()
        assert not pull.cancelled, "the prefill worker would count the handoff as cancelled"
        assert harness.session.blocks == [number]
        assert harness.kinds == ["reserved"] + ["need_prefill"] * (number + 1)
        assert harness.told[-1].need_prefill.reason == decode_pb2.NeedPrefill.REASON_PREEMPTED


async def test_new_blocks_give_up_a_pull_into_the_old_ones(harness):
    pull = await harness.assign()
    harness.session.inbox.put_nowait(Reserved("s", [5], 0))
    pull.let_go.set()
    await settle()
    assert pull.cancelled
    assert harness.session.blocks == [5]
    assert (await harness.assign()).running


async def test_an_unrequested_assignment_is_ignored(harness):
    pull = await harness.assign()
    pull.on_in_place()
    pull.end()
    await settle()
    assert await harness.assign() is None


async def test_a_refusal_carries_the_load():
    harness = SessionHarness()
    harness.pool.acquire("other", 8)
    harness.load = lambda: decode_pb2.WorkerLoad(kv_blocks_used=8)
    await harness.session.run()
    (update,) = harness.told
    assert update.refused.load.kv_blocks_used == 8
    assert isinstance(harness.sent[0], Reserve)


@pytest.mark.parametrize("tried", ["p", "d", ""])
async def test_a_draining_worker_with_both_stages_prefills_its_own_sequences(tried):
    """No router assigns it a prompt any more, and it may be the only one that prefills."""
    harness = SessionHarness()
    harness.own = decode_pb2.AssignPrefill(worker_id="d")
    if tried:
        harness.session.start.assign_prefill.worker_id = tried
    task = asyncio.ensure_future(harness.session.run())
    await settle()
    (first,) = harness.pulls
    first.end(Unavailable("gone"))
    await settle()
    if tried == "p":
        assert harness.kinds == ["reserved"]
        assert harness.pulls[1].running, "it takes the prompt itself"
        harness.pulls[1].let_go.set()
    else:
        assert harness.kinds == ["reserved", "need_prefill"], "it does not try itself again and again"
    task.cancel()
    await asyncio.wait([task])


async def test_a_session_that_waits_when_its_worker_begins_to_drain_takes_the_workers_own_assignment(harness):
    assert harness.kinds == ["reserved"], "it waits for the router"
    harness.session.inbox.put_nowait(decode_pb2.AssignPrefill(worker_id="d"))  # as ``DecodeServicer.on_drain`` does
    await settle()
    (pull,) = harness.pulls
    assert pull.running


def first_tokens(harness):
    """The messages with index 0 that the router has got."""
    return [update.tokens for update in harness.told if update.HasField("tokens") and not update.tokens.first_index]


@pytest.mark.parametrize("stop", [(), (40,)])
async def test_the_full_model_s_scores_reach_the_router_also_if_its_token_ends_the_answer(stop):
    harness = SessionHarness()
    sequence = harness.session.sequence
    sequence.emitted.clear()
    sequence.stop = StopRule(frozenset(stop), 4)
    harness.session = SequenceSession(harness.session._served, sequence, harness)
    task = asyncio.ensure_future(harness.session.run())
    await settle()
    pull = await harness.assign()
    pull.release = lambda: True
    scores = common_pb2.PromptLogprobs(logprobs=[-1, -2], ranks=[1, 2])
    harness.session.take_first(decode_pb2.Tokens(ids=[40], prompt_logprobs=scores))
    (told,) = first_tokens(harness)
    assert (list(told.ids), told.prompt_logprobs) == ([] if stop else [40], scores)
    await settle()
    assert harness.kinds[-1] == ("done" if stop else "tokens")
    pull.end()
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("stop", [(), (4,)])
async def test_scores_of_both_models_come_with_the_decoder_s_first_token(stop):
    harness = SessionHarness()
    sampling = SamplingParams(temperature=0, prompt_logprobs=0)
    sequence = DecodeSequence("s", [5, 1, 2, 3], [], sampling, StopRule(frozenset(stop), 1), answer_start=2)
    sequence.scores = common_pb2.PromptLogprobs()
    harness.session = SequenceSession(harness.session._served, sequence, harness)
    assert (harness.session.wants_first_token, harness.session.wants_scores) == (False, True)
    task = asyncio.ensure_future(harness.session.run())
    await settle()
    pull = await harness.assign()
    of_full = common_pb2.PromptLogprobs(logprobs=[-7], ranks=[9])
    harness.session.take_first(decode_pb2.Tokens(prompt_logprobs=of_full, prefill_queue_ns=3))
    pull.on_in_place()
    pull.end()
    await settle()
    assert first_tokens(harness) == []
    harness.engine.step()
    await settle()
    (told,) = first_tokens(harness)
    assert list(told.ids) == ([] if stop else [4])
    assert list(told.prompt_logprobs.ranks) == [9, 1]
    assert told.prefill_queue_ns == 3
    assert harness.kinds[-1] == "done"
    await task


@pytest.mark.parametrize("times", [{}, {"prefill_queue_ns": 3, "prefill_compute_ns": 4, "return_ns": 5}])
async def test_the_decoder_s_first_token_brings_the_times_before_it(times):
    """Without a prefill of its own, the prompt's KV came from another sequence."""
    harness = SessionHarness()
    sampling = SamplingParams(temperature=0)
    sequence = DecodeSequence("s", [5, 1, 2, 3], [], sampling, StopRule(frozenset(), 2), answer_start=2)
    harness.session = SequenceSession(harness.session._served, sequence, harness)
    harness.session.start.adapter_digest = "d"
    assert (harness.session.wants_first_token, harness.session.wants_scores) == (False, False)
    task = asyncio.ensure_future(harness.session.run())
    await settle()
    pull = await harness.assign()
    pull.stats.cached_tokens = 1
    if times:
        pull.stats.first_token_ns = 1
        harness.session.take_first(decode_pb2.Tokens(**times))
    pull.on_in_place()
    pull.end()
    await settle()
    while harness.engine.step():
        await settle()
    first, second = first_tokens(harness), harness.told[-2].tokens
    assert [list(told.ids) for told in (*first, second)] == [[4], [5]]
    told = {field.name: value for field, value in first[0].ListFields()}
    assert {name: told.get(name) for name in times} == times
    assert told["handoff_ns"] >= 0
    assert told["first_step_ns"] > 0
    assert (told["so_far"].adapter_digest, told["so_far"].usage.cached_tokens) == ("d", 1)
    assert not told["so_far"].HasField("handoff_exposed_ns")
    assert not second.HasField("first_step_ns")
    assert harness.told[-1].done.adapter_digest == "d"
    await task


def sampled(index, finish=None, **scores):
    token, finishes = 40 + index, {"s": finish} if finish else {}
    return [StepSampled(1, ["s"], [index], [token], finishes, {"s": SampledToken(token, **scores)} if scores else {})]


async def test_a_token_reaches_the_router_without_a_turn_of_the_loop(harness):
    before = len(harness.told)
    for index in (1, 2):
        harness.take(sampled(index))
    harness.take(sampled(3, logprob=-1.0, top=[]))
    harness.take(sampled(4, FinishReason.LENGTH))
    told = [update.tokens for update in harness.told[before:]]
    assert [(one.first_index, list(one.ids), len(one.logprobs)) for one in told] == [
        (1, [41], 0), (2, [42], 0), (3, [43], 1), (4, [44], 0)
    ]  # fmt: skip
    await harness.task
    assert (harness.kinds[-1], harness.told[-1].done.usage.completion_tokens) == ("done", 5)
    harness.take(sampled(5))
    assert harness.kinds[-1] == "done", "nothing follows the end"


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (decode_pb2.Evict(reason="moved"), Unavailable),
        (SequenceFailed("s", RuntimeError("a bug")), InternalError),
        (Unavailable("the worker shuts down"), Unavailable),
        (FinishReason.STOP, None),
    ],
)
async def test_a_token_never_overtakes_what_came_before_it(harness, item, error):
    harness.session.inbox.put_nowait(item)
    harness.take(sampled(1))
    await asyncio.wait([harness.task])
    assert type(harness.task.exception()) is (error or type(None))
    assert "tokens" not in harness.kinds


async def test_a_token_waits_while_the_session_handles_an_event(harness):
    pull = await harness.assign()
    pull.on_in_place()
    await settle()
    harness.session.inbox.put_nowait(Reserved("s", [1], 0))  # waits for the prefill worker's last word
    await settle()
    harness.take(sampled(1))
    assert harness.kinds == ["reserved"]
    pull.end()
    await settle()
    assert harness.kinds == ["reserved", "need_prefill", "tokens"]


@pytest.mark.parametrize("tokens", [2, 3])
async def test_a_token_that_cannot_be_told_fails_its_own_sequence(harness, tokens):
    harness.session._served.put_token = lambda index, token: 1 / (index - 2)
    for index in range(1, 1 + tokens):
        harness.take(sampled(index))
    with pytest.raises(ZeroDivisionError):
        await harness.task


async def test_a_session_that_was_cancelled_leaves_no_garbage(harness):
    """A processor takes memory, with tensor parallelism in other processes, until nothing refers to it."""
    session = weakref.ref(harness.session)
    gc.disable()
    try:
        harness.task.cancel()
        await asyncio.wait([harness.task])
        harness.task = asyncio.ensure_future(settle())
        harness.servicer._sessions.clear()
        del harness.session
        assert session() is None
    finally:
        gc.enable()

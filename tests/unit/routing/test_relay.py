"""Tests a request from its first attempt to its answer, with scripted workers that refuse, fail or vanish."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import Mock

import pytest

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    RequestCancelled,
    StepFailed,
    TransferFailed,
    Unavailable,
)
from overfill.kv.keys import PromptKeys
from overfill.routing import attempt
from overfill.routing.answer import AnswerDelta
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.job import Job
from overfill.routing.pool import Roster
from overfill.routing.relay import Relay
from overfill.routing.stream import Receive
from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import PREFILL
from overfill.telemetry import tracing
from overfill.v1 import common_pb2, decode_pb2, kv_pb2, registry_pb2

NEED = decode_pb2.NeedPrefill
STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH


@dataclass
class FakeStream:
    """The decode worker's end of a stream, which the test controls."""

    worker: str
    receive: Receive
    sent: asyncio.Queue = field(default_factory=asyncio.Queue)
    closed: bool = False

    def send(self, number, command):
        self.sent.put_nowait(command)

    def close(self, number):
        self.closed = True

    def say(self, **update):
        self.receive(decode_pb2.SequenceUpdate(**update))

    def tokens(self, first, *ids, **more):
        self.say(tokens=decode_pb2.Tokens(first_index=first, ids=ids, **more))

    def done(self, reason=STOP, **more):
        self.say(done=decode_pb2.DecodeDone(reason=reason, **more))

    def fail(self, error):
        self.receive(error)

    async def start(self):
        return (await self.sent.get()).start

    async def assigned(self):
        return (await self.sent.get()).assign_prefill

    async def accept(self):
        """Answers Reserved; returns Start and the id of the assigned prefill worker."""
        start = await self.start()
        self.say(reserved=decode_pb2.Reserved(blocks=1, reservation_ns=5))
        target = start.assign_prefill if start.HasField("assign_prefill") else await self.assigned()
        return start, target.worker_id


class Stack:
    """Two decode and two prefill workers, with one or more requests."""

    def __init__(self, roster, report):
        self.roster = roster
        self.dispatcher = Dispatcher(roster, max_queue=4, absent_after=0.0)
        self.async_dispatcher = AsyncDispatcher(self.dispatcher)
        self.streams = asyncio.Queue()
        self._report = report

    def open(self, worker, receive):
        stream = FakeStream(worker.id, receive)
        self.streams.put_nowait(stream)
        return stream, 1

    async def stream(self):
        return await self.streams.get()

    async def accepted(self):
        """Returns the next stream, whose worker has reserved blocks and has its prefill worker."""
        stream = await self.stream()
        await stream.accept()
        return stream

    def report(self, worker_id, **report):
        pool = self.roster.decode[DEFAULT_TIER] if worker_id.startswith("d") else self.roster.prefill
        pool.report(pool.get(worker_id), self._report(**report), asyncio.get_running_loop().time())
        self.async_dispatcher.poll()

    def assert_nothing_in_flight(self):
        assert [w.in_flight for w in self.roster.workers()] == [0] * len(self.roster.workers())
        assert self.dispatcher.num_jobs == self.dispatcher.num_waiting == 0

    @asynccontextmanager
    async def request(
        self, *, emitted=(), max_tokens=4, timeout=None, max_attempts=3, grammar=None, prompt=(1, 2, 3), **more
    ):
        now = asyncio.get_running_loop().time()
        start = decode_pb2.StartDecode(
            request_id="r",
            prompt_token_ids=prompt,
            sampling=common_pb2.SamplingParams(seed=1, max_tokens=max_tokens, grammar=grammar),
            eos_token_ids=(0,),
            emitted_token_ids=emitted,
        )
        deadline = None if timeout is None else now + timeout
        request = Job(start=start, prompt_token_ids=prompt, received=now, deadline=deadline, **more)
        relay = Relay(request, self.async_dispatcher, self, max_attempts=max_attempts)
        relay.start()
        try:
            yield relay
        finally:
            relay.close()
            self.assert_nothing_in_flight()

    @asynccontextmanager
    async def running(self, **request):
        """A request whose first worker has accepted it: its relay and the stream."""
        async with self.request(**request) as relay:
            yield relay, await self.accepted()


@pytest.fixture
async def stack(add_worker, make_report):
    roster = Roster()
    now = asyncio.get_running_loop().time()
    for name in ("d0", "d1"):
        add_worker(roster, name, now=now)
    for name in ("p0", "p1"):
        add_worker(roster, name, PREFILL, now=now)
    return Stack(roster, make_report)


async def read_all(relay):
    """Reads the answer to its end; returns batches of tokens with their first index, and the end."""
    batches = []
    while isinstance(event := await relay.answer.next(), AnswerDelta):
        batches.append((event.first_index, event.token_ids))
    return batches, event


def flat(batches):
    return [token for _, ids in batches for token in ids]


async def until(condition):
    """Lets the event loop run until ``condition`` holds."""
    while not condition():
        await asyncio.sleep(0)


async def test_an_answer_comes_from_one_worker(stack):
    async with stack.request() as relay:
        stream = await stack.stream()
        start, prefill = await stream.accept()
        assert start.request_id == "r"
        assert start.attempt == 0
        assert list(start.prompt_token_ids) == [1, 2, 3]
        assert list(start.emitted_token_ids) == []
        assert start.expected_incarnation == 1
        assert not start.HasField("time_left_ns")
        assert (start.sampling.seed, start.sampling.max_tokens) == (1, 4)
        assert list(start.eos_token_ids) == [0]
        stream.tokens(0, 7, prefill_queue_ns=1, prefill_compute_ns=2, return_ns=3)
        assert (await relay.answer.next()).token_ids == [7]
        stream.tokens(1, 8)
        stream.done(usage=common_pb2.Usage(cached_tokens=2), handoff_exposed_ns=4, decode_ns=6)
        batches, finish = await read_all(relay)
        assert batches == [(1, [8])]
        assert finish.reason == STOP
        assert finish.usage == common_pb2.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=2)
        assert (relay.decode_worker, relay.answer.prefill_worker) == (stream.worker, prefill)
        engines = (relay.decode_engine, relay.answer.prefill_engine)
        assert engines == (f"engine of {stream.worker}", f"engine of {prefill}")
        assert relay.answer.migrations == 0
        timing = relay.answer.timing
        assert timing.HasField("router_queue_ns")
        assert timing.decode_reservation_ns == 5
        assert (timing.prefill_queue_ns, timing.prefill_compute_ns, timing.return_path_ns) == (1, 2, 3)
        assert (timing.handoff_exposed_ns, timing.decode_ns) == (4, 6)


async def test_a_worker_that_has_the_prompt_needs_no_prefill_worker_until_it_asks_for_one(stack):
    async with stack.request() as relay:
        stream = await stack.stream()
        assert (await stream.start()).HasField("assign_prefill")
        stream.say(reserved=decode_pb2.Reserved(has_prompt=True))
        assert not any(worker.in_flight for worker in stack.roster.prefill)
        assert relay.answer.prefill_worker == ""
        stream.say(need_prefill=decode_pb2.NeedPrefill(reason=decode_pb2.NeedPrefill.REASON_PREFILL_FAILED))
        assert (await stream.assigned()).worker_id == relay.answer.prefill_worker
        assert sum(worker.in_flight for worker in stack.roster.prefill) == 1


async def test_no_prefill_slot_is_held_while_a_grammar_is_compiled(stack):
    async with stack.request(grammar=common_pb2.Grammar(regex="a+")):
        stream = await stack.stream()
        assert not (await stream.start()).HasField("assign_prefill")
        assert not any(worker.in_flight for worker in stack.roster.prefill)
        stream.say(reserved=decode_pb2.Reserved())
        assert (await stream.assigned()).worker_id


async def test_a_refusal_moves_the_request_to_another_worker(stack):
    async with stack.request() as relay:
        first = await stack.stream()
        await first.start()
        first.say(refused=decode_pb2.Refused(reason="full"))
        second = await stack.stream()
        assert first.closed
        start, _ = await second.accept()
        assert second.worker != first.worker
        assert start.attempt == 1
        second.tokens(0, 7)
        second.done()
        assert (await read_all(relay))[0] == [(0, [7])]
        assert relay.answer.migrations == 0


async def test_the_load_in_a_refusal_is_the_workers_latest(stack):
    async with stack.request():
        stream = await stack.stream()
        await stream.start()
        load = decode_pb2.WorkerLoad(kv_blocks_used=99, kv_blocks_total=100, block_size=16)
        stream.say(refused=decode_pb2.Refused(reason="full", load=load))
        await stack.stream()
        worker = stack.roster.decode[DEFAULT_TIER].get(stream.worker)
        assert worker.report.load == load
        assert worker.paused_until_report, "the worker takes new requests after its next report"


@pytest.mark.parametrize("fault", ["_finish", "refused", "lost"])
async def test_a_fault_in_the_router_ends_the_request_and_holds_nothing(stack, monkeypatch, fault):
    async with stack.request() as relay:
        broken = relay if fault == "_finish" else stack.dispatcher
        monkeypatch.setattr(broken, fault, Mock(side_effect=RuntimeError("a bug")))
        stream = await stack.stream()
        await (stream.start() if fault == "refused" else stream.accept())
        match fault:
            case "refused":
                stream.say(refused=decode_pb2.Refused(reason="full"))
            case "lost":
                stream.fail(Unavailable("gone"))
            case _:
                stream.done()
        with pytest.raises(InternalError, match="the router failed: a bug"):
            await relay.answer.next()
        stack.assert_nothing_in_flight()


async def test_a_worker_to_which_no_stream_opens_ends_the_request(stack, monkeypatch):
    monkeypatch.setattr(stack, "open", Mock(side_effect=ValueError("no certificate")))
    async with stack.request() as relay:
        with pytest.raises(InternalError, match="no certificate"):
            await relay.answer.next()
        stack.assert_nothing_in_flight()


@pytest.mark.parametrize("said", ["tokens", "done"])
async def test_what_an_adapter_wrote_without_being_asked_is_refused_by_name(stack, said):
    adapted = decode_pb2.DecodeDone(adapter_digest="d")
    async with stack.running() as (relay, stream):
        stream.say(**{said: adapted if said == "done" else decode_pb2.Tokens(ids=[5], so_far=adapted)})
        with pytest.raises(Incompatible, match="adapter 'd'") as caught:
            await relay.answer.next()
        assert caught.value.fields == ("adapter_digest",)
        stack.assert_nothing_in_flight()


@pytest.mark.parametrize("with_start", [True, False])
async def test_an_assignment_names_the_worker_from_which_to_borrow_kv(stack, with_start):
    now = asyncio.get_running_loop().time()
    for worker in stack.roster.prefill:
        worker.info = replace(worker.info, lends_kv=True)
        stack.report(worker.id, credits=0)
    holder, keys = stack.roster.prefill.get("p1"), PromptKeys(7, range(100))
    report = registry_pb2.Report(ready=True, prefix=registry_pb2.PrefixDelta(added=list(keys(16))))
    report.load.block_size, report.load.kv_blocks_total = 16, 100
    stack.roster.prefill.report(holder, report, now)
    grammar = None if with_start else common_pb2.Grammar(regex="a*")
    stack.report("p0", credits=1)
    async with stack.request(grammar=grammar, block_keys=keys, prompt=range(100)):
        stream = await stack.stream()
        start = await stream.start()
        stream.say(reserved=decode_pb2.Reserved(blocks=1))
        assert start.HasField("assign_prefill") is with_start
        assigned = start.assign_prefill if with_start else await stream.assigned()
    assert assigned.worker_id == "p0"
    assert assigned.holder == kv_pb2.KvHolder(
        worker_id="p1", incarnation=1, address="p1:1", data_addresses=holder.info.data_addresses, tokens=96
    )


@pytest.mark.parametrize("wrote", ["", "other"])
async def test_only_the_adapter_that_was_asked_for_writes_the_answer(stack, wrote):
    async with stack.running() as (relay, stream):
        relay.request.start.adapter_digest = "asked"
        stream.say(done=decode_pb2.DecodeDone(adapter_digest=wrote))
        with pytest.raises(Incompatible, match=f"adapter '{wrote}' wrote the answer; the request's is 'asked'"):
            await relay.answer.next()


@pytest.mark.parametrize("error", [Unavailable("gone"), InternalError("bug"), TransferFailed("bad")])
async def test_a_lost_worker_is_followed_by_another_that_knows_the_tokens(stack, error):
    async with stack.running() as (relay, first):
        first.tokens(0, 7, 8)
        first.fail(error)
        second = await stack.stream()
        start, _ = await second.accept()
        assert second.worker != first.worker
        assert (start.attempt, list(start.emitted_token_ids)) == (1, [7, 8])
        second.tokens(2, 9)
        second.done()
        batches, finish = await read_all(relay)
        assert flat(batches) == [7, 8, 9]
        assert finish.usage.completion_tokens == 3
        assert relay.answer.migrations == 1


@pytest.mark.parametrize("bad", [(1, 9), (0, 8)])
async def test_a_gap_or_a_contradiction_ends_the_attempt_not_the_answer(stack, bad):
    async with stack.running() as (relay, first):
        if bad[0] == 0:
            first.tokens(0, 7)
        first.tokens(*bad)
        second = await stack.stream()
        start, _ = await second.accept()
        second.tokens(len(start.emitted_token_ids), 5)
        second.done()
        batches, _ = await read_all(relay)
        assert flat(batches) == [*start.emitted_token_ids, 5]


@pytest.mark.parametrize(("attempts", "tokens"), [(3, 2), (16, 16)])
async def test_after_too_many_lost_workers_the_error_says_how_far_it_came(stack, attempts, tokens):
    """Tokens give a request more attempts, but not without end."""
    async with stack.request(max_attempts=2, max_tokens=100) as relay:
        for attempt in range(attempts):
            stream = await stack.accepted()
            if attempt < tokens:
                stream.tokens(attempt, 7)
            stream.fail(InternalError("bug"))
        with pytest.raises(Unavailable, match=f"{attempts} attempts; {tokens} tokens had been produced; .*: bug"):
            await read_all(relay)


class Ended:
    """Ends the workers of either stage, one after the other, as they say themselves: by a failed step of theirs."""

    def __init__(self, stack):
        self._stack = stack
        self._stream = None
        self.names = []

    async def decode(self, error=None):
        """Without ``error``, the worker says that its step failed."""
        if self._stream is None:
            self._stream = await self._stack.stream()
            await self._stream.accept()
        self.names.append(self._stream.worker)
        self._stream.fail(error or StepFailed("decode failed"))
        self._stream = None
        await asyncio.sleep(0)
        self._stack.report(self.names[-1])  # another process takes the worker's place

    async def prefill(self, step_failed=True):
        if self._stream is None:
            self._stream = await self._stack.stream()
            _, worker = await self._stream.accept()
        else:
            worker = (await self._stream.assigned()).worker_id
        self.names.append(worker)
        failed = NEED(
            reason=NEED.REASON_PREFILL_FAILED, worker_id=worker, step_failed=step_failed, detail="prefill failed"
        )
        self._stream.say(need_prefill=failed)
        self._stack.report(worker)


@pytest.mark.parametrize("stages", ["decode decode", "prefill prefill", "prefill decode", "decode prefill"])
async def test_a_request_whose_failed_steps_have_ended_two_workers_is_refused(stack, stages):
    ended = Ended(stack)
    async with stack.request(max_attempts=10) as relay:
        for stage in stages.split():
            await getattr(ended, stage)()
        with pytest.raises(
            InvalidRequest, match=r"is not tried again; 0 tokens .*: (decode|prefill) failed"
        ) as refused:
            await relay.answer.next()
        assert "ended the workers {} and {},".format(*ended.names) in str(refused.value)
        assert stack.streams.empty()


async def test_tokens_between_two_failed_steps_do_not_save_a_request(stack):
    async with stack.request(max_attempts=10) as relay:
        for attempt in range(2):
            stream = await stack.accepted()
            stream.tokens(attempt, 7)
            stream.fail(StepFailed("decode failed"))
        with pytest.raises(InvalidRequest, match="2 tokens had been produced"):
            await read_all(relay)


async def test_workers_that_are_lost_without_a_report_count_as_attempts_only(stack):
    ended = Ended(stack)
    async with stack.request(max_attempts=6) as relay:
        await ended.decode()  # one failed step is allowed
        for _ in range(2):
            await ended.decode(Unavailable("killed"))
            await ended.decode(InternalError("the step failed, and the worker goes on"))
        await ended.decode(Unavailable("killed"))
        with pytest.raises(Unavailable, match="gave up after 6 attempts"):
            await relay.answer.next()
    async with stack.request(max_attempts=4) as relay:
        for _ in range(3):
            await ended.prefill(step_failed=False)
        await ended.prefill()
        with pytest.raises(Unavailable, match="gave up after 4 failed prefills"):
            await relay.answer.next()


async def test_a_worker_that_a_failed_step_ended_gets_no_other_request(stack):
    async with stack.running() as (relay, first):
        first.fail(StepFailed("decode failed"))
        second = await stack.stream()
        assert second.worker != first.worker
        await second.accept()
        second.done()
        await read_all(relay)
    for _ in range(2):
        async with stack.request():
            assert (await stack.stream()).worker == second.worker, "until the first one reports again"


def so_far(**more):
    usage = common_pb2.Usage(prompt_tokens=3, cached_tokens=2, peer_tokens=1)
    return decode_pb2.DecodeDone(usage=usage, codec=common_pb2.KV_CODEC_INT8, prefill_worker_id="p9", **more)


async def answer_of_three_tokens(stack, relay):
    """Returns the stream of an answer whose second and third token came 4 s after each other; the client read all."""
    stream = await stack.accepted()
    stream.tokens(0, 6, so_far=so_far())
    stream.tokens(1, 7, so_far=so_far(decode_ns=10**9, handoff_exposed_ns=4))
    relay.answer.accept(decode_pb2.Tokens(first_index=2, ids=[8]), asyncio.get_running_loop().time() + 4)
    await relay.answer.next()
    return stream


@pytest.mark.parametrize(("tokens", "decode"), [(3, 5.0), (2, 2.5), (1, 0.0)])
async def test_an_answer_that_the_router_ends_has_the_usage_and_timing_that_its_worker_knew(stack, tokens, decode):
    async with stack.request(max_tokens=9) as relay:
        stream = await answer_of_three_tokens(stack, relay)
        relay.close()
        assert stream.closed
        finish = relay.finish_at(tokens)
        assert finish.usage.cached_tokens == 2
        assert finish.codec == common_pb2.KV_CODEC_INT8
        assert relay.answer.prefill_worker == "p9"
        assert relay.answer.timing.handoff_exposed_ns == 4
        assert relay.answer.timing.decode_ns / 1e9 == pytest.approx(decode, abs=0.1)


async def test_an_answer_that_is_cut_after_its_end_keeps_the_worker_s_last_word(stack):
    async with stack.request(max_tokens=9) as relay:
        stream = await answer_of_three_tokens(stack, relay)
        stream.done(codec=common_pb2.KV_CODEC_RAW, decode_ns=8)
        finish = relay.finish_at(2)
        assert (finish.codec, relay.answer.timing.decode_ns) == (common_pb2.KV_CODEC_RAW, 4)


async def test_decode_time_is_divided_among_the_tokens_of_this_router_s_worker(stack):
    async with stack.running(emitted=(5, 6), max_tokens=9) as (relay, stream):
        stream.tokens(2, 7, so_far=so_far(decode_ns=1))
        stream.tokens(3, 8, 9, 10)
        stream.done(decode_ns=8)
        relay.finish_at(3)
        assert relay.answer.timing.decode_ns == 2, "one of four tokens"


@pytest.mark.parametrize(("tokens", "decode"), [(5, 8), (4, 4), (3, 0), (2, 0)])
async def test_decode_time_is_divided_among_the_tokens_of_the_last_worker(stack, tokens, decode):
    async with stack.running(max_tokens=9) as (relay, stream):
        stream.tokens(0, 6, so_far=so_far())
        stream.tokens(1, 7, 8, so_far=so_far(decode_ns=10**9))
        stream.fail(Unavailable("gone"))
        stream = await stack.accepted()
        stream.tokens(3, 9, so_far=so_far(decode_ns=1))
        # The worker handed the sequence over again; its decode time still began before token 3.
        stream.tokens(4, 10, so_far=so_far(decode_ns=5))
        stream.done(decode_ns=8)
        relay.finish_at(tokens)
        assert relay.answer.timing.decode_ns == decode


async def test_what_a_lost_worker_has_told_does_not_describe_its_successor(stack):
    async with stack.request(max_tokens=9) as relay:
        stream = await answer_of_three_tokens(stack, relay)
        stream.fail(Unavailable("gone"))
        stream = await stack.stream()
        _, prefill_worker = await stream.accept()
        stream.tokens(3, 9)  # a worker that tells nothing
        relay.close()
        finish = relay.finish_at(4)
        assert not relay.answer.timing.HasField("decode_ns")
        assert not relay.answer.timing.HasField("handoff_exposed_ns")
        assert relay.answer.prefill_worker == prefill_worker
        assert finish.codec == common_pb2.KV_CODEC_UNSPECIFIED


@pytest.mark.parametrize("cut", [False, True])
async def test_the_blocks_that_a_lost_attempt_left_in_the_prefix_cache_are_not_counted_as_found(stack, cut):
    async with stack.request(max_tokens=9) as relay:
        stream = await answer_of_three_tokens(stack, relay)
        assert relay.answer.cached_tokens == 2
        stream.fail(Unavailable("gone"))
        stream = await stack.accepted()
        again = decode_pb2.DecodeDone(usage=common_pb2.Usage(prompt_tokens=3, cached_tokens=3, disk_tokens=1))
        stream.tokens(3, 9, so_far=again)
        if not cut:
            stream.done(usage=again.usage)
            await read_all(relay)
        relay.close()
        assert relay.finish_at(4).usage == common_pb2.Usage(
            prompt_tokens=3, completion_tokens=4, cached_tokens=2, peer_tokens=1
        )
        assert relay.answer.cached_tokens == 2


async def test_without_a_word_of_the_first_worker_the_second_one_s_cached_tokens_count(stack):
    async with stack.request(max_tokens=9) as relay:
        (await stack.accepted()).fail(Unavailable("gone"))
        stream = await stack.accepted()
        stream.tokens(0, 6)
        stream.done(usage=common_pb2.Usage(cached_tokens=3))
        assert (await read_all(relay))[1].usage.cached_tokens == 3


async def test_a_worker_lost_after_the_last_token_has_told_its_usage(stack):
    async with stack.request(max_tokens=3) as relay:
        stream = await answer_of_three_tokens(stack, relay)
        stream.fail(Unavailable("gone"))
        _, finish = await read_all(relay)
        assert (finish.reason, finish.usage.completion_tokens) == (LENGTH, 3)
        assert (finish.usage.cached_tokens, finish.codec) == (2, common_pb2.KV_CODEC_INT8)
        assert relay.answer.timing.HasField("decode_ns")


@pytest.mark.parametrize("error", [InvalidRequest("f", "bad"), DeadlineExceeded("late"), RequestCancelled("no")])
async def test_the_requests_own_errors_are_not_retried(stack, error):
    async with stack.request() as relay:
        stream = await stack.stream()
        await stream.start()
        stream.fail(error)
        with pytest.raises(type(error)):
            await relay.answer.next()
        assert stack.streams.empty()


@pytest.mark.parametrize("reason", [NEED.REASON_PREFILL_FAILED, NEED.REASON_INCOMPATIBLE])
async def test_a_failed_prefill_is_tried_on_another_worker(stack, reason):
    async with stack.request() as relay:
        stream = await stack.stream()
        _, first = await stream.accept()
        stream.say(need_prefill=NEED(reason=reason, worker_id=first))
        target = await stream.assigned()
        assert target.worker_id != first
        assert target.address == f"{target.worker_id}:1"
        assert [one.address for one in target.data_addresses] == [f"{target.worker_id}:2"]
        assert stack.roster.prefill.get(first).in_flight == 0
        stream.tokens(0, 7)
        stream.done()
        await read_all(relay)
        assert relay.answer.prefill_worker == target.worker_id
        assert relay.answer.prefill_engine == f"engine of {target.worker_id}"


async def test_the_engine_is_that_of_the_prefill_worker_whose_kv_decode_used(stack):
    async with stack.request() as relay:
        stream = await stack.stream()
        _, first = await stream.accept()
        stream.say(need_prefill=NEED(reason=NEED.REASON_PREFILL_FAILED, worker_id=first))
        await stream.assigned()
        stream.tokens(0, 7)
        stream.done(prefill_worker_id=first)
        await read_all(relay)
        assert relay.answer.prefill_engine == f"engine of {first}"


@pytest.fixture
def pass_time(monkeypatch):
    """Returns a function that advances the attempts' clock by seconds."""
    passed = [0.0]
    monkeypatch.setattr(attempt, "_now", lambda: asyncio.get_running_loop().time() + passed[0])

    def forward(seconds):
        passed[0] += seconds

    return forward


@pytest.mark.parametrize("failed", ["prefill", "decode"])
async def test_time_lost_in_an_attempt_that_failed_counts_as_router_queue(stack, pass_time, failed):
    async with stack.running() as (relay, stream):
        pass_time(100)
        if failed == "prefill":
            stream.say(need_prefill=NEED(reason=NEED.REASON_PREFILL_FAILED))
            await stream.assigned()
        else:
            stream.fail(Unavailable("gone"))
            stream = await stack.accepted()
        pass_time(1000)  # what succeeds accounts for itself
        stream.tokens(0, 7)
        await relay.answer.next()
        assert 100 <= relay.answer.timing.router_queue_ns / 1e9 < 1000


async def test_a_preempted_sequence_gets_a_prefill_worker_again(stack):
    async with stack.running() as (relay, stream):
        stream.tokens(0, 7)
        assert (await relay.answer.next()).token_ids == [7]
        stream.say(need_prefill=NEED(reason=NEED.REASON_PREEMPTED))
        await stream.assigned()
        assert sum(w.in_flight for w in stack.roster.prefill) == 1
        stream.tokens(1, 8)
        assert (await relay.answer.next()).token_ids == [8]
        assert sum(w.in_flight for w in stack.roster.prefill) == 0


async def test_a_failure_of_an_earlier_prefill_worker_is_charged_to_that_worker(stack):
    async with stack.request() as relay:
        stream = await stack.stream()
        _, first = await stream.accept()
        # The sequence is preempted and gets another assignment, while the worker begins to pull from the first one.
        stack.report(first, credits=1)
        stream.say(need_prefill=NEED(reason=NEED.REASON_PREEMPTED))
        second = (await stream.assigned()).worker_id
        stack.report("p1" if first == "p0" else "p0", credits=1)
        stream.say(need_prefill=NEED(reason=NEED.REASON_PREFILL_FAILED, worker_id=first))
        await stream.assigned()
        (failed,) = {key[0] for key in relay.request.avoid}
        assert failed == first
        assert stack.roster.prefill.get(first).paused_until_report
        assert second in ("p0", "p1")


@pytest.mark.parametrize(
    ("reason", "error", "says"),
    [
        (NEED.REASON_PREFILL_FAILED, Unavailable, "2 failed prefills; 0 tokens .*; the last failure: no, again"),
        (NEED.REASON_INCOMPATIBLE, Incompatible, "no, again"),
    ],
)
async def test_prefill_that_keeps_failing_ends_the_request(stack, reason, error, says):
    async with stack.running(max_attempts=2) as (relay, stream):
        stream.say(need_prefill=NEED(reason=reason, detail="no"))
        await stream.assigned()
        stream.say(need_prefill=NEED(reason=reason, detail="no, again"))
        with pytest.raises(error, match=says):
            await relay.answer.next()


async def test_the_deadline_ends_a_request_that_waits(stack):
    stack.report("d0", credits=0)
    stack.report("d1", credits=0)
    async with stack.request(timeout=0.01) as relay:
        with pytest.raises(DeadlineExceeded, match="0 tokens"):
            await relay.answer.next()


async def test_the_deadline_ends_a_request_that_runs_and_is_passed_on(stack):
    async with stack.request(timeout=0.5) as relay:
        stream = await stack.stream()
        start, _ = await stream.accept()
        assert 0 < start.time_left_ns <= 0.5e9
        stream.tokens(0, 7)
        assert (await relay.answer.next()).token_ids == [7]
        with pytest.raises(DeadlineExceeded, match="1 token had been produced"):
            await relay.answer.next()
        assert stream.closed


@pytest.mark.parametrize("phase", ["queued", "started", "waiting for prefill", "assigned", "running"])
async def test_closing_frees_everything_in_every_phase(stack, phase):
    if phase == "queued":
        stack.report("d0", credits=0)
        stack.report("d1", credits=0)
    async with stack.request() as relay:
        if phase == "queued":
            return
        stream = await stack.stream()
        await stream.start()
        if phase != "started":
            stream.say(reserved=decode_pb2.Reserved(blocks=1))
        if phase == "waiting for prefill":
            stack.report("p0", credits=0)
            stack.report("p1", credits=0)
            stream.say(need_prefill=NEED(reason=NEED.REASON_PREEMPTED))
        if phase == "running":
            stream.tokens(0, 7)
            await relay.answer.next()
    assert stream.closed


async def test_a_reader_that_reads_nothing_does_not_hold_the_worker_up(stack):
    async with stack.running(max_tokens=1000) as (relay, stream):
        for index in range(1000):
            stream.tokens(index, index)
        stream.done(LENGTH)
        await until(lambda: not stack.dispatcher.num_jobs)
        assert stream.closed
        batches, _ = await read_all(relay)
        assert batches == [(0, list(range(1000)))]


async def test_a_resubmitted_request_continues_after_its_tokens(stack):
    async with stack.request(emitted=(7, 8)) as relay:
        stream = await stack.stream()
        start, _ = await stream.accept()
        assert list(start.emitted_token_ids) == [7, 8]
        stream.tokens(2, 9)
        stream.done()
        batches, finish = await read_all(relay)
        assert batches == [(2, [9])]
        assert finish.usage.completion_tokens == 3


async def test_a_resubmitted_answer_that_was_whole_needs_no_worker(stack):
    async with stack.request(emitted=(7, 8, 9, 10)) as relay:
        batches, finish = await read_all(relay)
        assert (batches, finish.reason, finish.usage.completion_tokens) == ([], LENGTH, 4)
        assert stack.streams.empty()


async def test_a_stage_without_workers_ends_the_wait(stack):
    stack.roster.prefill.remove(stack.roster.prefill.get("p0"))
    stack.roster.prefill.remove(stack.roster.prefill.get("p1"))
    async with stack.request() as relay:
        with pytest.raises(Unavailable, match="no prefill worker"):
            await relay.answer.next()


async def test_a_message_out_of_turn_is_an_error_of_the_attempt(stack):
    async with stack.request() as relay:
        first = await stack.stream()
        await first.start()
        first.tokens(0, 7)
        second = await stack.accepted()
        second.say(reserved=decode_pb2.Reserved())
        third = await stack.accepted()
        third.done()
        assert await read_all(relay) == (
            [],
            decode_pb2.DecodeDone(reason=STOP, usage=common_pb2.Usage(prompt_tokens=3)),
        )


async def test_an_aborted_request_ends_with_the_given_error(stack):
    async with stack.running() as (relay, _):
        relay.abort(Unavailable("shutting down"))
        with pytest.raises(Unavailable, match="shutting down"):
            await relay.answer.next()


async def test_spans_of_unanswered_requests_end_with_the_reason(stack, monkeypatch):
    ended = []

    class Span(tracing.Span):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def end(self, error=None):
            if self.name:
                ended.append((self.name, type(error)))
                self.name = ""

    monkeypatch.setattr(tracing, "child", lambda name, kind="internal", parent=None, **attributes: Span(name))
    async with stack.request(timeout=0.01) as relay:
        await (await stack.stream()).accept()
        with pytest.raises(DeadlineExceeded):
            await relay.answer.next()
    assert ended == [("router.queue", type(None)), ("router.attempt", DeadlineExceeded)]
    ended.clear()
    stack.report("d0", credits=0)
    stack.report("d1", credits=0)
    async with stack.request() as relay:
        relay.close(RequestCancelled("the client left"))
    assert ended == [("router.queue", RequestCancelled)]

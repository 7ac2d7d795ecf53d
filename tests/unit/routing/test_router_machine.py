"""A state machine of the router's requests: workers fail, refuse, drain and return; readers are slow or leave.

Real ``Relay``, ``Attempt``, ``AsyncDispatcher`` and ``Dispatcher`` run on an event loop with a clock of its own; the
decode workers are simulated. At the end every request has all its tokens, or has failed for a reason that the test gave
it. No slot is in use, no stream is open, and no worker holds blocks.

Decode workers whose names begin with d have the default tier; those with f have the tier fast. A name with b is a
worker with both stages, of the default tier.
"""

import asyncio
import itertools
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jobs import worker_info

from overfill.errors import (
    DeadlineExceeded,
    InternalError,
    ModelNotFound,
    OverfillError,
    Overloaded,
    PromptTooLong,
    ShuttingDown,
    TransferFailed,
    Unavailable,
)
from overfill.routing.answer import AnswerDelta
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.invariant import check
from overfill.routing.job import Job, JobState
from overfill.routing.policies import POLICIES
from overfill.routing.pool import Roster
from overfill.routing.relay import Relay
from overfill.routing.reservations import RESERVE_TIMEOUT
from overfill.routing.tier import DEFAULT_TIER, Tier
from overfill.routing.worker import DECODE, PREFILL
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

NEED = decode_pb2.NeedPrefill
BLOCK = 16
MAX_ATTEMPTS = 3
NAMES = ("d0", "d1", "d2", "f0", "p0", "p1", "b0")
TIERS = {"d": DEFAULT_TIER, "f": "fast", "b": DEFAULT_TIER}
ADAPTERS = [common_pb2.Adapter(name=name, digest=digit * 64) for name, digit in (("a", "1"), ("b", "2"), ("a", "3"))]
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock moves only when the test moves it."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def time(self):
        return self.now

    def settle(self):
        """Runs the loop until only timers are left."""
        self.run_until_complete(self._rounds())

    async def _rounds(self):
        for _ in range(40):
            await asyncio.sleep(0)


class Stream:
    """One attempt on a simulated decode worker, which holds blocks from Reserved until the stream ends."""

    def __init__(self, worker, receive, adapters, roster):
        self.worker = worker
        self._roster = roster
        self._adapters = adapters
        self._receive = receive
        self.start = None
        self.reserved = self.assigned = self.carried = self.closed = self.ended = False
        self.said = 0  # tokens of the answer, those of earlier attempts included

    def send(self, number, message):
        if message.HasField("start"):
            self.start = message.start
            assert message.start.adapter_digest in ("", *self._adapters)
            self.carried = message.start.HasField("assign_prefill")
            self.said = len(message.start.emitted_token_ids)
        else:
            self.assigned = True
        assigned = message.assign_prefill if self.assigned else message.start.assign_prefill
        if assigned.HasField("holder"):
            holders = {worker.process: worker for worker in self._roster.workers() if worker.info.lends_kv}
            process = assigned.holder.worker_id, assigned.holder.incarnation
            assert process != (assigned.worker_id, assigned.incarnation)
            assert holders[process].ready

    def close(self, number):
        self.closed = self.ended = True

    def say(self, **message):
        self.assigned = self.assigned or ("reserved" in message and self.carried)
        self._receive(decode_pb2.SequenceUpdate(**message))

    def end(self, error):
        """Ends the sequence with ``error``."""
        self.ended = True
        self._receive(error)

    @property
    def holds_blocks(self):
        return self.reserved and not self.ended


class Request:
    """A request, its expected answer, and the events that the test has caused."""

    def __init__(self, number, length, max_tokens, known, deadline):
        self.id = f"r{number}"
        self.truth = [(31 * number + 7 * i) % 50 for i in range(min(length, max_tokens))]
        self.reason = STOP if length < max_tokens else LENGTH
        self.max_tokens = max_tokens
        self.known = min(known, len(self.truth))  # tokens that the client brings
        self.deadline = deadline
        self.read = self.truth[: self.known]
        self.known_when_broken = self.most_known = self.known
        self.broken = self.failed_prefills = 0  # in a row, without a new token in between
        self.aborted = False
        self.reading = None
        self.end = None

    def finish(self):
        return self.truth, self.reason


class Routing(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.loop = ManualLoop()
        self.roster = Roster(tiers=[Tier(DEFAULT_TIER), Tier("fast")])
        self.dispatcher = Dispatcher(self.roster, max_queue=6, claim_after=3.0, absent_after=8.0)
        self.async_dispatcher = AsyncDispatcher(self.dispatcher)
        self.numbers = itertools.count()
        self.workers = []
        self.streams = []
        self.requests = {}
        self.relays = {}

    # What the relay sees of a worker.
    def open(self, worker, receive):
        decode = self.roster.decode[worker.tier].get(worker.id)
        digests = {adapter.digest for adapter in decode.adapters.values()}
        stream = Stream((worker.id, worker.incarnation), receive, digests, self.roster)
        self.streams.append(stream)
        return stream, 1

    def act(self, function, *args, **kwargs):
        """Calls ``function`` on the event loop, then runs the loop until only timers are left."""

        async def call():
            return function(*args, **kwargs)

        result = self.loop.run_until_complete(call())
        self.loop.settle()
        self.look()
        return result

    def look(self):
        """Records the results of requests whose readers have finished."""
        for request in self.requests.values():
            if request.reading is not None and request.reading.done():
                reading, request.reading = request.reading, None
                try:
                    event = reading.result()
                except OverfillError as error:
                    request.end = error
                else:
                    if isinstance(event, AnswerDelta):
                        assert event.first_index == len(request.read)
                        request.read += event.token_ids
                    else:
                        request.end = event

    def join(self, name, incarnation):
        """Returns the worker in each of its pools."""
        decode = worker_info(name, DECODE, incarnation, tier=TIERS.get(name[0], ""), colocated=name[0] == "b")
        prefill = replace(decode, stage=PREFILL, tier="", lends_kv=name != "p1")
        decode = replace(decode, lends_kv=name == "d0")
        workers = self.roster.join_all({"p": [prefill], "b": [prefill, decode]}.get(name[0], [decode]))
        self.workers += workers
        return workers

    def report(self, workers, credits=3, *, total=40, used=0, ready=True, draining=False, adapters=None, **kv):
        for worker in workers:
            load = decode_pb2.WorkerLoad(kv_blocks_total=total, kv_blocks_used=used, block_size=BLOCK)
            load.running = worker.in_flight
            report = registry_pb2.Report(load=load, credits=credits, ready=ready, draining=draining, **kv)
            if adapters is not None and worker.info.stage == DECODE:
                report.adapters.adapters.extend(adapters)
            self.async_dispatcher.report(worker, report)

    def break_streams(self, name):
        """Ends the connections to the workers of the name, if it has joined."""
        for worker in self.roster.find_all(name)[:1]:
            for stream in self.streams:
                if stream.worker == worker.process and not stream.ended:
                    self.broke(stream)
                    stream.end(Unavailable("the connection broke"))

    def broke(self, stream):
        if stream.start is not None:
            request = self.requests[stream.start.request_id]
            request.broken = 1 if request.most_known > request.known_when_broken else request.broken + 1
            request.known_when_broken = request.most_known

    def pick(self, data, condition):
        streams = [s for s in self.streams if s.start is not None and not s.ended and condition(s)]
        return data.draw(st.sampled_from(streams)) if streams else None

    @initialize(prefill=st.sampled_from(list(POLICIES)), decode=st.sampled_from(list(POLICIES)))
    def begin(self, prefill, decode):
        self.roster.use(POLICIES[prefill](), POLICIES[decode])
        for name in ("d0", "d1", "p0"):
            self.act(lambda name=name: self.report(self.join(name, 0), adapters=ADAPTERS[:2] if name == "d0" else []))
        for _ in range(2):  # start with running requests, which the rules would need many steps to reach
            self.take(Request(next(self.numbers), 10, 12, 0, None), 20)
        self.advance_all(1)
        self.advance_all(1)

    # Workers -------------------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        restarted=st.booleans(),
        credits=st.integers(0, 3),
        total=st.sampled_from([40, 4, 60]),
        used=st.sampled_from([0, 0, 3, 35]),
        ready=st.sampled_from([True, True, True, False]),
        draining=st.sampled_from([False, False, False, True]),
    )
    def worker_reports(self, name, restarted, credits, total, used, ready, draining):
        workers = self.roster.find_all(name)
        if not workers or restarted:
            self.act(self.break_streams, name)
            workers = self.act(self.join, name, next(self.numbers) + 1)
        self.act(self.report, workers, credits, total=total, used=min(used, total), ready=ready, draining=draining)

    @rule(name=st.sampled_from(NAMES), adapters=st.lists(st.sampled_from(ADAPTERS), max_size=2))
    def adapters_change(self, name, adapters):
        if workers := self.roster.find_all(name):
            self.act(self.report, workers, adapters=adapters)

    @rule(name=st.sampled_from(NAMES), dies=st.booleans())
    def worker_leaves(self, name, dies):
        if dies:
            self.act(self.break_streams, name)
        for worker in self.roster.find_all(name):
            self.roster.pool_of(worker).remove(worker)
        self.act(self.async_dispatcher.poll)

    @rule(
        name=st.sampled_from(["p0", "p1", "b0", "d0"]),
        keys=st.sets(st.integers(0, 9)),
        replaces=st.booleans(),
        disk=st.booleans(),
    )
    def cached_kv_changes(self, name, keys, replaces, disk):
        if workers := self.roster.find_all(name):
            known = workers[0].disk_keys if disk else workers[0].prefix_keys
            added = [key for key in keys if key not in known or replaces]
            delta = registry_pb2.PrefixDelta(added=added, removed=keys & known, replaces=replaces)
            self.act(self.report, workers[:1], **{"disk" if disk else "prefix": delta})

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def time_passes(self, seconds):
        self.loop.now += seconds
        self.act(self.async_dispatcher.poll)

    # Requests ------------------------------------------------------------------------------------------------------

    @rule(
        prompt=st.integers(1, 700),
        length=st.integers(0, 12),
        max_tokens=st.integers(1, 12),
        known=st.integers(0, 3),
        seconds=st.sampled_from([None, None, 5.0]),
        priority=st.sampled_from([0, 0, 1, -1]),
        key=st.sampled_from(["", "other"]),
        blocks=st.lists(st.integers(0, 9), max_size=4, unique=True),
        tier=st.sampled_from([DEFAULT_TIER, "fast"]),
        fallback=st.sampled_from(["", DEFAULT_TIER, "fast"]),
        adapter=st.sampled_from(["", "", "a", "b"]),
    )
    def submit(self, prompt, length, max_tokens, known, seconds, blocks, tier, fallback, adapter, **more):
        deadline = None if seconds is None else self.loop.now + seconds
        more |= {"tier": tier, "fallback": "" if fallback == tier else fallback}
        if (writer := self.roster.adapters.get(adapter)) is not None:
            more |= {"tier": writer.tier, "fallback": "", "adapter": writer}
        request = Request(next(self.numbers), length, max_tokens, known, deadline)
        self.take(request, prompt, block_keys=lambda block_size: iter(blocks), **more)

    def take(self, request, prompt, **more):
        start = decode_pb2.StartDecode(
            request_id=request.id,
            prompt_token_ids=(1,) * prompt,
            sampling=common_pb2.SamplingParams(seed=1, max_tokens=request.max_tokens),
            eos_token_ids=(0,),
            emitted_token_ids=request.read,
        )
        if (adapter := more.get("adapter")) is not None:
            start.adapter_digest, start.answer_start = adapter.digest, 1
        ids, now = start.prompt_token_ids, self.loop.now
        checked = Job(start=start, prompt_token_ids=ids, received=now, deadline=request.deadline, **more)
        relay = self.act(lambda: Relay(checked, self.async_dispatcher, self, max_attempts=MAX_ATTEMPTS))
        try:
            self.act(relay.start)
        except (Overloaded, PromptTooLong):
            return
        self.requests[request.id], self.relays[request.id] = request, relay

    def unread(self):
        return sorted(id for id, r in self.requests.items() if r.end is None and r.reading is None)

    @precondition(lambda self: self.unread())
    @rule(data=st.data())
    def reader_asks(self, data):
        id = data.draw(st.sampled_from(self.unread()))
        self.requests[id].reading = self.act(lambda: asyncio.ensure_future(self.relays[id].answer.next()))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), gives_up=st.sampled_from(["client", "router"]))
    def gives_up(self, data, gives_up):
        id = data.draw(st.sampled_from(sorted(self.requests)))
        if gives_up == "client":
            self.leave(id)
        else:
            self.requests[id].aborted = True
            self.act(self.relays[id].abort, ShuttingDown("leaving"))

    def leave(self, id):
        request, relay = self.requests[id], self.relays.pop(id)
        if request.reading is not None:
            request.reading.cancel()
            request.reading = None
        self.act(relay.close)
        del self.requests[id]
        self.loop.settle()
        open_ = [s for s in self.streams if s.start is not None and s.start.request_id == id and not s.closed]
        assert not open_, "the worker still computes for a client that has left"

    # Messages of decode workers ---------------------------------------------------------------------------------------

    @rule(data=st.data())
    def one_advances(self, data):
        if stream := self.pick(data, lambda s: not s.reserved or s.assigned):
            self.advance(stream, data.draw(st.integers(1, 4)))

    @rule(count=st.integers(1, 3))
    def all_advance(self, count):
        self.advance_all(count)

    def advance_all(self, count):
        for stream in list(self.streams):
            if stream.start is not None and not stream.ended and (not stream.reserved or stream.assigned):
                self.advance(stream, count)

    def advance(self, stream, count):
        """Sends Reserved, then tokens, then the end of the answer."""
        if not stream.reserved:
            stream.reserved = True
            shares = stream.start.HasField("answer_start") and len(stream.start.prompt_token_ids) % 2 == 0
            stream.assigned = shares
            self.act(stream.say, reserved=decode_pb2.Reserved(blocks=1, has_prompt=shares))
            return
        request = self.requests[stream.start.request_id]
        ids = request.truth[stream.said : stream.said + count]
        if ids:
            self.act(stream.say, tokens=decode_pb2.Tokens(first_index=stream.said, ids=ids))
            stream.said += len(ids)
            if stream.said > request.most_known:
                request.most_known, request.failed_prefills = stream.said, 0
        else:
            stream.ended = True
            digest = stream.start.adapter_digest
            self.act(stream.say, done=decode_pb2.DecodeDone(reason=request.reason, adapter_digest=digest))

    @rule(data=st.data(), how=st.sampled_from(["message", "with load", "status"]))
    def refuses(self, data, how):
        if stream := self.pick(data, lambda s: not s.reserved):
            if how == "status":
                self.act(stream.end, Overloaded("full"))
            else:
                stream.ended = True
                load = decode_pb2.WorkerLoad(kv_blocks_used=40, kv_blocks_total=40, block_size=BLOCK)
                refused = decode_pb2.Refused(reason="full", load=load if how == "with load" else None)
                self.act(stream.say, refused=refused)

    @rule(
        data=st.data(),
        error=st.sampled_from(
            [Unavailable("gone"), ShuttingDown("draining"), InternalError("bug"), TransferFailed("bad")]
        ),
    )
    def breaks(self, data, error):
        if stream := self.pick(data, lambda s: True):
            self.broke(stream)
            self.act(stream.end, error)

    @rule(data=st.data(), what=st.sampled_from(["gap", "contradiction", "nonsense", "too many"]))
    def says_what_cannot_be(self, data, what):
        if stream := self.pick(data, lambda s: s.assigned and (s.said or what != "contradiction")):
            request = self.requests[stream.start.request_id]
            self.broke(stream)
            stream.ended = True
            match what:
                case "gap":
                    said = decode_pb2.Tokens(first_index=stream.said + 1, ids=[1])
                case "contradiction":
                    said = decode_pb2.Tokens(first_index=0, ids=[request.truth[0] + 1])
                case "too many":
                    ids = [*request.truth[stream.said :], *[1] * (request.max_tokens + 1)]
                    said = decode_pb2.Tokens(first_index=stream.said, ids=ids)
                case _:
                    self.act(stream.say, reserved=decode_pb2.Reserved())
                    return
            self.act(stream.say, tokens=said)

    @rule(
        data=st.data(),
        reason=st.sampled_from(
            [NEED.REASON_PREEMPTED, NEED.REASON_PREFILL_FAILED, NEED.REASON_PREFILL_REFUSED, NEED.REASON_INCOMPATIBLE]
        ),
    )
    def needs_prefill_again(self, data, reason):
        if stream := self.pick(data, lambda s: s.assigned):
            stream.assigned = False
            if reason in (NEED.REASON_PREFILL_FAILED, NEED.REASON_INCOMPATIBLE):
                self.requests[stream.start.request_id].failed_prefills += 1
            self.act(stream.say, need_prefill=NEED(reason=reason))

    # Invariants ---------------------------------------------------------------------------------------------------

    @invariant()
    def no_wrong_token_is_read(self):
        for request in self.requests.values():
            assert request.read == request.truth[: len(request.read)]

    @invariant()
    def the_books_balance(self):
        self.act(self.async_dispatcher.poll)
        check(self.dispatcher, self.loop.now)
        reserving = [j for j in self.dispatcher._jobs if j.state is JobState.PLACED]
        assert all(j.prefill is None or self.loop.now - j.placed_at < RESERVE_TIMEOUT for j in reserving)
        assert all(worker.paused_until_report for worker in self.dispatcher.reservations.silent(self.loop.now))

    @invariant()
    def what_ended_holds_nothing(self):
        for request in self.requests.values():
            self.check_end(request)

    def check_end(self, request):
        """Checks that an answer is complete, or that a failure has a cause that the test gave."""
        match request.end:
            case None:
                return
            case decode_pb2.DecodeDone(reason=reason, usage=usage):
                assert (request.read, reason) == (request.truth, request.reason)
                assert usage.completion_tokens == len(request.truth)
            case DeadlineExceeded():
                assert request.deadline is not None
                assert self.loop.now >= request.deadline
            case ShuttingDown():
                assert request.aborted
            case error if "gave up after" in str(error) or "no prefill worker is compatible" in str(error):
                assert max(request.broken, request.failed_prefills) >= MAX_ATTEMPTS
            case PromptTooLong():
                pass  # all workers large enough for it have left
            case ModelNotFound():
                assert "was unloaded or replaced while the request waited" in str(request.end)
            case error:
                assert " has reported for " in str(error) or "left, and none has returned" in str(error)
        streams = [s for s in self.streams if s.start is not None and s.start.request_id == request.id]
        assert all(s.closed for s in streams)

    def teardown(self):
        """With healthy workers and no more failures, every remaining request is answered."""
        for name in NAMES:
            self.act(self.break_streams, name)
            self.act(lambda name=name: self.report(self.join(name, 10**6), adapters=ADAPTERS[:2]))
        for _ in range(400):
            if all(request.end is not None for request in self.requests.values()):
                break
            for id in self.unread():
                self.requests[id].reading = self.act(lambda id=id: asyncio.ensure_future(self.relays[id].answer.next()))
            for stream in list(self.streams):
                if stream.start is not None and not stream.ended and (not stream.reserved or stream.assigned):
                    self.advance(stream, 5)
            for name in NAMES:
                self.act(self.report, self.roster.find_all(name))
        for request in self.requests.values():
            assert request.end is not None, f"{request.id} was forgotten"
            self.check_end(request)
        for id in list(self.requests):
            self.leave(id)
        assert not any(stream.holds_blocks for stream in self.streams)
        assert all(stream.closed for stream in self.streams)
        assert self.dispatcher.num_jobs == self.dispatcher.num_waiting == 0
        assert all(worker.in_flight == 0 for worker in self.workers)
        self.loop.now += 10.0  # the last tick
        self.loop.settle()
        self.loop.close()


Routing.TestCase.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)
TestRouting = Routing.TestCase

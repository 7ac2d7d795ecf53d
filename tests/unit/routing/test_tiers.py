"""Tests tiers: each has its own pool, queue and decoder, and an answer leaves its tier only when asked to."""

import pytest
from jobs import make_job, worker_info

from overfill.errors import Incompatible, Overloaded, PromptTooLong, Unavailable
from overfill.routing.answer import AnswerState
from overfill.routing.brownout import HOLD, Brownout, Prediction
from overfill.routing.dispatcher import Dispatcher, Placement, Rejection
from overfill.routing.invariant import check
from overfill.routing.pool import Roster
from overfill.routing.tier import Objectives, Tier
from overfill.routing.worker import DECODE, PREFILL, STALE_AFTER
from overfill.v1 import decode_pb2, registry_pb2

DECODERS = {"full": "aa", "default": "bb", "fast": "cc"}


class Stack:
    """A roster with three tiers and a dispatcher; ``default`` is the default tier."""

    def __init__(self):
        tiers = [Tier(name, {"decoder_digest": DECODERS[name]}) for name in ("default", "full", "fast")]
        self.roster = Roster(tiers=tiers)
        self.dispatcher = Dispatcher(self.roster, max_queue=3, absent_after=10.0)

    def join(self, name, tier="", *, now=0.0, credits=4, total=100, **decoder):
        """Joins a worker: prefill if its name begins with p, else a decode worker of ``tier``."""
        worker = self.roster.join(info(name, tier, **decoder))
        self.report(worker, now, credits=credits, total=total)
        return worker

    def report(self, worker, now, credits=4, total=100):
        load = decode_pb2.WorkerLoad(kv_blocks_total=total, block_size=16, running=worker.in_flight)
        self.dispatcher.report(worker, registry_pb2.Report(load=load, credits=credits, ready=True), now)

    def submit(self, name, tier, now=0.0, **more):
        job = make_job(name, 10, 10, tier=tier, **more)
        self.dispatcher.submit(job, now)
        return job

    def poll(self, now=0.0):
        outcomes = self.dispatcher.poll(now)
        check(self.dispatcher, now)
        return outcomes

    def placed(self, now=0.0):
        return [(o.job.id, o.worker.id) for o in self.poll(now) if isinstance(o, Placement)]


def info(name, tier="", digest=None, **decoder):
    stage = PREFILL if name.startswith("p") else DECODE
    described = {"decoder_digest": digest or DECODERS.get(tier, "bb"), "decoder_quantize": "none"}
    described = described | {"kv_cache_dtype": "auto"} | decoder
    return worker_info(name, stage, tier=tier, decoder=described)


@pytest.fixture
def stack():
    return Stack()


def test_a_full_tier_does_not_hold_up_another(stack):
    stack.join("d0", "full", credits=1)
    stack.join("d1", "fast", credits=4)
    stack.join("p0", credits=10)
    for index in range(4):
        stack.submit(f"full-{index}", "full")
        if index == 0:
            assert stack.placed() == [("full-0", "d0")]
    assert stack.placed() == []
    with pytest.raises(Overloaded):
        stack.submit("full-4", "full")
    stack.submit("fast-0", "fast")
    assert stack.placed() == [("fast-0", "d1")]
    assert stack.dispatcher.waiting_by_tier() == {"default": 0, "full": 3, "fast": 0}
    assert stack.dispatcher.queued(stack.roster.decode["full"]) == 3
    assert stack.dispatcher.running_by_tier() == {"default": 0, "full": 1, "fast": 1}


def test_tiers_take_turns_where_prefill_is_the_bottleneck(stack):
    for name, tier in (("d0", "full"), ("d1", "fast")):
        stack.join(name, tier, credits=10)
    prefill = stack.join("p0", credits=1)
    jobs = {}
    for tier in ("full", "fast"):
        for index in range(3):
            jobs[f"{tier}-{index}"] = stack.submit(f"{tier}-{index}", tier)
    order = []
    while placed := stack.placed():
        ((name, _),) = placed
        order.append(name)
        stack.dispatcher.finish(jobs[name])
        stack.report(prefill, 0.0, credits=1)
    assert [name.partition("-")[0] for name in order] == ["full", "fast"] * 3


def test_priority_counts_across_tiers(stack):
    for name, tier in (("d0", "full"), ("d1", "fast")):
        stack.join(name, tier)
    stack.join("p0", credits=1)
    stack.submit("later", "full", priority=1)
    stack.submit("sooner", "fast", priority=0)
    assert stack.placed() == [("sooner", "d1")]


def test_a_worker_with_another_decoder_than_its_tiers_is_refused(stack):
    with pytest.raises(Incompatible) as error:
        stack.join("d0", "fast", digest="dd")
    assert error.value.fields == ("decoder_digest",)
    assert "the tier 'fast'" in str(error.value)
    assert "'cc'" in str(error.value)
    assert "'dd'" in str(error.value)


def test_workers_of_a_tier_store_weights_and_kv_alike(stack):
    stack.join("d0", "fast", kv_cache_dtype="int8")
    stack.join("d1", "full")
    with pytest.raises(Incompatible) as error:
        stack.join("d2", "fast", decoder_quantize="int8")
    assert error.value.fields == ("decoder_quantize", "kv_cache_dtype")


def test_a_worker_names_a_tier_that_exists(stack):
    for tier, said in (("", "names no tier"), ("cheap", "belongs to the tier 'cheap'")):
        with pytest.raises(Incompatible, match=said) as error:
            stack.join("d0", tier)
        assert "'default', 'full', 'fast'" in str(error.value)


def test_a_stack_with_one_pair_needs_no_names():
    roster = Roster(tiers=[Tier(decoder={"decoder_digest": "bb"})])
    assert roster.join(info("d0")).info.tier == "default"
    with pytest.raises(Incompatible, match="this stack's pair"):
        roster.join(info("d1", digest="cc"))


def test_a_lost_tier_keeps_its_requests_unless_they_may_leave_it(stack):
    worker = stack.join("d0", "full")
    stack.join("d1", "fast")
    stack.join("p0")
    stays, leaves = stack.submit("stays", "full"), stack.submit("leaves", "full", fallback="fast")
    assert len(stack.placed()) == 2
    for job in (stays, leaves):
        job.emitted = 3
    stack.roster.decode["full"].remove(worker)
    for job in (stays, leaves):
        stack.dispatcher.lost(job, 1.0, gone=True)
    assert stack.placed(1.0) == [("leaves", "d1")]
    assert (leaves.tier, stays.tier) == ("fast", "full")
    stack.report(stack.roster.find("d1"), 12.0)
    stack.report(stack.roster.find("p0"), 12.0)
    (rejection,) = stack.poll(12.0)
    assert isinstance(rejection, Rejection)
    assert rejection.job is stays
    assert isinstance(rejection.error, Unavailable)
    assert "no decode worker of the tier 'full'" in str(rejection.error)
    stack.dispatcher.finish(leaves)
    assert not stack.dispatcher.num_jobs


def test_a_request_does_not_leave_a_tier_that_is_only_full_or_starting(stack):
    full = stack.join("d0", "full", credits=0)
    stack.join("d1", "fast")
    stack.join("p0")
    stack.submit("a", "full", fallback="fast")
    assert stack.placed() == []
    stack.dispatcher.report(full, registry_pb2.Report(ready=False), 1.0)
    assert stack.placed(1.0) == []


@pytest.mark.parametrize("fast", ["no worker", "too small"])
def test_a_request_does_not_leave_for_a_tier_that_cannot_take_it(stack, fast):
    stack.join("p0")
    if fast == "too small":
        stack.join("d1", "fast", total=1)
    job = stack.submit("a", "full", fallback="fast")
    assert stack.poll() == []
    assert job.tier == "full"
    stack.join("d0", "full")
    assert stack.placed() == [("a", "d0")]


def test_a_silent_tier_is_left_as_soon_as_it_counts_as_silent(stack):
    stack.join("d0", "full", credits=0)
    stack.join("d1", "fast")
    stack.join("p0")
    stack.submit("a", "full", fallback="fast")
    assert stack.placed() == []
    later = STALE_AFTER + 1
    stack.report(stack.roster.find("d1"), later)
    stack.report(stack.roster.find("p0"), later)
    assert stack.placed(later) == [("a", "d1")]


def test_sizes_are_those_of_the_tier(stack):
    stack.join("d0", "full", total=1)
    stack.join("d1", "fast", total=100)
    stack.join("p0")
    with pytest.raises(PromptTooLong, match="tier 'full' holds 16: ask for fewer tokens"):
        stack.submit("a", "full")
    stack.submit("b", "fast")
    assert stack.placed() == [("b", "d1")]


def test_the_time_to_first_token_is_expected_from_the_queue(stack):
    stack.join("p0")
    stack.join("d0", "full", credits=1)
    stack.join("d1", "fast")
    assert stack.dispatcher.expected_ttft("full", 0.0) == 0.0
    for index in range(2):
        stack.submit(str(index), "full")
        stack.placed()
    assert stack.dispatcher.expected_ttft("full", 1.5) == 1.5, "no rate is known: the first has waited for so long"
    assert stack.dispatcher.expected_ttft("fast", 1.5) == 0.0


# The parts of an answer -----------------------------------------------------------------------------------------------


def tokens(first, *ids):
    return decode_pb2.Tokens(first_index=first, ids=ids)


def parts(holder):
    return [(part.tier, part.first_index) for part in holder.parts]


async def test_an_answer_that_changes_its_tier_says_where():
    answer = AnswerState((), 100, 0.0, "full")
    answer.enter_tier("full")
    answer.accept(tokens(0, 1, 2), 0.0)
    answer.enter_tier("full")  # another worker of the tier
    answer.accept(tokens(2, 3), 0.0)
    answer.enter_tier("fast")
    answer.accept(tokens(3, 4), 0.0)
    delta = await answer.next()
    assert delta.token_ids == [1, 2, 3, 4]
    assert parts(delta) == [("fast", 3)]
    assert parts(answer) == [("full", 0), ("fast", 3)]
    answer.accept(tokens(4, 5), 0.0)
    assert parts(await answer.next()) == []


async def test_a_tier_that_wrote_nothing_is_no_part():
    answer = AnswerState((), 100, 0.0, "full")
    answer.enter_tier("full")
    answer.enter_tier("fast")
    answer.accept(tokens(0, 1), 0.0)
    assert parts(answer) == [("fast", 0)]
    assert parts(await answer.next()) == [("fast", 0)], "the client was told of another tier"


async def test_the_parts_of_a_resumed_answer_begin_with_the_new_tokens():
    answer = AnswerState((7, 8), 100, 0.0, "full")
    answer.enter_tier("full")
    answer.accept(tokens(2, 9), 0.0)
    assert parts(answer) == [("full", 2)]
    assert parts(await answer.next()) == []


# Brownout -------------------------------------------------------------------------------------------------------------


class Loads:
    """Predictions that the test sets, as multiples of the objectives of 2 s and 0.1 s."""

    def __init__(self):
        self.of = dict.fromkeys(DECODERS, 0.5)
        self.absent = set()
        objectives = dict.fromkeys(DECODERS, Objectives(2.0, 0.1))
        self.brownout = Brownout(("full", "default", "fast"), objectives, self.predict)

    def predict(self, tier):
        return Prediction(0.0, 0.1 * self.of[tier], available=tier not in self.absent)

    def choose(self, tier, now, may_use=lambda tier: True):
        return self.brownout.choose(tier, may_use, now)


def test_the_next_tier_writes_the_answers_of_an_overloaded_one():
    loads = Loads()
    assert loads.choose("full", 0.0) == "full"
    loads.of["full"] = 1.1
    assert loads.choose("full", 1.0) == "default"
    assert loads.brownout.active == {"full"}
    loads.of["default"] = 1.1
    assert loads.choose("full", 1.0) == "fast"
    assert loads.choose("full", 1.0, lambda tier: tier != "fast") == "default", "the cheapest that it may use"
    loads.of["fast"] = 1.1
    assert loads.choose("full", 1.0) == "fast", "no tier keeps its objectives: the cheapest one has most room"
    assert loads.choose("fast", 1.0) == "fast"
    assert loads.choose("other", 1.0) == "other", "it is outside the order"


def test_a_brownout_ends_only_after_some_time_below_the_objective():
    loads = Loads()
    loads.of["full"] = 1.1
    assert loads.choose("full", 0.0) == "default"
    loads.of["full"] = 0.9
    assert loads.choose("full", 100.0) == "default", "within the margin"
    loads.of["full"] = 0.5
    assert loads.choose("full", 100.0 + HOLD - 0.1) == "full", "its workers stay in use"
    assert loads.brownout.active == {"full"}
    loads.of["full"] = 0.9
    assert loads.choose("full", 100.0 + HOLD - 0.1) == "default"
    loads.of["full"] = 0.5
    loads.brownout.update(100.0 + 2 * HOLD)
    assert not loads.brownout.active


def test_a_tier_that_is_slow_when_idle_recovers():
    objectives = Objectives(2.0, 0.1)
    assert Prediction(1.6, 0.08, idle_ttft=1.5, idle_itl=0.075).load(objectives) == pytest.approx(0.2)
    assert Prediction(2.1, 0.08, idle_ttft=1.5, idle_itl=0.075).load(objectives) == pytest.approx(1.2)
    idle = Prediction(2.2, 0.15, idle_ttft=2.2, idle_itl=0.15)
    assert idle.load(objectives) == 0, "the next answer corrects a prediction that is too high"
    assert Prediction(2.2, 0.17, idle_ttft=2.2, idle_itl=0.15).load(objectives) > 1
    assert Prediction(None, None).load(objectives) == 0


def test_a_tier_without_workers_is_passed_over_only_while_it_has_none():
    loads = Loads()
    loads.absent.add("full")
    assert loads.choose("full", 0.0) == "default"
    assert not loads.brownout.active, "a loss is no overload"
    loads.absent.clear()
    assert loads.choose("full", 0.0) == "full"
    loads.of = dict.fromkeys(DECODERS, 1.1)
    assert loads.choose("full", 1.0) == "fast"
    loads.absent.add("fast")
    assert loads.choose("full", 1.0) == "default", "not to the cheapest, which has no worker"
    assert loads.brownout.cheaper("full") == ("default",)
    loads.absent.add("full")
    loads.brownout.update(2.0)
    assert "full" not in loads.brownout.active

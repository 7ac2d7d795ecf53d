"""Tests the signals that routers collect, and how the scaler reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from jobs import make_job

from overfill.kv.spec import KvSpec, RopeSpec
from overfill.routing.capacity import StepCost
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.pool import Roster
from overfill.routing.scaling import Scaler, ScalingConfig
from overfill.routing.scaling_advisor import ScalingAdvisor
from overfill.routing.signals import SignalReader, Signals, pool_states, two_point_values
from overfill.routing.tier import DEFAULT_TIER, Objectives, Tier
from overfill.routing.worker import DECODE, PREFILL, WorkerInfo
from overfill.v1 import common_pb2, inference_pb2, registry_pb2


class RecordingScaler:
    """Records the calls to a scaler."""

    tiers = (DEFAULT_TIER,)

    def __init__(self) -> None:
        self.arrivals: list[int] = []
        self.answers: list[tuple[float, ...]] = []
        self.prefilled_by: list[tuple[float, float]] = []

    def arrived(self, tier, now, tokens):
        self.arrivals.append(tokens)

    def finished(self, tier, now, *answer):
        self.answers.append(answer)

    def prefilled(self, tokens, seconds):
        self.prefilled_by.append((tokens, seconds))


def finished(prompt=100, answer=11, cached=0, decode=1.0, prefill=0.5):
    return inference_pb2.Finished(
        usage=common_pb2.Usage(prompt_tokens=prompt, completion_tokens=answer, cached_tokens=cached),
        timing=common_pb2.Timing(decode_ns=round(decode * 1e9), prefill_compute_ns=round(prefill * 1e9)),
        prefill_worker="p",
        decode_worker="d",
    )


@pytest.fixture
def roster():
    return Roster()


@pytest.fixture
def signals(roster):
    return Signals(roster, Dispatcher(roster))


def test_a_reader_counts_every_request_once(signals):
    heard = RecordingScaler()
    reader = SignalReader(heard, {})
    signals.arrived(DEFAULT_TIER, 100)
    reader.read(0.0, {"r": signals.read(0.0)})
    signals.arrived(DEFAULT_TIER, 100)
    signals.arrived(DEFAULT_TIER, 300)
    signals.finished(finished(), DEFAULT_TIER, 0.0)
    reader.read(1.0, {"r": signals.read(1.0)})
    reader.read(2.0, {"r": signals.read(2.0)})
    assert heard.arrivals == [100, 300]
    assert heard.answers == [(100, 11, pytest.approx(0.1), 1.0)]
    assert heard.prefilled_by == [(100.0, 0.5)]


def test_the_history_of_a_router_new_to_the_reader_does_not_count_as_load(signals):
    for _ in range(1000):
        signals.arrived(DEFAULT_TIER, 100)
    heard = RecordingScaler()
    SignalReader(heard, {}).read(0.0, {"r": signals.read(0.0)})
    assert heard.arrivals == []


def test_a_router_that_replaces_another_starts_at_zero(signals, roster):
    heard = RecordingScaler()
    reader = SignalReader(heard, {})
    signals.arrived(DEFAULT_TIER, 50)
    reader.read(0.0, {"r1": signals.read(0.0)})
    reader.read(1.0, {})
    other = Signals(roster, Dispatcher(roster))
    reader.read(2.0, {"r2": other.read(2.0)})
    other.arrived(DEFAULT_TIER, 70)
    reader.read(3.0, {"r2": other.read(3.0)})
    assert heard.arrivals == [70]
    assert set(reader.seen) == {"r2"}


def test_tokens_known_to_be_cached_do_not_count_as_work(signals):
    for _ in range(500):
        signals.finished(finished(cached=80), DEFAULT_TIER, 0.0)
    before = signals.read(0.0)["arrived_tokens"]
    signals.arrived(DEFAULT_TIER, 1000)
    assert signals.read(0.0)["arrived_tokens"] - before == pytest.approx(200, abs=1)
    assert signals.read(0.0)["prefilled_tokens"] == 500 * 20


def test_the_step_time_of_a_moved_answer_counts_the_last_worker_s_tokens(signals):
    signals.finished(finished(answer=1, decode=0), DEFAULT_TIER, 0.0)
    assert signals.read(0.0)["timed"] == 0, "one token has no step time"
    signals.finished(finished(answer=11, decode=0.2), DEFAULT_TIER, 0.0, decode_base=9)
    assert signals.read(0.0)["timed_itl_seconds"] == pytest.approx(0.1)


def test_waiting_jobs_are_load_of_both_stages(roster):
    dispatcher = Dispatcher(roster)
    signals = Signals(roster, dispatcher)
    dispatcher.submit(make_job("a", 40, 8), 0.0)
    dispatcher.submit(make_job("b", 60, 8), 0.0)
    for prefill, decode in (pool_states([signals.read(0.0)], [DEFAULT_TIER]), signals.own_pools(0.0)):
        assert (prefill.waiting_jobs, prefill.waiting_tokens) == (2, 100)
        assert (decode[DEFAULT_TIER].waiting_jobs, decode[DEFAULT_TIER].ready) == (2, 0)


def test_load_of_one_tier_is_that_tiers_in_every_number(add_worker):
    """The way from requests to pool sizes: routers' signals, added up, to the scaler's targets."""
    tiers = ("full", "fast")
    config = ScalingConfig(step=StepCost(0.05, 0.01, 0.0))  # a batch of 4 meets the objective
    scaler = Scaler(config, dict.fromkeys(tiers, config))
    reader = SignalReader(scaler, {})
    routers = {}
    for name in ("r1", "r2"):
        roster = Roster(tiers=[Tier(tier) for tier in tiers])
        routers[name] = Signals(roster, Dispatcher(roster))
        for tier, running in (("full", 12), ("fast", 3)):
            add_worker(roster, f"d-{tier}", tier=tier, running=running, total=10_000)
        add_worker(roster, "p", PREFILL)
    for second in range(60):
        readings = {name: signals.read(float(second)) for name, signals in routers.items()}
        prefill, decode = reader.read(float(second), readings)
        for signals in routers.values():
            signals.arrived("full", 500)
    assert {tier: pool.running for tier, pool in decode.items()} == {"full": 12, "fast": 3}, "each worker counts once"
    assert readings["r1"]["arrivals"] == readings["r1"]["arrivals.full"] == 59
    assert readings["r1"]["arrivals.fast"] == 0
    targets = scaler.targets(60.0, prefill, decode)
    assert targets.decode_pools["full"].inputs["arrivals"] == pytest.approx(2, rel=0.05), "of both routers"
    assert targets.decode_pools["full"].workers > 4
    assert targets.decode_pools["fast"].workers == 1
    assert targets.prefill_pool.inputs["tokens"] == pytest.approx(1000, rel=0.05)


def test_needs_of_several_routers_add_up_to_the_need_of_one(add_worker):
    def needs(num_routers):
        total = {"prefill": 0.0, "decode": 0.0}
        for _ in range(num_routers):
            roster = Roster()
            decode = add_worker(roster, "d", credits=500, running=120, total=10_000)
            prefill = add_worker(roster, "p", PREFILL, credits=500, waiting=60, queued_tokens=60_000)
            for _ in range(120 // num_routers):
                roster.decode[DEFAULT_TIER].place(decode, 10)
            for _ in range(60 // num_routers):
                roster.prefill.place(prefill, 10)
            advisor = ScalingAdvisor(Signals(roster, Dispatcher(roster)), {DEFAULT_TIER: Objectives()})
            for stage, _, pool in advisor.recommend(0.0).pools():
                total[stage] += pool.need
        return total

    one = needs(1)
    assert one["decode"] == pytest.approx(120 / 64)
    assert one["prefill"] > 5
    for count in (2, 3):
        assert needs(count)["decode"] == pytest.approx(one["decode"])
        assert needs(count)["prefill"] == pytest.approx(one["prefill"], rel=0.35)


def test_a_short_prompt_fits_beside_a_step_within_the_objective(add_worker):
    roster = Roster()
    add_worker(roster, "d0", running=30)
    add_worker(roster, "d1", running=10)
    advisor = ScalingAdvisor(Signals(roster, Dispatcher(roster)), {DEFAULT_TIER: Objectives(itl=0.05)})
    assert advisor.short_prompt(DEFAULT_TIER) == 0, "nothing is known yet"
    advisor.recommend(0.0)
    step = advisor.expected_itl(DEFAULT_TIER, 20)
    assert 0 < step < 0.05
    assert advisor.short_prompt(DEFAULT_TIER) == pytest.approx((0.05 - step) * ScalingConfig().prefill_rate / 4)
    slow = ScalingAdvisor(Signals(roster, Dispatcher(roster)), {DEFAULT_TIER: Objectives(itl=step / 2)})
    slow.recommend(0.0)
    assert slow.short_prompt(DEFAULT_TIER) == 0


@pytest.mark.parametrize(("values"), [[100] * 6, [10, 10, 10, 500, 500, 500], [1, 2, 3, 4, 5, 6, 7], [9]])
def test_arrivals_reported_together_keep_their_number_sum_and_spread(values):
    told = two_point_values(len(values), sum(values), sum(v * v for v in values))
    assert len(told) == len(values)
    assert sum(told) == pytest.approx(sum(values), rel=0.02)
    assert sum(v * v for v in told) == pytest.approx(sum(v * v for v in values), rel=0.1)
    assert two_point_values(0, 0, 0) == []


def test_batch_size_is_the_mean_over_the_answer_not_its_value_at_the_end(signals, roster, add_worker, make_report):
    worker = add_worker(roster, "d", running=10)
    for second in range(11):
        signals.read(float(second))
    roster.decode[DEFAULT_TIER].report(worker, make_report(running=0), 10.0)
    signals.finished(finished(decode=10.0), DEFAULT_TIER, 10.0)
    assert signals.read(10.0)["timed_batch"] == pytest.approx(10)
    for second in range(11, 21):
        signals.read(float(second))
    signals.finished(finished(decode=15.0), DEFAULT_TIER, 20.0)  # five seconds beside nine others, ten seconds alone
    assert signals.read(20.0)["timed_batch"] == pytest.approx(10 + 5 * 10 / 15)
    signals.finished(finished(decode=0.5), DEFAULT_TIER, 20.5)  # alone, since the last reading
    assert signals.read(20.5)["timed_batch"] == pytest.approx(10 + 5 * 10 / 15 + 1)


def test_jobs_that_wait_for_a_decode_worker_are_no_work_for_prefill(roster, add_worker):
    dispatcher = Dispatcher(roster)
    add_worker(roster, "p", PREFILL, credits=64)
    add_worker(roster, "d", credits=0)
    for index in range(5):
        dispatcher.submit(make_job(str(index), 100, 10), 0.0)
    dispatcher.poll(0.0)
    numbers = Signals(roster, dispatcher).read(0.0)
    assert (numbers["queued_for_decode"], numbers["queued_jobs"], numbers["queued_tokens"]) == (5, 0, 0)
    prefill, decode = Signals(roster, dispatcher).own_pools(0.0)
    assert (prefill.waiting_tokens, decode[DEFAULT_TIER].waiting_jobs) == (0, 5)


@pytest.fixture
def add_colocated(make_info, make_report):
    """Returns a function that adds a worker with both stages, with a number of running requests in each."""

    def add(roster, worker_id, prefill, decode, routers=1):
        infos = [replace(make_info(worker_id, stage), colocated=True) for stage in (PREFILL, DECODE)]
        for worker, running in zip(roster.join_all(infos), (prefill, decode), strict=True):
            report = make_report(running=running)
            report.routers = routers
            roster.pool_of(worker).report(worker, report, 0.0)

    return add


def test_each_stage_of_a_worker_with_both_has_its_own_batch(signals, roster, add_colocated):
    add_colocated(roster, "w", prefill=2, decode=10)
    for second in range(11):
        signals.read(float(second))
    answer = finished(decode=5.0, prefill=1.0)
    answer.prefill_worker = answer.decode_worker = "w"
    signals.finished(answer, DEFAULT_TIER, 10.0)
    numbers = signals.read(10.0)
    assert numbers["timed_batch"] == pytest.approx(10)
    assert numbers["prefill_seconds"] == pytest.approx(1.0 / 2)


def test_workers_with_both_stages_are_ready_in_both_pools_and_routers_count_their_share(
    signals, roster, add_worker, add_colocated
):
    add_worker(roster, "d")
    add_colocated(roster, "w", 0, 0, routers=2)
    prefill, decode = pool_states([signals.read(0.0)] * 2, [DEFAULT_TIER])
    assert (prefill.ready, prefill.colocated) == (1, 1)
    assert (decode[DEFAULT_TIER].ready, decode[DEFAULT_TIER].colocated) == (2, 1)
    prefill, decode = signals.own_pools(0.0)
    assert (prefill.colocated, decode[DEFAULT_TIER].colocated) == (0.5, 0.5)


def test_the_batch_limit_is_what_the_workers_say(roster, signals, make_report):
    kv = KvSpec(4, 2, 16, "float32", RopeSpec()).to_proto()
    for name, limit in (("d0", 32), ("d1", 64), ("without a limit", 0)):
        hello = registry_pb2.Hello(worker_id=name, address="a:1", stages=[DECODE], kv=kv, max_num_seqs=limit)
        (info,) = WorkerInfo.from_hello(hello)
        worker = roster.join(info)
        roster.pool_of(worker).report(worker, make_report(), 0.0)
    states = [pool_states([signals.read(0.0)] * 2, [DEFAULT_TIER]), signals.own_pools(0.0)]
    assert [decode[DEFAULT_TIER].max_num_seqs for _, decode in states] == [48, 48]

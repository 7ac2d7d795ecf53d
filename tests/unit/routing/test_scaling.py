"""Tests the scaling policy: needs against arithmetic by hand, and how targets follow needs over time."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from overfill.routing.arrivals import AnswerLengths, Arrivals
from overfill.routing.capacity import PrefillRate, StepCost, StepTime
from overfill.routing.scaling import Bounds, PoolState, Scaler, ScalingConfig, _servers
from overfill.routing.tier import DEFAULT_TIER

STEP = StepCost(base=0.01, per_sequence=0.001, per_kv_token=0.0)
CONFIG = ScalingConfig(ttft=2.0, itl=0.05, prefill_rate=1000.0, step=STEP, answer_tokens=100, prompt_tokens=500)


def play(scaler, seconds, rate, *, prompt=500, answer=100, start=0.0, pools=None, noise=None):
    """Returns the targets of every second at ``rate`` requests/s. Workers follow the targets at once."""
    pools = pools if pools is not None else [1, 1]
    history, now, arrival = [], start, start
    while now < start + seconds:
        now += 1.0
        while rate > 0 and arrival < now:
            scaler.arrived(DEFAULT_TIER, arrival, prompt)
            scaler.finished(DEFAULT_TIER, arrival, prompt, answer)
            arrival += noise.expovariate(rate) if noise else 1 / rate
        running = round(rate * answer * STEP.base)
        targets = scaler.targets(
            now, PoolState(ready=pools[0]), {DEFAULT_TIER: PoolState(ready=pools[1], running=running)}
        )
        pools[:] = targets.prefill, targets.decode
        history.append(targets)
    return history


def test_needs_follow_from_load_and_capacity():
    last = play(Scaler(CONFIG), 120, rate=20)[-1]
    # 20 x 500 tokens/s at 1,000 tokens/s a worker: ten busy workers, and some more so that no request waits long.
    assert last.prefill_pool.inputs["load"] == pytest.approx(10, rel=0.05)
    assert 10 < last.prefill_pool.need < 13
    # A step of 35 sequences takes 45 ms, nine tenths of the objective; 20 x 100 tokens/s x 45 ms = 90 at once.
    assert last.decode_pools[DEFAULT_TIER].inputs["batch"] == pytest.approx(35)
    assert last.decode_pools[DEFAULT_TIER].inputs["concurrency"] == pytest.approx(90, rel=0.05)
    assert last.decode_pools[DEFAULT_TIER].need == pytest.approx((90 + 1.645 * math.sqrt(90)) / 35, rel=0.05)
    assert (last.prefill, last.decode) == (math.ceil(last.prefill_pool.need), 4)


def test_a_tighter_objective_needs_more_workers():
    def need(**objective):
        last = play(Scaler(replace(CONFIG, **objective)), 120, rate=20)[-1]
        return last.prefill_pool.need, last.decode_pools[DEFAULT_TIER].need

    loose, fast_first, fast_next = need(), need(ttft=0.6), need(itl=0.025)
    assert fast_first[0] > loose[0]
    assert fast_first[1] == loose[1]
    assert fast_next[0] == loose[0]
    assert fast_next[1] > loose[1]


def test_tokens_in_the_prefix_cache_need_no_prefill():
    scaler = Scaler(CONFIG)
    for second in range(60):
        scaler.arrived(DEFAULT_TIER, second, 5000, cached_tokens=4500)
    inputs = scaler.targets(60, PoolState(ready=1), {DEFAULT_TIER: PoolState(ready=1)}).prefill_pool.inputs
    assert inputs["mean_tokens"] == 500


def test_kv_that_does_not_fit_limits_the_batch():
    scaler = Scaler(CONFIG)
    inputs = (
        scaler.targets(0, PoolState(ready=1), {DEFAULT_TIER: PoolState(ready=1, kv_tokens=5500)})
        .decode_pools[DEFAULT_TIER]
        .inputs
    )
    assert inputs["batch"] == pytest.approx(0.9 * 5500 / inputs["context_tokens"])


@pytest.mark.parametrize("workers", [1, 4, 24])
def test_full_workers_with_a_queue_need_more_workers(workers):
    full = PoolState(ready=workers, running=32 * workers, waiting_jobs=8, max_num_seqs=32)
    slack = replace(CONFIG, itl=10.0)  # the workers' own limit is the only one
    scaler = Scaler(slack)
    assert scaler.targets(0, PoolState(ready=1), {DEFAULT_TIER: full}).decode_pools[DEFAULT_TIER].need > workers
    empty = scaler.targets(1, PoolState(ready=1), {DEFAULT_TIER: PoolState()}).decode_pools[DEFAULT_TIER]
    assert empty.inputs["batch_limit"] == 32, "a pool that has shrunk to nothing keeps the limit"
    chosen = Scaler(replace(slack, max_batch=16)).targets(0, PoolState(ready=1), {DEFAULT_TIER: full})
    assert chosen.decode_pools[DEFAULT_TIER].inputs["batch_limit"] == 16
    unknown = Scaler(slack).targets(0, PoolState(ready=1), {DEFAULT_TIER: PoolState(ready=1)})
    assert unknown.decode_pools[DEFAULT_TIER].inputs["batch_limit"] == 64


def test_a_step_of_load_is_followed_within_the_short_window():
    scaler, pools = Scaler(CONFIG), [1, 1]
    before = play(scaler, 120, 4, pools=pools)[-1]
    history = play(scaler, 60, 20, start=120, pools=pools)
    settled = play(Scaler(CONFIG), 120, 20)[-1]
    reached = next(t.at for t in history if t.prefill >= settled.prefill and t.decode >= settled.decode)
    assert before.prefill < settled.prefill
    assert reached <= 120 + CONFIG.short_window + 1
    assert all(t.prefill >= settled.prefill for t in history if t.at >= reached), "targets stay there"


def test_a_pool_shrinks_only_after_the_stabilisation_window():
    scaler, pools = Scaler(CONFIG), [1, 1]
    high = play(scaler, 120, 20, pools=pools)[-1]
    history = play(scaler, 300, 2, start=120, pools=pools)
    first = next(t.at for t in history if t.prefill < high.prefill)
    assert first >= 120 + CONFIG.stabilise
    assert history[-1].prefill == play(Scaler(CONFIG), 120, 2)[-1].prefill
    # (1 + hysteresis) keeps one more than the need at most
    assert [t.prefill for t in history] == sorted((t.prefill for t in history), reverse=True)


def test_an_idle_pool_goes_to_its_minimum_and_the_first_request_wakes_it():
    scaler, pools = Scaler(replace(CONFIG, prefill=Bounds(0, 8), decode=Bounds(2, 8))), [1, 1]
    play(scaler, 60, 5, pools=pools)
    idle = play(scaler, 200, 0, start=60, pools=pools)[-1]
    assert (idle.prefill, idle.decode) == (0, 2)
    assert "nothing arrives" in idle.prefill_pool.reason
    woken = scaler.targets(400, PoolState(waiting_jobs=1, waiting_tokens=10), {DEFAULT_TIER: PoolState(ready=2)})
    assert woken.prefill == 1


def test_a_queue_is_worked_off():
    scaler, pools = Scaler(CONFIG), [1, 1]
    calm = play(scaler, 120, 4, pools=pools)[-1]
    queue = PoolState(ready=calm.prefill, waiting_jobs=100, waiting_tokens=50_000)
    grown = scaler.targets(121, queue, {DEFAULT_TIER: PoolState(ready=calm.decode)})
    assert grown.prefill >= calm.prefill + 4, "50,000 tokens in 10 s are the work of five workers"
    assert grown.prefill_pool.reason == "queue to work off"


def test_requests_that_wait_for_decode_because_of_prefill_count_for_prefill():
    waiting = PoolState(ready=2, waiting_jobs=100, waiting_tokens=50_000)
    behind = PoolState(ready=2, waiting_jobs=20, waiting_tokens=10_000)
    blocked = Scaler(CONFIG).targets(0, behind, {DEFAULT_TIER: waiting})
    assert blocked.decode == 2
    assert blocked.prefill_pool.inputs["waiting_tokens"] == 60_000
    free = Scaler(CONFIG).targets(0, PoolState(ready=2), {DEFAULT_TIER: waiting})
    assert (free.prefill, free.decode) == (2, 3)


def test_running_sequences_count_before_any_has_finished():
    scaler = Scaler(CONFIG)
    scaler.arrived(DEFAULT_TIER, 0, 500)
    targets = scaler.targets(1, PoolState(ready=1), {DEFAULT_TIER: PoolState(ready=1, running=150, waiting_jobs=50)})
    assert targets.decode == math.ceil(200 / 35)
    assert targets.decode_pools[DEFAULT_TIER].reason == "sequences present"


def test_each_tier_has_its_own_objectives_and_step_cost():
    tight = replace(CONFIG, itl=0.025, ttft=0.6)
    scaler = Scaler(CONFIG, {"full": CONFIG, "fast": tight})
    running = PoolState(ready=1, running=70)
    pools = scaler.targets(0.0, PoolState(ready=1), {"full": running, "fast": running}).decode_pools
    assert (pools["full"].workers, pools["fast"].workers) == (2, 6)  # 35 and 12.5 sequences a step
    assert scaler.config.ttft == 0.6, "prefill serves the tier with the shortest objective as well"
    before = scaler.expected_itl("fast", 8)
    for second in range(200):
        scaler.finished("full", second, 500, 100, itl=0.2, batch=8)
    assert scaler.expected_itl("full", 8) > 0.15
    assert scaler.expected_itl("fast", 8) == before


def test_workers_with_both_stages_take_their_part_of_the_need():
    scaler = Scaler(replace(CONFIG, stabilise=10, hysteresis=0.0))

    def targets(now, colocated):
        # A batch of 35 sequences meets the objective.
        decode = PoolState(ready=1 + colocated, colocated=colocated, running=5 * 35)
        prefill = PoolState(ready=1 + colocated, colocated=colocated, waiting_tokens=60_000)
        return scaler.targets(now, prefill, {DEFAULT_TIER: decode})

    alone = targets(1.0, 0)
    assert (alone.decode, alone.prefill) == (5, math.ceil(alone.prefill_pool.need))
    beside = targets(20.0, 2)
    assert beside.decode == 3
    assert beside.decode_pools[DEFAULT_TIER].need == pytest.approx(3), "the need of workers with one stage"
    assert beside.prefill == math.ceil(beside.prefill_pool.need) < alone.prefill
    enough = targets(40.0, 9)
    assert (enough.decode, enough.decode_pools[DEFAULT_TIER].need) == (0, 0), "they count towards the minimum"


def test_too_few_workers_in_all_are_shared_by_need():
    scaler, pools = Scaler(replace(CONFIG, max_total=8)), [4, 4]
    prompts = play(scaler, 120, 20, prompt=1000, answer=10, pools=pools)[-1]
    answers = play(scaler, 300, 20, prompt=50, answer=1000, start=120, pools=pools)[-1]
    assert prompts.prefill + prompts.decode == answers.prefill + answers.decode == 8
    assert prompts.prefill == 7
    assert answers.decode >= 6
    assert answers.decode_pools[DEFAULT_TIER].reason == "share of 8 workers"


def test_chance_does_not_make_pools_flap():
    noise = random.Random(1)
    history = play(Scaler(CONFIG), 1800, 20, noise=noise)[300:]
    moves = sum(a.prefill != b.prefill for a, b in itertools.pairwise(history))
    assert moves <= 12, "25 minutes of Poisson arrivals at one rate"


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0.2, 60), prompt=st.integers(1, 4000), answer=st.integers(1, 600))
@example(rate=16.734375, prompt=1, answer=559)
def test_constant_load_settles(rate, prompt, answer):
    history = play(Scaler(CONFIG), 300, rate, prompt=prompt, answer=answer)
    late = [(t.prefill, t.decode) for t in history[150:]]
    # The prior of an answer's length fades for minutes: a need that nears a whole number may still pass it, once.
    assert sum(a != b for a, b in itertools.pairwise(late)) <= 1, "targets move although the load is constant"
    prefill, decode = late[-1]
    assert prefill >= min(64, rate * prompt / CONFIG.prefill_rate * 0.95)
    assert decode >= min(64, rate * answer * STEP.seconds(35, 0) / 35 * 0.95)


_STATES = st.builds(
    PoolState,
    ready=st.integers(0, 100),
    starting=st.integers(0, 20),
    draining=st.integers(0, 20),
    waiting_jobs=st.integers(0, 10_000),
    waiting_tokens=st.integers(0, 10**9),
    running=st.integers(0, 10_000),
    kv_tokens=st.sampled_from([0, 1, 1000, 10**6]),
)
_EVENTS = st.lists(
    st.tuples(st.floats(0, 100), st.integers(1, 10**6), st.integers(0, 10**5), _STATES, _STATES),
    min_size=1,
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(
    tiers=st.integers(1, 3),
    events=_EVENTS,
    low=st.integers(0, 3),
    extra=st.integers(1, 10),
    total=st.one_of(st.none(), st.integers(12, 30)),
)
def test_targets_are_never_out_of_bounds(tiers, events, low, extra, total):
    bounds = Bounds(low, low + extra)
    config = ScalingConfig(prefill=bounds, decode=bounds, max_total=total)
    names = ["full", "default", "fast"][:tiers]
    scaler = Scaler(config, dict.fromkeys(names, config))
    now = 0.0
    for pause, prompt, answer, prefill, decode in events:
        now += pause
        tier = names[prompt % tiers]
        scaler.arrived(tier, now, prompt)
        scaler.finished(tier, now, prompt, answer, itl=pause / 100, batch=answer)
        scaler.prefilled(prompt, pause)
        targets = scaler.targets(now, prefill, dict.fromkeys(names, PoolState()) | {tier: decode})
        sizes = [pool.workers for _, _, pool in targets.pools()]
        assert all(bounds.min <= workers <= bounds.max for workers in sizes)
        assert total is None or sum(sizes) <= total
        assert all(math.isfinite(value) for _, _, pool in targets.pools() for value in pool.inputs.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ttft": 0.0}, "ttft must be above 0"),
        ({"quantile": 1.0}, "quantile must be"),
        ({"long_window": 5.0}, "shorter than short_window"),
    ],
)
def test_a_wrong_configuration_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ScalingConfig(**wrong)
    with pytest.raises(ValueError, match="min 3, max 2"):
        Bounds(3, 2)
    with pytest.raises(ValueError, match="max_total 2 is less than 3"):
        Scaler(ScalingConfig(max_total=2), {"full": CONFIG, "fast": CONFIG})


def test_step_times_and_the_prefill_rate_are_learned_and_the_prior_holds_where_nothing_varies():
    true = StepCost(0.02, 0.002, 1e-7)
    learned = StepTime(STEP)
    generator = random.Random(0)
    for _ in range(2000):
        batch, context = generator.randint(1, 60), generator.uniform(100, 4000)
        learned.add(batch, context, true.seconds(batch, context) * generator.uniform(0.9, 1.1))
    for batch, context in ((1, 500), (30, 2000), (60, 4000)):
        assert learned.cost().seconds(batch, context) == pytest.approx(true.seconds(batch, context), rel=0.1)
    constant = StepTime(STEP)
    for _ in range(500):
        constant.add(8, 100, 2 * STEP.seconds(8, 100))
    assert constant.cost().seconds(8, 100) == pytest.approx(2 * STEP.seconds(8, 100), rel=0.1)
    assert min(constant.cost().base, constant.cost().per_sequence, constant.cost().per_kv_token) >= 0
    rate = PrefillRate(1000.0)
    for _ in range(200):
        rate.add(500, 0.25)
    assert rate.value == pytest.approx(2000, rel=0.05)


def test_servers_against_erlang():
    """M/M/c at the mean: Sakasegawa's approximation is within a worker of Erlang C."""

    def erlang_c(load, servers):
        blocked = 1.0
        for n in range(1, servers + 1):
            blocked = load * blocked / (n + load * blocked)
        return servers * blocked / (servers - load * (1 - blocked))

    def exact(load, budget, quantile):
        servers = math.floor(load) + 1
        while True:
            wait = erlang_c(load, servers) * math.exp(-(servers - load) * budget)
            if wait <= 1 - quantile:
                return servers
            servers += 1

    for load in (0.5, 2.0, 9.0, 40.0):
        for budget in (0.1, 0.5, 2.0):
            assert abs(math.ceil(_servers(load, 1.0, 1.0, budget, 0.95)) - exact(load, budget, 0.95)) <= 1


def test_arrivals_rise_beyond_chance_only():
    calm = Arrivals(10, 60, 3)
    for tenth in range(600):
        calm.add(tenth / 10, 100)
    assert not calm.rate(60).rising
    assert calm.rate(60).tokens == pytest.approx(1000, rel=0.02)
    for hundredth in range(500):
        calm.add(60 + hundredth / 100, 100)
    assert calm.rate(65).rising
    assert calm.rate(65).tokens == pytest.approx(5500, rel=0.1)


def test_answers_weigh_contexts_by_length_and_survive_idleness():
    answers = AnswerLengths(60, 10, 10)
    for second in range(300):
        answers.add(second, 1000, 1)
        answers.add(second, 100, 199)
    shape = answers.shape()
    assert shape.tokens == pytest.approx(100, rel=0.02)
    assert shape.context == pytest.approx(0.995 * (100 + 100), rel=0.1)
    answers.add(10_000, 100, 199)
    assert answers.shape().tokens == pytest.approx(102, rel=0.05)

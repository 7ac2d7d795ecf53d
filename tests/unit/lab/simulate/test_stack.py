"""The whole simulated stack: every request ends exactly once, runs repeat; policies, sizes and scaling."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfill.errors import InvalidRequest, OverfillError
from overfill.lab.simulate.options import SimTier, SimulationOptions
from overfill.lab.simulate.policies import NAMES
from overfill.lab.simulate.profiles import BUILT_IN, CPU
from overfill.lab.simulate.sizing import SizeSearch
from overfill.lab.simulate.stack import Simulation
from overfill.lab.traffic.outcome import Objective
from overfill.lab.traffic.traces import TraceRequest, concatenate, synthetic
from overfill.routing.capacity import StepCost
from overfill.routing.scaling import Bounds, ScalingConfig

OBJECTIVE = Objective(ttft=2, itl=0.1)
TIGHT = replace(
    CPU,
    startup=3,
    grace=0.5,
    prefill=replace(CPU.prefill, kv_tokens=2000, max_num_batched_tokens=128),
    decode=replace(CPU.decode, kv_tokens=1600),
    colocated_kv_tokens=1600,
)


def run(trace, profile=CPU, **options):
    return Simulation(trace, profile, SimulationOptions(**options)).run()


def test_an_idle_stack_s_time_to_first_token_is_prefill_and_messages():
    [request] = run([TraceRequest(0.0, 512, 11)], check=True).requests
    hops = 4 * CPU.hop  # start with its prefill worker, prompt, and the first token through two processes
    assert request.ttft == pytest.approx(CPU.prefill.step_seconds([(0, 512)]) + hops, abs=1e-6)
    steps = sum(CPU.decode.cost.seconds(1, 513 + step) for step in range(10))
    handoff = 512 * CPU.kv_token_bytes / CPU.layers / CPU.link_bandwidth
    assert request.last - request.first == pytest.approx(steps + handoff, rel=0.01)


def test_a_prompt_that_stays_with_its_answer_needs_no_transfer():
    slow_link = replace(CPU, link_bandwidth=1e5)
    result = run([TraceRequest(0.0, 512, 11)], slow_link, prefill=0, decode=0, colocated=1, check=True)
    [request] = result.requests
    hops = 2 * CPU.hop  # start, and the first token
    assert request.ttft == pytest.approx(CPU.prefill.step_seconds([(0, 512)]) + hops, abs=1e-6)
    steps = sum(CPU.decode.cost.seconds(1, 513 + step) for step in range(10))
    assert request.last - request.first == pytest.approx(steps, abs=1e-6)
    assert result.figures(OBJECTIVE)["local"] == 1.0
    assert run([TraceRequest(0.0, 512, 11)]).figures(OBJECTIVE)["local"] == 0.0


@pytest.mark.parametrize("mtbf", [None, 5.0])
def test_workers_with_both_stages_alone_answer_everything(mtbf):
    trace = synthetic(80, "poisson", 4, 300, 100, 0)
    result = run(trace, TIGHT, prefill=0, decode=0, colocated=3, mtbf=mtbf, seed=2, check=True)
    assert all(request.ok for request in result.requests)
    assert result.worker_hours * 3600 == pytest.approx(result.counters.decode_worker_seconds)
    if mtbf is None:
        assert result.counters.local_prompts == result.counters.prompts >= 80
    else:
        assert result.counters.migrations > 0


def test_prompts_leave_the_answers_of_a_worker_with_both_stages_within_the_objective():
    """Long prompts arrive beside one long answer. Whole, they take 2.5 s; in chunks beside its steps, 4 s."""
    trace = [TraceRequest(0.0, 10, 2000), *(TraceRequest(1.0 + 6 * i, 3000, 2) for i in range(5))]
    profile = replace(CPU, decode=replace(CPU.decode, base=0.02))
    options = {"prefill": 0, "decode": 0, "colocated": 1}
    patient, hurried = (run(trace, profile, goal=Objective(ttft=ttft, itl=0.05), **options) for ttft in (60, 3.2))
    # A chunk late in a prompt takes longer than the mean one, and the first prompts teach the rate.
    assert patient.gaps.percentile(0.99) < 0.1
    assert hurried.requests[-1].ttft < 3.2 < patient.requests[-1].ttft


def test_conditional_keeps_short_prompts_and_sends_long_ones_away():
    trace = [TraceRequest(0.5 * i, 1500 if i % 10 == 9 else 20, 20) for i in range(200)]
    runs = {
        policy: run(trace, prefill=1, decode=0, colocated=2, policy=policy)
        for policy in ("conditional", "prefix-affinity")
    }
    local = {policy: result.figures(OBJECTIVE)["local"] for policy, result in runs.items()}
    assert 0.8 <= local["conditional"] < 1
    assert local["prefix-affinity"] < 0.6
    assert runs["conditional"].figures(OBJECTIVE)["itl_p99"] < 0.1


def test_a_profile_of_two_kinds_of_machine_has_no_worker_with_both_stages():
    for name in ("h100-l4", "l4"):
        with pytest.raises(InvalidRequest, match="has no worker with both stages"):
            run([TraceRequest(0.0, 10, 2)], BUILT_IN[name], prefill=0, decode=0, colocated=1)


def test_runs_repeat_and_another_seed_differs():
    trace = synthetic(200, "poisson", 4, 400, 60, 0)
    scaling = ScalingConfig(prefill=Bounds(1, 4), decode=Bounds(1, 4), stabilise=10)
    runs = [run(trace, TIGHT, prefill=2, decode=2, mtbf=40, scaling=scaling, seed=seed) for seed in (1, 1, 2)]
    times = [[(r.first, r.last) for r in result.requests] for result in runs]
    assert times[0] == times[1]
    assert times[0] != times[2]


@st.composite
def loads(draw):
    """Requests with shared prefixes, up to the capacity of the tight profile."""
    count = draw(st.integers(5, 40))
    pauses = draw(st.lists(st.floats(0, 2), min_size=count, max_size=count))
    trace, now = [], 0.0
    for index, pause in enumerate(pauses):
        now += pause if index else 0.0
        prompt, family = draw(st.integers(1, 900)), draw(st.integers(0, 2))
        blocks = tuple(100 * family + place for place in range(-(-prompt // 64)))
        trace.append(TraceRequest(now, prompt, draw(st.integers(1, 300)), blocks, 64))
    return trace


@settings(max_examples=25, deadline=None)
@given(
    trace=loads(),
    policy=st.sampled_from(NAMES),
    workers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    colocated=st.integers(0, 2),
    mtbf=st.sampled_from([None, 15.0, 60.0]),
    total=st.sampled_from([0, 4, None]),
    seed=st.integers(0, 3),
)
def test_every_request_ends_once_and_nobody_waits_in_vain(trace, policy, workers, colocated, mtbf, total, seed):
    """Workers die, pools grow and shrink, blocks run out: all counters are checked after every event."""
    bounds = Bounds(1, 5)
    scaling = None
    if total != 0:
        scaling = ScalingConfig(
            prefill=bounds,
            decode=bounds,
            max_total=total and total + colocated,
            stabilise=5,
            short_window=3,
            long_window=9,
        )
    result = run(
        trace,
        TIGHT,
        prefill=workers[0],
        decode=workers[1],
        colocated=colocated,
        policy=policy,
        mtbf=mtbf,
        scaling=scaling,
        seed=seed,
        check=True,
    )
    assert len(result.requests) == len(trace)
    for request in result.requests:
        assert (request.ended, request.error) == (True, "")
        assert request.trace.arrival < request.first <= request.last
    assert result.counters.checks == result.counters.events


def test_what_is_too_large_or_too_much_is_refused():
    trace = [TraceRequest(0.0, 100, 10), TraceRequest(0.1, 5000, 10)]
    assert [r.error for r in run(trace, TIGHT).requests] == ["", "PromptTooLong"]
    crowd = run(synthetic(50, "burst", 1, 500, 50, 0), TIGHT, max_queue=10)
    errors = [r.error for r in crowd.requests]
    assert set(errors) == {"", "Overloaded"}
    assert crowd.figures(OBJECTIVE)["failed"] == errors.count("Overloaded")


def test_a_dead_decode_worker_s_answers_go_on_elsewhere():
    trace = synthetic(60, "poisson", 3, 200, 200, 0)
    result = run(trace, replace(CPU, startup=2), prefill=2, decode=2, mtbf=8, seed=1, check=True)
    assert result.counters.failures > 2
    assert result.counters.migrations > 0
    assert all(request.ok for request in result.requests)


def test_what_prefill_sends_to_a_worker_that_has_just_died_is_lost():
    """Messages are slow, so first tokens and KV are in transit whenever a decode worker dies."""
    profile = replace(CPU, hop=0.3, startup=2)
    for seed in range(10):
        trace = synthetic(40, "poisson", 3, 200, 50, seed)
        result = run(trace, profile, prefill=2, decode=3, mtbf=5, seed=seed, check=True)
        assert all(request.ok for request in result.requests)


def test_prefixes_that_are_cached_are_not_computed_again():
    blocks = tuple(range(8))
    trace = [TraceRequest(10.0 * index, 900, 10, blocks, 100) for index in range(5)]
    cached, plain = run(trace), run(trace, prefix_cache=False)
    assert cached.figures(None)["cached"] == pytest.approx(4 / 5 * 800 / 900)
    assert plain.figures(None)["cached"] == 0
    assert cached.requests[-1].ttft < plain.requests[-1].ttft / 3


def test_pools_follow_the_kind_of_load():
    """Long prompts with short answers, then the other way round, on six workers in all."""
    prompts = synthetic(300, "poisson", 2, 1500, 5, 0)
    answers = [replace(r, arrival=r.arrival + 150) for r in synthetic(600, "poisson", 4, 50, 600, 1)]
    profile = replace(CPU, startup=5, decode=replace(CPU.decode, base=0.02, per_sequence=0.004, max_num_seqs=16))
    config = ScalingConfig(
        ttft=3,
        itl=0.1,
        prefill=Bounds(1, 5),
        decode=Bounds(1, 5),
        max_total=6,
        prefill_rate=profile.prefill_rate,
        step=profile.decode.cost,
        max_batch=16,
        stabilise=20,
    )
    result = run([*prompts, *answers], profile, prefill=3, decode=3, scaling=config)
    early = next(s for s in result.samples if s.time >= 120)
    late = next(s for s in result.samples if s.time >= 260)
    assert early.prefill_ready > late.prefill_ready
    assert early.decode_ready < late.decode_ready
    assert all(s.prefill_workers + s.decode_workers <= 6 for s in result.samples)
    assert all(request.ok for request in result.requests)


def test_sizes_meet_the_objective_and_one_worker_less_does_not():
    trace = synthetic(150, "poisson", 6, 512, 64, 0)
    profile = replace(CPU, decode=replace(CPU.decode, per_sequence=0.02))
    sizes = SizeSearch(trace, profile, SimulationOptions(), OBJECTIVE, 0.95, costs=(3, 1)).frontier()
    assert [size.prefill for size in sizes] == sorted({size.prefill for size in sizes})
    for size in sizes:
        assert size.cost == 3 * size.prefill + size.decode
        assert size.result.attainment(OBJECTIVE) >= 0.95
        for prefill, decode in ((size.prefill - 1, size.decode), (size.prefill, size.decode - 1)):
            if prefill and decode:
                assert run(trace, profile, prefill=prefill, decode=decode).attainment(OBJECTIVE) < 0.95


def test_an_objective_that_no_number_of_workers_meets_is_said_to_be_one():
    search = SizeSearch(
        [TraceRequest(0.0, 4000, 5)], CPU, SimulationOptions(), Objective(ttft=0.1), 0.95, max_workers=4
    )
    with pytest.raises(OverfillError, match="not met by 95% of the requests with 4 workers"):
        search.frontier()


def test_an_unknown_policy_is_named():
    with pytest.raises(InvalidRequest, match=r"policy: must be one of .*least-load.*, got 'best'"):
        run([TraceRequest(0.0, 1, 1)], policy="best")


FULL = replace(CPU, decode=CPU.decode.with_weights(6))
TIERS = (SimTier("full", FULL, share=3, itl=0.05), SimTier("fast", CPU, share=1))


def test_each_tier_has_its_workers_and_its_share_of_requests():
    model = CPU.decode
    assert FULL.decode.cost == StepCost(6 * model.base, 6 * model.per_sequence, model.per_kv_token)
    result = run(synthetic(400, "poisson", 3, 200, 60, 0), prefill=2, tiers=TIERS, check=True)
    figures = result.tier_figures(OBJECTIVE)
    assert figures["full"]["requests"] == pytest.approx(300, rel=0.1)
    assert figures["full"]["answers"] + figures["fast"]["answers"] == 400
    assert figures["full"]["browned_out"] == 0
    assert figures["full"]["request_itl_p95"] > 3 * figures["fast"]["request_itl_p95"], "its weights are six times more"


def test_a_brownout_gives_answers_to_the_next_tier_instead_of_refusals():
    """Twice what the tier can do, then a fifth of it."""
    trace = concatenate([synthetic(rate * 60, "poisson", rate, 200, 60, 0) for rate in (16, 2)])
    options = {"prefill": 4, "tiers": TIERS, "max_wait": 1.0}
    refused = run(trace, **options)
    saved = run(trace, brownout=("full", "fast"), **options)
    half = run(trace, brownout=("full", "fast"), brownout_share=0.5, **options)
    attainment = [result.attainment(OBJECTIVE) for result in (refused, half, saved)]
    assert attainment == sorted(attainment)
    assert attainment[2] > attainment[0] + 0.2
    assert saved.tier_figures(OBJECTIVE)["full"]["refused"] < 0.1 * refused.tier_figures(OBJECTIVE)["full"]["refused"]
    late = [request for request in saved.requests if request.trace.arrival > 80]
    assert all(request.job.tier == request.asked for request in late), "back again"
    assert not saved.samples[-1].brownout


def test_the_scaler_moves_the_pool_of_the_loaded_tier():
    scaling = ScalingConfig(prefill=Bounds(1, 4), decode=Bounds(1, 6))
    tiers = (SimTier("full", FULL, share=1, itl=0.05), SimTier("fast", CPU, share=0))
    result = run(synthetic(900, "poisson", 15, 200, 60, 0), replace(CPU, startup=2), tiers=tiers, scaling=scaling)
    workers = [sample.tier_workers for sample in result.samples]
    assert max(at.get("full", 0) for at in workers) > 2
    assert {at.get("fast", 0) for at in workers if at} == {1}

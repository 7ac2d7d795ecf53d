"""The whole simulated stack: every request ends exactly once, runs repeat; policies, sizes and scaling."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfill.lab.simulate.options import SimTier, SimulationOptions
from overfill.lab.simulate.profiles import CPU
from overfill.lab.simulate.sizing import smallest_sizes
from overfill.lab.simulate.stack import Simulation
from overfill.lab.traffic.outcome import Objective
from overfill.lab.traffic.traces import TraceRequest, concatenate, synthetic
from overfill.routing.policies import DECODE_POLICIES, POLICIES
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
    assert request.outcome.ttft == pytest.approx(CPU.prefill.step_seconds([(0, 512)]) + hops, abs=1e-6)
    steps = sum(CPU.decode.cost.seconds(1, 513 + step) for step in range(10))
    handoff = 512 * CPU.kv_token_bytes / CPU.layers / CPU.link_bandwidth
    assert request.last - request.first == pytest.approx(steps + handoff, rel=0.01)


@pytest.mark.parametrize("mtbf", [None, 5.0])
def test_workers_with_both_stages_alone_answer_everything(mtbf):
    trace = synthetic(80, 4, 300, 100, 0)
    result = run(trace, TIGHT, prefill=0, decode=0, colocated=3, mtbf=mtbf, seed=2, check=True)
    assert all(request.ok for request in result.requests)
    assert result.figures["workers.prefill"] == result.figures["workers.default"] >= 3, "each is in both pools"
    if mtbf is None:
        assert result.counters.local_prompts == result.counters.prompts >= 80
    else:
        assert result.counters.migrations > 0


def test_prompts_leave_the_answers_of_a_worker_with_both_stages_within_the_objective():
    """Long prompts arrive beside one long answer. Whole, they take 2.5 s; in chunks beside its steps, 4 s."""
    trace = [TraceRequest(0.0, 10, 2000), *(TraceRequest(1.0 + 6 * i, 3000, 2) for i in range(5))]
    profile = replace(CPU, decode=replace(CPU.decode, base=0.02))
    options = {"prefill": 0, "decode": 0, "colocated": 1}
    patient, hurried = (run(trace, profile, objective=Objective(ttft=ttft, itl=0.05), **options) for ttft in (60, 3.2))
    # A chunk late in a prompt takes longer than the mean one, and the first prompts teach the rate.
    assert patient.gaps.percentile(99) < 0.1
    assert hurried.requests[-1].outcome.ttft < 3.2 < patient.requests[-1].outcome.ttft


def test_runs_repeat_and_another_seed_differs():
    trace = synthetic(200, 4, 400, 60, 0)
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
        output = draw(st.integers(1, 300))
        blocks = tuple(100 * family + place for place in range((prompt + output) // 64 + 1))
        full, end = prompt // 64, (prompt + output) // 64
        trace.append(TraceRequest(now, prompt, output, blocks[: -(-prompt // 64)], 64, blocks[full:end]))
    return trace


@settings(max_examples=25, deadline=None)
@given(
    trace=loads(),
    policies=st.tuples(st.sampled_from([*POLICIES]), st.sampled_from(DECODE_POLICIES)),
    workers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    colocated=st.integers(0, 2),
    mtbf=st.sampled_from([None, 15.0, 60.0]),
    total=st.sampled_from([0, 4, None]),
    seed=st.integers(0, 3),
    peers=st.booleans(),
    disk=st.sampled_from([0, 30, 1000]),
    returns=st.booleans(),
)
def test_every_request_ends_exactly_once(trace, policies, workers, colocated, mtbf, total, seed, peers, disk, returns):
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
    options = SimulationOptions(
        kv_peers=peers,
        kv_disk_size=disk * 64 * TIGHT.kv_token_bytes,
        prefill=workers[0],
        decode=workers[1],
        colocated=colocated,
        mtbf=mtbf,
        scaling=scaling,
        seed=seed,
        check=True,
    )
    simulation = Simulation(trace, replace(TIGHT, returns_kv=returns), options)
    prefill, decode = (POLICIES[name] for name in policies)
    simulation.roster.use(prefill(seed), lambda: decode(seed))
    result = simulation.run()
    assert len(result.requests) == len(trace)
    for request in result.requests:
        assert request.error == ""
        assert request.trace.arrival < request.first <= request.last
    assert result.counters.checks == simulation.clock.events


def test_a_draining_worker_occupies_its_machine_until_it_has_left():
    scaling = ScalingConfig(prefill=Bounds(1, 2), decode=Bounds(1, 2), max_total=3)
    options = SimulationOptions(decode=2, scaling=scaling)
    simulation = Simulation([TraceRequest(0.0, 100, 3000)] * 2, replace(CPU, grace=5.0), options)
    found = {}
    simulation.clock.at(1.5, lambda: simulation._drain_worker(simulation.workers["d3"]))
    for time in (3.0, 9.0):
        simulation.clock.at(time, lambda time=time: found.update({time: [*simulation.workers]}))
    simulation.run()
    assert found == {3.0: ["p1", "d2", "d3"], 9.0: ["p1", "d2", "d4"]}, "the policy wants two for decode all the time"


def test_what_is_too_large_or_too_much_is_refused():
    trace = [TraceRequest(0.0, 100, 10), TraceRequest(0.1, 5000, 10)]
    assert [r.error for r in run(trace, TIGHT).requests] == ["", "PromptTooLong"]
    crowd = run(synthetic(200, 20, 500, 50, 0), TIGHT, max_wait=1.0)
    errors = [r.error for r in crowd.requests]
    assert set(errors) == {"", "Overloaded"}
    assert crowd.figures["failed"] == errors.count("Overloaded")


def test_what_prefill_sends_to_a_worker_that_has_just_died_is_lost():
    """Messages are slow, so first tokens and KV are in transit whenever a decode worker dies."""
    profile = replace(CPU, hop=0.3, startup=2)
    for seed in range(10):
        trace = synthetic(40, 3, 200, 50, seed)
        result = run(trace, profile, prefill=2, decode=3, mtbf=5, seed=seed, check=True)
        assert all(request.ok for request in result.requests)


@pytest.mark.parametrize("lose", [Simulation._fail, Simulation._drain_worker])
def test_another_worker_computes_the_prompt_of_one_that_dies_or_leaves(lose):
    profile = replace(CPU, grace=0.0)
    simulation = Simulation([TraceRequest(0.0, 512, 11)], profile, SimulationOptions(prefill=2, check=True))

    def lose_the_busy_one():
        [busy] = [w for w in simulation.workers.values() if w.prefill is not None and w.prefill.tickets]
        lose(simulation, busy)

    simulation.clock.at(0.1, lose_the_busy_one)
    [request] = simulation.run().requests
    assert request.outcome.ttft == pytest.approx(0.1 + CPU.prefill.step_seconds([(0, 512)]), abs=0.01)


def test_prefixes_that_are_cached_are_not_computed_again():
    blocks = tuple(range(8))
    trace = [TraceRequest(10.0 * index, 900, 10, blocks, 100) for index in range(5)]
    cached, plain = run(trace), run([replace(request, blocks=()) for request in trace])
    assert cached.figures["cached"] == pytest.approx(4 / 5 * 800 / 900)
    assert plain.figures["cached"] == 0
    assert cached.requests[-1].outcome.ttft < plain.requests[-1].outcome.ttft / 3


def test_sizes_meet_the_objective_and_one_worker_less_does_not():
    trace = synthetic(150, 6, 512, 64, 0)
    profile = replace(CPU, decode=replace(CPU.decode, per_sequence=0.02))
    sizes = smallest_sizes(trace, profile, SimulationOptions(objective=OBJECTIVE), 0.95, costs=(3, 1))
    assert [size.value for size in sizes] == sorted(size.value for size in sizes)
    assert len({size.prefill for size in sizes}) == len(sizes)
    for size in sizes:
        assert size.value == 3 * size.prefill + size.decode
        assert size.attainment >= 0.95
        for prefill, decode in ((size.prefill - 1, size.decode), (size.prefill, size.decode - 1)):
            if prefill and decode:
                assert run(trace, profile, prefill=prefill, decode=decode).attainment < 0.95


FULL = replace(CPU, decode=CPU.decode.with_weights(6))
HURRIED = Objective(ttft=2, itl=0.05)
TIERS = (SimTier("full", FULL, share=3, objective=HURRIED), SimTier("fast", CPU, share=1))


def test_a_brownout_gives_answers_to_the_next_tier_instead_of_refusals():
    """Twice what the tier can do, then a fifth of it."""
    trace = concatenate([synthetic(rate * 60, rate, 200, 60, 0) for rate in (16, 2)])
    options = {"prefill": 4, "tiers": TIERS, "max_wait": 1.0}
    refused = run(trace, **options)
    simulation = Simulation(trace, CPU, SimulationOptions(brownout=("full", "fast"), **options))
    saved = simulation.run()
    half = run(trace, brownout=("full", "fast"), brownout_share=0.5, **options)
    attainment = [result.attainment for result in (refused, half, saved)]
    assert attainment == sorted(attainment)
    assert attainment[2] > attainment[0] + 0.2
    assert saved.figures["refused.full"] < 0.1 * refused.figures["refused.full"]
    late = [request for request in saved.requests if request.trace.arrival > 80]
    assert all(request.job.tier == request.asked for request in late), "back again"
    assert not simulation.brownout.active


def test_the_scaler_moves_the_pool_of_the_loaded_tier():
    scaling = ScalingConfig(prefill=Bounds(1, 4), decode=Bounds(1, 6))
    tiers = (SimTier("full", FULL, share=1, objective=HURRIED), SimTier("fast", CPU, share=0))
    result = run(synthetic(900, 15, 200, 60, 0), replace(CPU, startup=2), tiers=tiers, scaling=scaling)
    assert result.figures["workers.full"] > 2
    assert result.figures["workers.fast"] == 1

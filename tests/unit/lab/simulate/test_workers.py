"""Modelled workers without a router: times agree with the bound model and queueing theory, blocks are counted."""

import json
import random
from dataclasses import asdict, dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfill.errors import InvalidRequest
from overfill.lab.bench.engine.bounds import ModelCost, decode_step_seconds, prefill_seconds
from overfill.lab.bench.engine.machine import Machine
from overfill.lab.simulate.blocks import CachedBlocks
from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.decode import SimDecode, SimSequence
from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.prefill import SimPrefill, Ticket
from overfill.lab.simulate.profiles import BUILT_IN, CPU, DecodeModel, PrefillModel, load_profile


@dataclass(eq=False)
class Named(SimSequence):
    """A sequence by whose name the listener records its end."""

    name: object = None


class Listener:
    """Records the workers' messages."""

    def __init__(self, clock):
        self.clock, self.gaps = clock, Histogram()
        self.done, self.computed, self.sent, self.needed, self.lost = {}, {}, {}, [], []

    def answer_done(self, sequence):
        self.done[sequence.name] = self.clock.now

    def kv_needed(self, sequence):
        self.needed.append(sequence)

    def preempted(self, sequence):
        self.lost.append(sequence)

    def prompt_computed(self, ticket):
        self.computed[ticket.id] = self.clock.now

    def kv_sent(self, ticket):
        self.sent[ticket.id] = self.clock.now

    def lender(self, name):
        return None


def run(clock):
    while clock.step():
        pass


def decode_worker(**model):
    clock = Clock()
    listener = Listener(clock)
    profile = replace(CPU, decode=DecodeModel(**model))
    return clock, listener, SimDecode(profile, listener)


def start(worker, name, prompt, output):
    sequence = Named(prompt, output, 0, name=name)
    assert worker.reserve(sequence)
    worker.first_token(sequence)
    worker.kv_arrived(sequence)
    return sequence


def test_a_single_worker_reproduces_the_bound_model():
    """Times equal the bound model's formulas, summed step by step."""
    cost = ModelCost(
        6_400_000_000, 131_072, layer_flops=0, tail_flops=0, head_flops=0, attention_flops=0, num_layers=10**12
    )
    machine = Machine(bandwidth=240e9, matrix_rate=60e12)
    clock, listener, worker = decode_worker(
        base=cost.weight_bytes / machine.bandwidth, per_kv_token=cost.kv_token_bytes / machine.bandwidth
    )
    start(worker, "first", 1, 2)  # runs one step; the others join together at its end
    for index in range(8):
        start(worker, index, 500, 101)
    run(clock)
    began = listener.done.pop("first")
    expected = sum(decode_step_seconds(cost, machine, 8, 501 + step) for step in range(100))
    assert {round(time - began, 9) for time in listener.done.values()} == {round(expected, 9)}
    assert listener.gaps.percentile(50) == pytest.approx(expected / 100, rel=0.02)

    full = ModelCost(
        0, 131_072, layer_flops=16_000_000_000, tail_flops=0, head_flops=0, attention_flops=524_288, num_layers=10**12
    )
    model = PrefillModel(full.layer_flops / machine.matrix_rate, full.attention_flops / machine.matrix_rate)
    whole = prefill_seconds(full, machine, [5000])
    assert model.step_seconds([(0, 5000)]) == pytest.approx(whole, rel=1e-9)
    chunked = model.step_seconds([(0, 2048)]) + model.step_seconds([(2048, 2048)]) + model.step_seconds([(4096, 904)])
    assert chunked == pytest.approx(whole, rel=1e-9), "chunks cost what the whole costs"


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12),
    kv=st.integers(30, 80),
    block=st.sampled_from([1, 3, 16]),
)
def test_blocks_are_counted_to_the_last_one_whatever_happens(sequences, kv, block):
    """KV arrives 2 s after it is needed. Every sequence ends, and the block counts are exact after every event."""
    clock, listener, worker = decode_worker(
        base=0.5, per_kv_token=0.001, kv_tokens=kv * max(block, 4), block_size=block
    )
    waiting = []

    def arrive(sequence):
        if worker.reserve(sequence):
            clock.after(1.0, worker.first_token, sequence)
            clock.after(2.0, worker.kv_arrived, sequence)
        else:
            clock.after(5.0, arrive, sequence)

    room = kv * max(block, 4)
    for index, (time, prompt, output) in enumerate(sequences):
        if prompt + output + block < room:
            waiting.append(index)
            clock.at(time, arrive, Named(prompt, output, 0, name=index))
    answered = 0
    while clock.step():
        worker.check()
        for sequence in listener.needed[answered:]:
            clock.after(1.0, worker.first_token, sequence)
            clock.after(2.0, worker.kv_arrived, sequence)
        answered = len(listener.needed)
    assert sorted(listener.done) == waiting
    assert worker.used == 0


def prefill_worker(**model):
    clock = Clock()
    listener = Listener(clock)
    link = {name: model.pop(name) for name in ("kv_token_bytes", "link_bandwidth", "layers") if name in model}
    profile = replace(CPU, prefill=PrefillModel(**model), **link)
    blocks = CachedBlocks(profile.prefill.kv_tokens, 0)
    return clock, listener, SimPrefill(profile, blocks, listener)


def test_m_d_1_waits_as_the_formula_says():
    """Poisson arrivals, equal prompts, one at a time: mean wait = rho / (2 mu (1 - rho)) (Pollaczek-Khinchine)."""
    clock, listener, worker = prefill_worker(
        seconds_per_token=0.01, max_num_batched_tokens=100, max_num_seqs=1, kv_token_bytes=0
    )
    generator = random.Random(1)
    arrivals, now = {}, 0.0
    for index in range(20_000):
        now += generator.expovariate(0.7)
        arrivals[str(index)] = now
        clock.at(now, worker.submit, Ticket(str(index), 100, (), None))
    run(clock)
    waits = [listener.computed[name] - time - 1.0 for name, time in arrivals.items()]
    assert sum(waits) / len(waits) == pytest.approx(0.7 / (2 * (1 - 0.7)), rel=0.05)
    assert worker.busy == pytest.approx(20_000)


def test_profiles_are_read_from_files_and_bench_output(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(asdict(BUILT_IN["h100-l4"])))
    assert load_profile(str(path)) == BUILT_IN["h100-l4"]
    rows = [
        f'{{"name": "prefill", "batch": 1, "context": {n}, "value": {n / (n * 1e-3 + n * (n + 1) / 2 * 1e-6)}, '
        '"unit": "tokens/s"}'
        for n in (512, 2048)
    ]
    rows += [
        f'{{"name": "decode_decoder", "batch": {b}, "context": {c}, "value": {b / (0.01 + 0.002 * b + 1e-6 * b * c)}, '
        '"unit": "tokens/s"}'
        for b in (1, 8, 32)
        for c in (256, 4096)
    ]
    path.write_text("\n".join(rows))
    profile = load_profile(str(path))
    assert profile.prefill.seconds_per_token == pytest.approx(1e-3, rel=1e-3)
    assert profile.prefill.seconds_per_position == pytest.approx(1e-6, rel=1e-3)
    assert profile.decode.cost.seconds(16, 1000) == pytest.approx(0.058, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "x", "speed": 1}', "profile.speed: "),
        ('{"name": "x", "prefill": {"seconds_per_token": -1}}', "profile.prefill.seconds_per_token: "),
        ('{"name": "x", "decode": {"base": "fast"}}', "profile.decode.base: "),
        ('{"name": "x", "decode": 3}', "profile.decode: "),
        ('{"name": "x"}', "profile.prefill: Field required"),
        ("{}\n{}", "line 1 is no line of `overfill bench`"),
    ],
)
def test_a_wrong_profile_is_named(tmp_path, text, message):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message.replace("[", r"\[")):
        load_profile(str(path))
    with pytest.raises(InvalidRequest, match="must be one of cpu, h100-l4"):
        load_profile("nothing-here")

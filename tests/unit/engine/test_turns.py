"""Tests how a worker with both stages divides its time: chunks of prompts against the objectives. No models."""

import pytest

from overfill.engine.turns import MIN_CHUNK, Turns

MAX = 2048


def measured(ttft=None, itl=None, decode=0.02, token=0.001, step=0.0):
    """Turns that have measured these costs, on prefill steps of two sizes."""
    turns = Turns(MAX, ttft, itl)
    for tokens in (100, 400) * 20:
        turns.prefilled(tokens, step + token * tokens)
        turns.decoded(decode)
    return turns


def test_steps_alternate_and_the_first_is_a_decode_step():
    turns = Turns(MAX)
    assert turns.decode_first
    turns.decoded(0.01)
    assert not turns.decode_first
    turns.prefilled(64, 0.1)
    assert turns.decode_first
    turns.decoded(0.01)
    turns.prefilled(0, 0.1)
    assert turns.decode_first, "after a failed step too"


@pytest.mark.parametrize(
    ("itl", "step", "tokens"),
    [(0.1, 0.0, 80), (0.2, 0.0, 180), (0.1, 0.01, 70), (9.0, 0.0, MAX)],
)
def test_a_chunk_fills_what_a_decode_step_leaves_of_the_objective(itl, step, tokens):
    assert measured(itl=itl, step=step).chunk(True, 5000, 0.0) == pytest.approx(tokens, abs=1)


def test_without_running_answers_or_without_an_objective_chunks_are_full():
    assert measured(ttft=2.0, itl=0.1).chunk(False, 5000, 0.0) == MAX
    assert measured(ttft=2.0).chunk(True, 5000, 0.0) == MAX
    assert not Turns(MAX, 2.0).measures
    assert Turns(MAX, 2.0, 0.1).measures


def test_before_both_stages_are_measured_chunks_are_short():
    turns = Turns(MAX, 2.0, 0.1)
    assert turns.chunk(True, 5000, 0.0) == MIN_CHUNK
    turns.decoded(0.02)
    assert turns.chunk(True, 5000, 0.0) == MIN_CHUNK
    turns.prefilled(0, 9.0)
    assert turns.chunk(True, 5000, 0.0) == MIN_CHUNK, "a failed step says nothing"
    turns.prefilled(100, 0.1)
    assert turns.chunk(True, 5000, 0.0) == 80


def test_the_engine_s_maximum_bounds_every_chunk():
    turns = Turns(8, 2.0, 0.1)
    assert turns.chunk(True, 5000, 0.0) == 8
    turns.decoded(0.02)
    turns.prefilled(8, 0.008)
    assert turns.chunk(True, 5000, 0.0) == 8


@pytest.mark.parametrize(
    ("itl", "step"),
    [(0.02 + 0.001 * (MIN_CHUNK - 1), 0.0), (0.01, 0.0), (0.1, 0.04)],
    ids=["fewer tokens than the minimum", "a decode step alone", "a step's own cost"],
)
def test_an_objective_out_of_reach_does_not_slow_prompts(itl, step):
    assert measured(ttft=2.0, itl=itl, step=step).chunk(True, 5000, 0.0) == MAX


def test_a_prompt_that_would_miss_its_objective_gets_a_full_chunk_if_that_helps():
    turns = measured(ttft=2.0, itl=0.1)
    short = 80  # tokens of a chunk; 1000 tokens take 13 turns of a decode step each: 1.26 s, or else 1.02 s
    assert turns.chunk(True, 1000, 0.7) == pytest.approx(short, abs=1)
    assert turns.chunk(True, 1000, 0.8) == MAX
    assert turns.chunk(True, 1000, 0.97) == MAX
    assert turns.chunk(True, 1000, 1.0) == pytest.approx(short, abs=1), "it misses its objective in any case"
    assert measured(itl=0.1).chunk(True, 1000, 0.8) == pytest.approx(short, abs=1)


def test_new_measurements_replace_old_ones():
    turns = measured(itl=0.1)
    for _ in range(200):
        turns.prefilled(100, 0.2)
        turns.decoded(0.04)
    assert turns.chunk(True, 5000, 0.0) == pytest.approx(30, abs=1)
    for _ in range(200):
        turns.decoded(0.02)
    assert turns.chunk(True, 5000, 0.0) == pytest.approx(40, abs=1)


def test_the_oldest_prompt_gets_half_of_a_chunk_while_others_wait():
    turns = measured(ttft=2.0, itl=0.1)
    alone = [turns.chunk(True, 1500, waited) == MAX for waited in (0.0, 0.2, 0.4, 0.6, 0.8)]
    shared = [turns.chunk(True, 1500, waited, alone=False) == MAX for waited in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert shared != alone
    assert shared.index(True) < (alone.index(True) if True in alone else len(alone)), "it is hurried earlier"


def test_a_replay_says_nothing_of_the_next_decode_step():
    turns = measured(itl=0.1)
    before = turns.chunk(True, 5000, 0.0)
    turns.decoded(None)
    assert turns.chunk(True, 5000, 0.0) == before
    assert not turns.decode_first

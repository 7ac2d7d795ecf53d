"""Tests that no grammar of a client ends a process or gets a wrong answer, with some seconds of the fuzz."""

import json

import pytest
from fuzz_grammars import Maker, run


def test_grammars_are_made_from_their_numbers_and_are_of_many_shapes():
    made = [json.dumps(Maker(number).request()) for number in range(300)]
    assert made == [json.dumps(Maker(number).request()) for number in range(300)]
    assert len(set(made)) > 280
    assert max(map(len, made)) > 30_000
    for part in ("$ref", "allOf", "multipleOf", "guided_regex", "guided_grammar", "tools", "maxItems", "guided_choice"):
        assert any(part in text for text in made), part


@pytest.mark.timeout(170)
def test_a_few_seconds_of_grammars_do_no_harm(tiny_pair):
    assert run(tiny_pair, 8, warm=4, judge_times=False) == []

"""Chats of several turns in a trial: prompts go on with answers, and the report tells where their KV came from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from overfill.lab.chaos.load import LoadGenerator, RequestResult
from overfill.lab.chaos.trial import TrialResult
from overfill.lab.chaos.trial_report import TrialReport
from overfill.pair.reference import Summary

RIGHT = Summary(answers=1, correct=1, identical=1, ties=0, tokens=1)
PROMPTS = [[1, 2], [3, 4], [5, 6]]


async def sent(generator: LoadGenerator, endings: str) -> list[list[int]]:
    """Sends a request per letter, which ends as a(nswered) with the token 9 or f(ailed); returns their prompts."""

    async def read(client: object, result: RequestResult) -> None:
        result.token_ids = (9,)
        result.ending = "answered" if endings[len(generator.results)] == "a" else "failed"

    generator._read = read  # type: ignore[method-assign, assignment]
    return [list((await generator.send()).prompt) for _ in endings]


async def test_a_chat_goes_on_until_it_has_its_turns_or_an_answer_is_missing() -> None:
    generator = LoadGenerator(["127.0.0.1:1"], None, PROMPTS, 1, 0, turns=3)
    prompts = await sent(generator, "aaaafa")
    assert prompts == [
        [1, 2], [1, 2, 9, 3, 4], [1, 2, 9, 3, 4, 9, 5, 6],
        [1, 2], [1, 2, 9, 3, 4], [5, 6],
    ]  # fmt: skip
    await generator.close()


async def test_a_chat_that_would_not_fit_ends() -> None:
    generator = LoadGenerator(["127.0.0.1:1"], None, PROMPTS, 1, 0, turns=3, longest=5)
    assert await sent(generator, "aa") == [[1, 2], [3, 4]]
    await generator.close()


async def test_without_turns_no_prompt_goes_on() -> None:
    generator = LoadGenerator(["127.0.0.1:1"], None, PROMPTS, 1, 0)
    assert await sent(generator, "aa") == [[1, 2], [3, 4]]
    await generator.close()


def test_shares_of_kv_are_those_of_answers_and_after_the_faults() -> None:
    early = RequestResult("early", [0] * 10, sent=1.0, cached_tokens=8, peer_tokens=3, disk_tokens=5)
    late = RequestResult("late", [0] * 30, sent=3.0, cached_tokens=6)
    lost = replace(early, request="lost", ending="failed")
    trial = TrialResult([early, late, lost], freed_after=0.0, calm_from=2.0)
    assert trial.cached_shares() == {"memory": 6 / 40, "peer": 3 / 40, "disk": 5 / 40}
    told = TrialReport(trial, RIGHT, set(), {}).as_dict()
    assert told["cached_shares_after_faults"] == {"memory": 0.2, "peer": 0, "disk": 0}


@pytest.mark.parametrize(("peer_tokens", "unused"), [(0, ["peer"]), (16, [])])
def test_a_trial_without_the_imports_that_it_is_for_has_failed(peer_tokens: int, unused: list[str]) -> None:
    one = RequestResult("one", [0] * 20, parts=(("default", 0),), told_parts=(("default", 0),))
    one.cached_tokens, one.peer_tokens = 16, peer_tokens
    trial = TrialResult([one], freed_after=0.0)
    report = TrialReport(trial, RIGHT, set(), {}, ("peer",))
    assert (report.passed, report.as_dict()["unused_sources"]) == (not unused, unused)
    assert TrialReport(trial, RIGHT, set(), {}).passed

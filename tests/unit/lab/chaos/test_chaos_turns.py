"""Chats of several turns in a trial: prompts go on with answers, and the report tells where their KV came from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chaos_answers import answered

from overfill.client import Usage
from overfill.lab.chaos.load import RequestMix, RequestResult, RequestSender
from overfill.lab.chaos.trial import TrialResult
from overfill.lab.chaos.trial_report import TrialReport
from overfill.pair.reference import Summary

RIGHT = Summary(answers=1, correct=1, identical=1, ties=0, tokens=1)
PROMPTS = [[1, 2], [3, 4], [5, 6]]


async def sent(mix: RequestMix, endings: str) -> list[list[int]]:
    """Sends a request per letter, which ends as a(nswered) with the token 9 or f(ailed); returns their prompts."""
    sender = RequestSender(mix, ["127.0.0.1:1"])

    async def read(client: object, result: RequestResult) -> None:
        result.answer = answered(token_ids=(9,))
        result.ending = "answered" if endings[len(sender.results)] == "a" else "failed"

    sender._read = read  # type: ignore[method-assign, assignment]
    prompts = [list((await sender.send()).prompt) for _ in endings]
    await sender.close()
    return prompts


async def test_a_chat_goes_on_until_it_has_its_turns_or_an_answer_is_missing() -> None:
    prompts = await sent(RequestMix(PROMPTS, 1, turns=3), "aaaafa")
    assert prompts == [
        [1, 2], [1, 2, 9, 3, 4], [1, 2, 9, 3, 4, 9, 5, 6],
        [1, 2], [1, 2, 9, 3, 4], [5, 6],
    ]  # fmt: skip


async def test_a_chat_that_would_not_fit_ends() -> None:
    assert await sent(RequestMix(PROMPTS, 1, turns=3, longest=5), "aa") == [[1, 2], [3, 4]]


async def test_without_turns_no_prompt_goes_on() -> None:
    assert await sent(RequestMix(PROMPTS, 1), "aa") == [[1, 2], [3, 4]]


def test_shares_of_kv_are_those_of_answers_and_after_the_faults() -> None:
    usage = Usage(10, 1, 8, peer_tokens=3, disk_tokens=5)
    early = RequestResult("early", [0] * 10, sent=1.0, answer=answered(usage=usage))
    late = RequestResult("late", [0] * 30, sent=3.0, answer=answered(usage=Usage(30, 1, 6)))
    lost = replace(early, request="lost", ending="failed")
    trial = TrialResult([early, late, lost], freed_after=0.0, calm_from=2.0)
    assert trial.cached_shares() == pytest.approx({"memory": 6 / 40, "peer": 3 / 40, "disk": 5 / 40})
    told = TrialReport(trial, RIGHT, set(), {}).as_dict()
    assert told["cached_shares_after_faults"] == {"memory": 0.2, "peer": 0, "disk": 0}


@pytest.mark.parametrize(("peer_tokens", "unused"), [(0, ["peer"]), (16, [])])
def test_a_trial_without_the_imports_that_it_is_for_has_failed(peer_tokens: int, unused: list[str]) -> None:
    answer = answered(("default", 0), usage=Usage(20, 1, 16, peer_tokens=peer_tokens))
    one = RequestResult("one", [0] * 20, answer=answer, told_parts=answer.parts)
    trial = TrialResult([one], freed_after=0.0)
    report = TrialReport(trial, RIGHT, set(), {}, ("peer",))
    assert (report.passed, report.as_dict()["unused_sources"]) == (not unused, unused)
    assert TrialReport(trial, RIGHT, set(), {}).passed

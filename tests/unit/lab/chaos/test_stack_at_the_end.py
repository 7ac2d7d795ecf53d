"""What a trial reads of its processes: which workers are ready and empty, and how a process's memory grew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from chaos_answers import answered

from overfill.lab.chaos.load import RequestResult
from overfill.lab.chaos.memory import growth
from overfill.lab.chaos.trial import TrialResult, View
from overfill.lab.chaos.trial_report import TrialReport
from overfill.pair.reference import Summary

RIGHT = Summary(answers=1, correct=1, identical=1, ties=0, tokens=1)


def worker(stage: str, id: str, ready: bool = True, **load: int) -> Any:
    counts = SimpleNamespace(**{"kv_blocks_used": 0, "running": 0, "waiting": 0} | load)
    return SimpleNamespace(stage=stage, id=id, process=SimpleNamespace(ready=ready, load=counts))


def test_a_worker_is_empty_when_its_stage_has_no_block_and_no_request() -> None:
    silent = SimpleNamespace(stage="decode", id="silent", process=None)
    view = View(1.0, [
        worker("prefill", "both", kv_blocks_used=1), worker("decode", "both"),
        worker("decode", "runs", running=1), worker("decode", "waits", ready=False, waiting=1), silent,
    ])  # fmt: skip
    assert view.empty == {("decode", "both")}
    assert view.ready == {("prefill", "both"), ("decode", "both"), ("decode", "runs")}
    assert view.known == view.ready | {("decode", "waits"), ("decode", "silent")}


def test_a_trial_fails_for_blocks_that_stay_and_processes_that_end_badly() -> None:
    for bad in ({"freed_after": None}, {"freed_after": 2.5}, {"leaked": ["decode-0"]}, {"unclean_exits": ["killed"]}):
        assert not TrialReport(TrialResult(**{"freed_after": 0.1} | bad), RIGHT, set(), {}).passed
    assert TrialReport(TrialResult(freed_after=0.1), RIGHT, set(), {}).passed


def test_the_pauses_of_migrated_answers_stand_beside_the_usual_one() -> None:
    pauses = [(0, 0.1, False), (0, 0.2, False), (0, 0.3, False), (1, 2.0, False), (2, 4.0, False), (1, 9.0, True)]
    results = [
        RequestResult(str(number), [5], answer=answered(migrations=migrations), longest_pause=pause, slow=slow)
        for number, (migrations, pause, slow) in enumerate(pauses)
    ]
    results.append(RequestResult("lost", [5], ending="failed", longest_pause=8.0))
    report = TrialReport(TrialResult(results), RIGHT, set(), {}).as_dict()
    assert (report["migrated_answers"], report["pause_max"], report["usual_pause"]) == (2, 4.0, 0.2)


def test_the_report_names_the_engines_that_took_part_in_answers() -> None:
    answers = [answered(prefill_engine="mock 1", decode_engine=engine) for engine in ("vllm 2", None, "mock 1")]
    results = [RequestResult(str(number), [5], answer=answer) for number, answer in enumerate(answers)]
    report = TrialReport(TrialResult(results), RIGHT, set(), {}).as_dict()
    assert (report["prefill_engine"], report["decode_engine"]) == ("mock 1", "mock 1, vllm 2")


def test_growth_of_memory_is_that_after_the_first_minute_of_a_process_that_ran_long() -> None:
    long = [(at, 1000 if at < 60 else 100 + at, 5 + at // 200) for at in range(0, 400, 10)]
    short = [(at, 100, 5) for at in range(400, 500, 10)]
    assert growth({("decode-0", 7): long, ("decode-0", 8): short}) == [
        {"name": "decode-0", "minutes": 5.5, "mib": 440.0, "more_mib": 230.0, "files": 6, "more_files": 1}
    ]

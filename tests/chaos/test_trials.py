"""Faults under load: every request is answered right or refused with a reason, and no block or process is left behind.

Short forms of the runs of ``overfill chaos`` in docs/explanation/failure.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from overfill.lab.chaos.fault_plan import FAULTS, PHASES, FaultChoice, PlannedFault, rolling_restart
from overfill.lab.chaos.load import RequestMix
from overfill.lab.chaos.trial import Trial, run_trial
from overfill.lab.chaos.trial_report import TrialReport
from overfill.pair.reference import load_references
from overfill.process.compiled import C_COMPILERS, find_compiler
from overfill.settings.tiers import TierSpec
from overfill.stack.describe import describe
from overfill.stack.placed import place
from overfill.telemetry.progress import silent

SETTINGS = {"dtype": "float32", "kv_memory": "4MiB", "max_model_len": "512", "grace_period": 1, "max_num_seqs": 4}
PROMPTS = [[20 + (7 * i * (seed + 3)) % 470 for i in range(30 + seed)] for seed in range(8)]
MAX_TOKENS = 32
CAN_SET_CLOCKS = find_compiler(C_COMPILERS) is not None


def broken(
    pair: Path | None,
    faults: Iterable[PlannedFault],
    *,
    of_each: int = 2,
    workers: Mapping[str, Any] = {},
    kv: Mapping[str, Any] = {},
    needed: Sequence[str] = (),
    tiers: tuple[TierSpec, ...] = (),
    mix: Mapping[str, Any] = {},
    **more: Any,
) -> TrialReport:
    """Runs a trial on ``of_each`` routers and workers, asserts that it passed, and returns its report.

    Args:
        workers: other numbers of workers, by argument of ``describe``.
        kv: other settings of the stack.
        needed: sources from which KV must have come.
        mix: other requests, by attribute of ``RequestMix``.
    """
    settings = SETTINGS | {"log_level": "error"} | kv
    counts = {"prefill": of_each, "decode": of_each} | workers
    plan = place(describe(pair or "", routers=of_each, threads=1, settings=settings, tiers=tiers, **counts))
    asked = RequestMix(PROMPTS, MAX_TOKENS, tiers=[tier.name for tier in plan.tiers], sampled_share=0.75, **mix)
    trial = Trial(faults, asked, requests=40, streams=8, **more)
    result = asyncio.run(run_trial(plan, trial, silent))
    report = TrialReport(result, *result.judge({"": load_references(plan.tiers)}, MAX_TOKENS, silent), {}, needed)
    # As text, because pytest shortens other values.
    reasons = ("endings", "errors", "blocks_freed_after", "leaked", "unclean_exits", "tier_problems", "missed")
    reasons += ("unused_sources",)
    assert report.passed, str({key: report.as_dict()[key] for key in reasons})
    if isinstance(faults, list):  # a soak draws faults without end
        assert len(result.injected) >= sum(fault.kind != "clock" or CAN_SET_CLOCKS for fault in faults)
    return report


def test_answers_are_right_whatever_befalls_whom(tiny_pair: Path) -> None:
    """One fault of each kind, in different phases; without freeze and partition, which take long."""
    faults = [
        PlannedFault(0, "kill", "decode", "decode"),
        PlannedFault(1, "corrupt", "prefill", "prefill"),
        PlannedFault(2, "kill", "handoff", "prefill"),
        PlannedFault(3, "clock", "reserving", "decode", seconds=1.0, jump=3000.0),
        PlannedFault(4, "kill", "decode", "router"),
        PlannedFault(5, "loss", "queued", "decode", seconds=1.0),
        PlannedFault(6, "disk", "handoff", "prefill", seconds=1.0),
        PlannedFault(7, "drain", "decode", "decode"),
        PlannedFault(8, "vanish", "handoff", "client"),
        PlannedFault(9, "slow", "decode", "client"),
        PlannedFault(10, "delay", "finishing", "router", seconds=1.0),
        PlannedFault(11, "bandwidth", "prefill", "prefill", seconds=1.0),
    ]
    report = broken(tiny_pair, faults, concurrent_faults=3)
    assert report.result.migrations > 0
    assert report.as_dict()["sampled"]["migrated"] > 0
    assert len(report.result.ended("vanished")) == 1


def test_a_worker_with_both_stages_breaks_as_others_do(tiny_pair: Path) -> None:
    """It alone prefills, so requests wait while a fault takes it. It and the decode workers continue each other's."""
    faults = [
        PlannedFault(0, "kill", "prefill", "prefill"),
        PlannedFault(1, "corrupt", "handoff", "prefill"),
        PlannedFault(2, "drain", "decode", "prefill"),
        PlannedFault(3, "kill", "decode", "decode"),
        PlannedFault(4, "freeze", "handoff", "prefill", seconds=1.0),
        PlannedFault(5, "disk", "handoff", "prefill", seconds=1.0),
        PlannedFault(6, "slow", "decode", "client"),
    ]
    workers = {"prefill": 0, "decode": 2, "colocated": 1}
    report = broken(tiny_pair, faults, workers=workers, concurrent_faults=2)
    assert {one.victim for one in report.result.injected if one.target == "prefill"} == {"colocated-0"}
    assert report.result.migrations > 0


def test_only_requests_that_allow_it_change_their_tier(tiny_tiers: tuple[TierSpec, ...]) -> None:
    """Each tier has one worker, so that a fault takes all of it. The others wait until the worker is back."""
    faults = [
        PlannedFault(0, "kill", "decode", "decode"),
        PlannedFault(1, "kill", "decode", "router"),
        PlannedFault(2, "drain", "decode", "decode"),
        PlannedFault(3, "kill", "decode", "decode"),
    ]
    tiers = broken(None, faults, tiers=tiny_tiers, mix={"fallback_share": 0.6}, concurrent_faults=2).tiers()
    assert set(tiers) == {"full", "default", "fast"}
    assert all(counts["answers"] > counts["with_fallback"] > 0 for counts in tiers.values())
    assert sum(counts["changed_within"] for counts in tiers.values()) > 0


@pytest.mark.skipif(not CAN_SET_CLOCKS, reason="no C compiler")
def test_a_wall_clock_that_is_set_costs_no_request(tiny_pair: Path) -> None:
    """Every request is answered, those held for a fault too.

    The trial has no other faults, because one of those may hit the request that is held for a clock: its client may
    vanish, for example. The first fault lasts so long that a decode worker with a wrong deadline would fail four
    prefills, after which the router gives the request up.
    """
    faults = [
        PlannedFault(0, "clock", "reserving", "decode", seconds=3.0, jump=3000.0),
        PlannedFault(1, "clock", "prefill", "prefill", seconds=1.0, jump=3000.0),
        PlannedFault(2, "clock", "queued", "router", seconds=1.0, jump=3000.0),
        PlannedFault(3, "clock", "reserving", "decode", seconds=1.0, jump=-3000.0),
    ]
    result = broken(tiny_pair, faults, of_each=1, concurrent_faults=3).result
    assert [asdict(fault) for fault in result.injected if not fault.request] == []  # each fault found its phase
    assert [(request.request, request.error) for request in result.results if request.ending != "answered"] == []


SPREAD = {"prefill_policy": "round-robin"}
"""The next turn of a chat meets another prefill worker than the last one, which imports its KV."""


def test_a_worker_that_lends_kv_may_die_freeze_or_drain_in_mid_pull(tiny_pair: Path) -> None:
    faults = [
        PlannedFault(0, "kill", "lending", "prefill"),
        PlannedFault(1, "freeze", "lending", "prefill", seconds=3.0),
        PlannedFault(2, "corrupt", "lending", "prefill"),
        PlannedFault(3, "drain", "lending", "prefill"),
        PlannedFault(4, "kill", "lending", "decode"),
    ]
    result = broken(tiny_pair, faults, kv=SPREAD, needed=["peer"], mix={"turns": 4}).result
    # Each hit a loan, except for one perhaps: on a busy machine, no chat may need a loan while a fault waits for one.
    assert sum(bool(fault.request) for fault in result.injected) >= len(faults) - 1
    assert result.ended("answered")


@pytest.mark.slow  # it takes half a minute, and `make test` is at its limit of time
def test_a_rolling_restart_of_the_prefill_workers_fails_no_request(tiny_pair: Path) -> None:
    faults = rolling_restart(["prefill-0", "prefill-1"], 1.0)
    result = broken(tiny_pair, faults, kv=SPREAD, needed=["peer"], mix={"turns": 4}).result
    assert [fault.victim for fault in result.injected] == ["prefill-0", "prefill-1"]
    assert [(request.request, request.error) for request in result.results if request.ending != "answered"] == []
    assert sum(result.cached_shares(result.calm_from).values()) > 0


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_worker_that_dies_while_it_writes_to_disk_leaves_no_wrong_kv(
    kills: int, tiny_pair: Path, tmp_path: Path
) -> None:
    """Each kill finds a file half written; the next process reads the folder, and every answer is judged."""
    faults = [PlannedFault(number, "kill", "saving", "prefill") for number in range(kills)]
    kv = SPREAD | {"kv_disk": tmp_path / "kv", "kv_peers": False}
    result = broken(tiny_pair, faults, kv=kv, needed=["disk"], mix={"turns": 4}).result
    assert [asdict(fault) for fault in result.injected if not fault.request] == []  # each hit a write


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_every_phase(tiny_pair: Path, fault: str) -> None:
    faults = FaultChoice([fault]).matrix(1, 3)  # type: ignore[list-item]
    report = broken(tiny_pair, faults, concurrent_faults=2, seconds=1500.0)
    assert set(report.cells().get(fault, {})) == set(PHASES) or (fault == "clock" and not CAN_SET_CLOCKS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_soak_at_a_share_of_what_the_stack_can_do(tiny_pair: Path) -> None:
    report = broken(tiny_pair, FaultChoice().draw(3, 2.0), load_fraction=0.7, seconds=120.0, concurrent_faults=2)
    assert report.result.rate is not None
    assert len(report.result.results) > 60 * report.result.rate

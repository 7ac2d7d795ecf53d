"""Faults under load, with vLLM on both stages and on each alone: every answer is right, and nothing is left behind.

Short forms of the runs of ``overfill chaos --prefill-engine vllm --decode-engine vllm``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from overfill.cli.main import main
from overfill.lab.chaos.fault_plan import PlannedFault

FAULTS = [
    PlannedFault(0, "kill", "decode", "decode"),
    PlannedFault(1, "corrupt", "prefill", "prefill"),
    PlannedFault(2, "kill", "handoff", "prefill"),
    PlannedFault(3, "corrupt", "handoff", "decode"),
    PlannedFault(4, "drain", "decode", "decode"),
    PlannedFault(5, "disk", "handoff", "prefill", seconds=1.0),
    PlannedFault(6, "drain", "prefill", "prefill"),
    PlannedFault(7, "freeze", "decode", "decode", seconds=12.0),  # longer than a silent peer is waited for
    PlannedFault(8, "vanish", "handoff", "client"),
    PlannedFault(9, "clock", "reserving", "decode", seconds=1.0, jump=3000.0),
]


OF_RANKS = [
    PlannedFault(0, "kill", "decode", "decode", ranks=(1,)),
    PlannedFault(1, "corrupt", "prefill", "prefill"),
    PlannedFault(2, "kill", "handoff", "prefill", ranks=(0,)),
    PlannedFault(3, "corrupt", "handoff", "decode"),
    PlannedFault(4, "freeze", "decode", "decode", seconds=30.0, ranks=(0,)),
    PlannedFault(5, "freeze", "prefill", "prefill", seconds=30.0, ranks=(0, 1)),
    PlannedFault(6, "freeze", "decode", "decode", seconds=3.0, ranks=(0, 1)),  # the worker goes on
    PlannedFault(7, "drain", "decode", "decode"),
    PlannedFault(8, "kill", "decode", "decode"),  # its ranks end with it
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_of_ranks_cost_no_answer(tmp_path: Path) -> None:
    """One rank or all of them, killed or frozen: the worker ends in bounded time, and nothing of it is left."""
    report = run(tmp_path, OF_RANKS, "vllm", "vllm", "--tensor-parallel-size=2")
    assert report["migrations"] > 0
    assert not report["missed"]
    took = {strike["number"]: strike["took"] for strike in report["strikes"] if strike["ranks"]}
    assert all(took[number] < 25 for number in (0, 2, 4, 5)), took  # 15 s of silence, 5 s to tell peers


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("prefill", "decode"), [("vllm", "vllm"), ("vllm", "overfill"), ("overfill", "vllm")])
def test_faults_of_workers_cost_no_answer(tmp_path: Path, prefill: str, decode: str) -> None:
    result = run(tmp_path, FAULTS, prefill, decode)
    assert result["migrations"] > 0
    assert [prefill in result["prefill_engine"], decode in result["decode_engine"]] == [True, True]


def run(folder: Path, faults: list[PlannedFault], prefill: str, decode: str, *options: str) -> dict[str, Any]:
    """Injects ``faults`` into a stack of two workers per stage, asserts that the trial passed, returns its report."""
    plan, report = folder / "plan.json", folder / "report.json"
    plan.write_text(json.dumps({"strikes": [asdict(fault) for fault in faults]}))
    engines = [f"--prefill-engine={prefill}", f"--decode-engine={decode}"]
    size = ["--prefill=2", "--decode=2", "--streams=6", "--requests=40", "--max-tokens=32"]
    code = main(["chaos", *engines, *size, *options, f"--replay={plan}", f"--report={report}"])
    result: dict[str, Any] = json.loads(report.read_text())
    assert code == 0, {name: value for name, value in result.items() if name != "strikes"}
    return result

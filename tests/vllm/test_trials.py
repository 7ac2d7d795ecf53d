"""Faults under load, with vLLM on both stages and on each alone: every answer is right, and nothing is left behind.

Short forms of the runs of ``overfill chaos --prefill-engine vllm --decode-engine vllm``.
"""

from __future__ import annotations

import json
from pathlib import Path

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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("prefill", "decode"), [("vllm", "vllm"), ("vllm", "overfill"), ("overfill", "vllm")])
def test_faults_of_workers_cost_no_answer(tmp_path: Path, prefill: str, decode: str) -> None:
    plan, report = tmp_path / "plan.json", tmp_path / "report.json"
    plan.write_text(json.dumps({"strikes": [fault.as_dict() for fault in FAULTS]}))
    engines = [f"--prefill-engine={prefill}", f"--decode-engine={decode}"]
    size = ["--prefill=2", "--decode=2", "--streams=6", "--requests=40", "--max-tokens=32"]
    code = main(["chaos", *engines, *size, f"--replay={plan}", f"--report={report}"])
    result = json.loads(report.read_text())
    assert code == 0, {name: value for name, value in result.items() if name != "strikes"}
    assert result["migrations"] > 0
    assert [prefill in result["prefill_engine"], decode in result["decode_engine"]] == [True, True]

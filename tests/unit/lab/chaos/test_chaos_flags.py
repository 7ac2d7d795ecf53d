"""Options of ``overfill chaos``: which workers and faults they choose, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from overfill.lab.chaos.fault_plan import PlannedFault
from overfill.lab.commands.chaos import _choose_faults, chaos_command, count_workers


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ([], (0, 2, 3)),
        (["--colocated=2"], (2, 0, 0)),
        (["--colocated=1", "--decode=2"], (1, 0, 2)),
        (["--colocated=1", "--prefill=1", "--decode=1"], (1, 1, 1)),
    ],
)
def test_workers_with_both_stages_replace_those_of_one(options: list[str], counts: tuple[int, ...]) -> None:
    given = chaos_command.make_context("chaos", options).params
    found = count_workers(given["colocated"], given["prefill"], given["decode"], False)
    assert found == dict(zip(("colocated", "prefill", "decode"), counts, strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prefill=1"], "--prefill 1: give at least 2"),
        (["--decode=0"], "--decode 0: give at least 2"),
        (["--colocated=1"], "--decode 0: give at least 1"),
    ],
)
def test_a_stage_without_a_second_worker_is_bad_usage(options: list[str], says: str) -> None:
    done = CliRunner().invoke(chaos_command, options)
    assert done.exit_code == 2
    assert says in done.output


def test_a_matrix_keeps_to_the_targets() -> None:
    faults = _choose_faults(("kill", "slow"), ("decode",), ("prefill",), 0, 3, None, None, 0, 0.0, False)
    assert {(fault.kind, fault.target) for fault in faults} == {("kill", "prefill"), ("slow", "client")}


def test_hosts_that_vanish_are_replayed_on_hosts_only(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    vanished = PlannedFault(0, "vanish", "decode", "decode", 2.0).as_dict()
    report.write_text(json.dumps({"strikes": [vanished]}), encoding="utf-8")
    done = CliRunner().invoke(chaos_command, [f"--replay={report}"])
    assert done.exit_code == 2
    assert "has hosts that vanish: add --hosts" in done.output

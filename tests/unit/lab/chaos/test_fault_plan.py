"""Plans of faults: a seed always draws the same, a matrix is complete, a report can be replayed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from overfill.lab.chaos.fault_plan import (
    FAULTS,
    PHASES,
    TARGETS,
    FaultChoice,
    PlannedFault,
    read_report,
    rolling_restart,
)
from overfill.lab.chaos.trial import InjectedFault
from overfill.lab.commands.chaos import chaos_command


def test_a_seed_draws_the_same_faults() -> None:
    whole = list(itertools.islice(FaultChoice().draw(7, 2.0), 50))
    assert list(itertools.islice(FaultChoice().draw(7, 2.0), 50)) == whole
    assert list(itertools.islice(FaultChoice().draw(8, 2.0), 50)) != whole
    assert {fault.kind for fault in itertools.islice(FaultChoice().draw(7, 2.0), 500)} == set(FAULTS)
    assert all(fault.target in TARGETS[fault.kind] for fault in whole)


def test_drawn_faults_keep_to_the_given_kinds_phases_and_targets() -> None:
    drawn = list(itertools.islice(FaultChoice(["kill", "slow"], ["handoff"], ["decode"]).draw(0, 1.0), 40))
    assert {(f.kind, f.phase, f.target) for f in drawn} == {
        ("kill", "handoff", "decode"),
        ("slow", "handoff", "client"),  # its only target
    }


def test_a_process_vanishes_with_its_host_only() -> None:
    on_hosts, some = FaultChoice(hosts=True), FaultChoice(targets=["decode", "client"], hosts=True)
    assert {fault: FaultChoice().targets_of(fault) for fault in FAULTS} == TARGETS
    everywhere = {"vanish": ("router", "prefill", "decode", "client")}
    assert {fault: on_hosts.targets_of(fault) for fault in FAULTS} == TARGETS | everywhere
    assert some.targets_of("vanish") == ("decode", "client")


def test_a_matrix_has_every_cell_as_often_as_asked_and_every_target() -> None:
    faults = FaultChoice().matrix(0, 6)
    cells = Counter((f.kind, f.phase) for f in faults)
    assert cells == dict.fromkeys(itertools.product(FAULTS, PHASES), 6)
    assert {(f.kind, f.target) for f in faults} == {(f, t) for f in FAULTS for t in TARGETS[f]}
    assert [f.number for f in faults] == list(range(len(faults)))
    assert FaultChoice().matrix(0, 6) == faults != FaultChoice().matrix(1, 6)


def test_the_faults_of_a_report_are_those_that_were_injected(tmp_path: Path) -> None:
    faults = list(itertools.islice(FaultChoice().draw(3, 1.0), 9))
    report = tmp_path / "report.json"
    injected = [
        asdict(InjectedFault(**asdict(fault), at=1.0, victim="decode-0", request="chaos-1", took=2.0))
        for fault in faults
    ]
    report.write_text(json.dumps({"strikes": injected}), encoding="utf-8")
    assert read_report(report) == faults


def test_a_rolling_restart_drains_each_worker_once_in_their_order(tmp_path: Path) -> None:
    faults = rolling_restart(["prefill-0", "prefill-1"], 2.0)
    assert [(f.kind, f.target, f.worker, f.after) for f in faults] == [
        ("drain", "prefill", "prefill-0", 2.0), ("drain", "prefill", "prefill-1", 2.0),
    ]  # fmt: skip
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"strikes": [asdict(fault) for fault in faults]}), encoding="utf-8")
    assert read_report(report) == faults
    refused = CliRunner().invoke(chaos_command, ["--rolling-restart", "--matrix=1"])
    assert refused.exit_code == 2
    assert "--matrix, --soak, --replay and --rolling-restart each choose the faults" in refused.output


def test_faults_hit_a_worker_one_of_its_ranks_or_all_of_them(tmp_path: Path) -> None:
    faults = FaultChoice(["kill", "freeze", "drain"], ["decode"], num_ranks={"decode": 2}).matrix(0, 40)
    hit = {kind: {(f.target, f.ranks) for f in faults if f.kind == kind} for kind in ("kill", "freeze", "drain")}
    whole = {(target, ()) for target in TARGETS["drain"]}
    ranks = {("decode", (0,)), ("decode", (1,)), ("decode", (0, 1))}
    assert hit == {"kill": whole | ranks, "freeze": whole | ranks, "drain": whole}
    assert max(fault.seconds for fault in faults if fault.ranks) > 25, "some outlast the worker's patience"
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"strikes": [asdict(fault) for fault in faults]}), encoding="utf-8")
    assert read_report(report) == faults
    refused = CliRunner().invoke(chaos_command, ["--replay", str(report)])
    assert refused.exit_code == 2
    assert "give as many with --tensor-parallel-size" in refused.output
    refused = CliRunner().invoke(chaos_command, ["--tensor-parallel-size", "2"])
    assert "give --prefill-engine or --decode-engine vllm" in refused.output


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"strikes": [{}]}'])
def test_what_is_no_report_is_refused_by_name(tmp_path: Path, text: str) -> None:
    report = tmp_path / "report.json"
    report.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"report\.json is not a report of overfill chaos"):
        read_report(report)


def test_hosts_that_vanish_are_replayed_on_hosts_only(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    vanished = asdict(PlannedFault(0, "vanish", "decode", "decode", 2.0))
    report.write_text(json.dumps({"strikes": [vanished]}), encoding="utf-8")
    done = CliRunner().invoke(chaos_command, [f"--replay={report}"])
    assert done.exit_code == 2
    assert "has hosts that vanish: add --hosts" in done.output

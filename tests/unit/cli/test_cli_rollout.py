"""``overfill rollout``, and the columns of revisions, with a client that answers without a stack."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from overfill.cli.main import main
from overfill.client import PoolStatus, RevisionStatus, RolloutStatus, StackStatus, WorkerStatus
from overfill.v1 import admin_pb2

POOLS: Any = {"prefill": PoolStatus(1, 1), "decode": PoolStatus(2, 4)}
OLD = RevisionStatus("r1", 75.0, ready=True, running=7, pools=POOLS)
NEW = RevisionStatus("r2", 25.0, ready=True, running=3, pools=POOLS)
STATUS = RolloutStatus((OLD, NEW), target_percent=50.0, remaining_seconds=500.0, paused=False)


class Rollouts:
    """Records the calls, and answers each with ``status``."""

    def __init__(self) -> None:
        self.status = STATUS
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        def ask(*arguments: Any, **options: Any) -> RolloutStatus:
            self.asked.append((method, *arguments, *options.values()))
            return self.status

        return ask

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *exc: object) -> None: ...


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Rollouts:
    rollouts = Rollouts()
    monkeypatch.setattr("overfill.cli.options.ClientConnection.client", lambda self: rollouts)
    return rollouts


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["status"], ("rollout",)),
        (["set", "r2=25"], ("set_rollout", "r2", 25.0, 0.0)),
        (["set", "r2=12.5", "--over", "10m"], ("set_rollout", "r2", 12.5, 600.0)),
        (["set", "=100", "--over", "1.5h"], ("set_rollout", "", 100.0, 5400.0)),
        (["set", "r2=1", "--over", "7d"], ("set_rollout", "r2", 1.0, 604800.0)),
        (["set", "r2=1", "--over", "30"], ("set_rollout", "r2", 1.0, 30.0)),
        (["pause"], ("pause_rollout",)),
        (["undo"], ("undo_rollout",)),
    ],
)
def test_each_command_asks_once_and_prints_the_shares(
    arguments: list[str], asked: tuple[Any, ...], router: Rollouts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollout", *arguments]) == 0
    assert router.asked == [asked]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:3] == [
        ["r1", "75.0", "%", "ready", "1", "of", "1", "2", "of", "4", "7"],
        ["r2", "25.0", "%", "ready", "1", "of", "1", "2", "of", "4", "3"],
    ]
    assert " ".join(rows[3]) == "r2 reaches 50 % in 8 m 20 s"
    assert main(["rollout", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["target_percent"], told["remaining_seconds"], told["paused"]) == (50, 500, False)
    assert [(one["name"], one["percent"], one["running"]) for one in told["revisions"]] == [
        ("r1", 75, 7),
        ("r2", 25, 3),
    ]
    assert told["revisions"][1]["pools"]["decode"] == {"ready": 2, "expected": 4}


def test_the_table_has_each_tier_and_says_what_the_rollout_waits_for(
    router: Rollouts, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(status: RolloutStatus) -> str:
        router.status = status
        assert main(["rollout", "status"]) == 0
        return capsys.readouterr().out

    tiers = {name: PoolStatus(number, 9, name) for number, name in enumerate(("full", "fast"), 5)}
    row = shown(replace(STATUS, revisions=(OLD, replace(NEW, tiers=tiers)))).splitlines()[2].split()
    assert " ".join(row) == "r2 25.0 % ready 1 of 1 5 of 9 6 of 9 3"
    waiting = shown(replace(STATUS, revisions=(OLD, replace(NEW, ready=False)), remaining_seconds=0))
    assert "not ready" in waiting
    assert "r2 gets nothing before both of its stages have a ready worker" in waiting
    assert "paused" in shown(replace(STATUS, paused=True))
    assert "one revision" in shown(RolloutStatus((replace(OLD, name="", percent=100.0),), 0.0, 0.0, paused=False))


@pytest.mark.parametrize(
    "arguments",
    [["set"], ["set", "r2"], ["set", "r2=x"], ["set", "r2=5", "--over", "soon"], ["set", "r2=5", "--over=1w"]],
)
def test_what_is_no_share_or_time_is_bad_usage_and_not_sent(arguments: list[str], router: Rollouts) -> None:
    assert main(["rollout", *arguments]) == 2
    assert router.asked == []


@pytest.mark.parametrize("command", [["status"], ["top", "--once"]])
@pytest.mark.parametrize("revision", ["", "r2"])
def test_workers_have_a_column_of_revisions_if_one_has_a_name(
    command: list[str], revision: str, fake_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    message = StackStatus.from_proto(admin_pb2.StatusResponse())
    workers = tuple(WorkerStatus(f"{stage}-0", stage, "a", None, revision=revision) for stage in ("prefill", "decode"))
    fake_client.stack = replace(message, workers=workers)
    main(command)
    out = capsys.readouterr().out
    assert ("revision" in out, "r2" in out) == (bool(revision), bool(revision))
    main([*command, "--json"])
    assert [one["revision"] for one in json.loads(capsys.readouterr().out)["workers"]] == [revision, revision]

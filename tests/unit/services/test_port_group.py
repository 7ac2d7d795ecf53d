"""Tests a group of router processes that share a port: who is alive, and what they count together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from overfill.errors import Overloaded, Unavailable
from overfill.routing.admission import KeyLimiter, KeyQuota
from services.router import port_group
from services.router.port_group import Member, PortGroup

ONE, TWO = Member("router-1", "127.0.0.1:1", "127.0.0.1:11"), Member("router-2", "127.0.0.1:2", "")
THREE = KeyQuota("ci", concurrency=3)

RUNS_TWO = """
import sys, pathlib
from overfill.routing.admission import KeyLimiter, KeyQuota
from services.router.port_group import PortGroup
limits = KeyLimiter(PortGroup(pathlib.Path(sys.argv[1])).usage_of)
limits.acquire("k", KeyQuota("ci", concurrency=3), 0.0, 2)
print("ready", flush=True)
sys.stdin.read()
"""


def test_members_see_each_other_until_they_leave(tmp_path: Path) -> None:
    first, second = PortGroup(tmp_path / "group"), PortGroup(tmp_path / "group")
    assert first.others() == second.others() == []
    first.announce(ONE)
    second.announce(TWO)
    assert (first.others(), second.others()) == ([TWO], [ONE])
    second.leave()
    assert first.others() == []
    third = PortGroup(tmp_path / "group")
    assert first.others() == [], "what an earlier process has announced is not the new one's"
    third.announce(TWO)
    assert first.others() == [TWO]
    first.leave()
    third.leave()


def test_a_key_has_one_limit_in_all_processes(tmp_path: Path) -> None:
    groups = [PortGroup(tmp_path) for _ in range(3)]
    limiters = [KeyLimiter(group.usage_of) for group in groups]
    for limiter in limiters:
        limiter.acquire("k", THREE, 0.0)
    for limiter in limiters:
        with pytest.raises(Overloaded, match="3 requests running"):
            limiter.acquire("k", THREE, 0.0)
        limiter.acquire("other", THREE, 0.0)
    limiters[0].release("k")
    limiters[1].acquire("k", THREE, 0.0)
    rate = KeyQuota("ci", rate=3.0)
    for limiter in limiters:
        limiter.acquire("r", rate, 1e6)
    for limiter in limiters:
        with pytest.raises(Overloaded, match="3 requests per second") as caught:
            limiter.acquire("r", rate, 1e6)
        assert caught.value.retry_after == pytest.approx(1 / 3, abs=1e-3)
    limiters[2].acquire("r", rate, 1e6 + 0.34)
    with pytest.raises(Overloaded):
        limiters[0].acquire("r", rate, 1e6 + 0.34)
    for group in groups:
        group.leave()


def test_what_a_dead_process_ran_does_not_count(tmp_path: Path) -> None:
    group = PortGroup(tmp_path)
    limiter = KeyLimiter(group.usage_of)
    limiter.acquire("k", THREE, 0.0)
    command = [sys.executable, "-c", RUNS_TWO, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(Overloaded, match="3 requests running"):
            limiter.acquire("k", THREE, 0.0)
        process.kill()
        process.wait()
        limiter.acquire("k", THREE, 0.0)
    heir = PortGroup(tmp_path)  # takes the dead process's place, but not its requests
    limiter.acquire("k", THREE, 0.0)
    with pytest.raises(Overloaded, match="3 requests running"):
        KeyLimiter(heir.usage_of).acquire("k", THREE, 0.0)
    heir.leave()
    group.leave()


def test_a_limit_holds_in_each_process_when_its_file_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = PortGroup(tmp_path)
    monkeypatch.setattr(port_group, "_USAGE_BYTES", 1 << 62)
    limiter = KeyLimiter(group.usage_of)
    limiter.acquire("k", THREE, 0.0, 3)
    with pytest.raises(Overloaded):
        limiter.acquire("k", THREE, 0.0)
    group.leave()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"--share-port .*file"):
        PortGroup(tmp_path / "file")
    monkeypatch.setattr(port_group, "MAX_PROCESSES", 1)
    only = PortGroup(tmp_path)
    with pytest.raises(Unavailable, match="1 processes share the port"):
        PortGroup(tmp_path)
    only.leave()

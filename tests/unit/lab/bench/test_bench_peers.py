"""Tests the installation of a peer in an environment of its own, and the end of its processes."""

from __future__ import annotations

import time

import psutil
import pytest

from overfill.lab.peers import environment
from overfill.lab.peers.environment import PeerEnvironment, PeerInstallFailed, install, python_of, version_of
from overfill.lab.peers.process import peer_processes


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_children_of_a_process_that_has_exited_are_ended(tmp_path):
    with peer_processes() as start:
        child = start("a peer", ["sh", "-c", f"sleep 600 >/dev/null 2>&1 & echo $! >{tmp_path}/pid"])
        assert child.describe_exit() == "exited with status 0"
        grandchild = int((tmp_path / "pid").read_text())
        assert is_alive(grandchild)
    deadline = time.monotonic() + 60
    while is_alive(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_environment_exists_only_after_a_complete_installation(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    monkeypatch.setitem(environment.ENVIRONMENTS, "thing", PeerEnvironment((str(tmp_path / "no-such-package"),)))
    with pytest.raises(PeerInstallFailed, match=r"pip .*install .*no-such-package"):
        install("thing")
    assert python_of("thing") is None
    monkeypatch.setitem(environment.ENVIRONMENTS, "thing", PeerEnvironment(()))
    python = install("thing")
    assert python_of("thing") == python
    assert python.exists()


def test_the_version_is_that_of_the_peer_and_not_of_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    packages = tmp_path / "envs" / "dynamo" / "lib" / "python3.12" / "site-packages"
    for package in ("ai_dynamo-1.6.1", "ai_dynamo_runtime-1.6.0", "pydantic-2.10.6"):
        (packages / f"{package}.dist-info").mkdir(parents=True)
    assert version_of("dynamo") == "1.6.1"

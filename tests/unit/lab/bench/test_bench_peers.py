"""Tests the installation of a peer in an environment of its own."""

from __future__ import annotations

import pytest

from overfill.lab.peers import environment
from overfill.lab.peers.environment import PeerEnvironment, PeerInstallFailed, install, python_of


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

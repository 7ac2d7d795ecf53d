"""Tests a peer's environment: its installation, and its process, driven by JSON lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from overfill.lab.peers import environment, process
from overfill.lab.peers.environment import (
    PeerEnvironment,
    PeerInstallFailed,
    install,
    python_of,
)
from overfill.lab.peers.process import JsonProcess, PeerFailed

FAKE = """
import sys
sys.path.insert(0, {folder!r})
import subprocess_peer

class Fake:
    def __init__(self, largest):
        print("noise on stdout")
        self.largest = largest
        self.waiting = {{}}
    def add(self, id, prompt, max_tokens):
        if len(prompt) > self.largest:
            raise ValueError("prompt too long")
        self.waiting[id] = [1 + len(prompt), max_tokens]  # steps until its first token
    def step(self):
        came = {{}}
        for id, request in self.waiting.items():
            request[0] = max(1, request[0]) - 1
            if request[0] == 0 and request[1]:
                request[1] -= 1
                came[id] = 1
        return came
    def drop(self, ids):
        for id in ids:
            del self.waiting[id]

subprocess_peer.main(Fake)
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(folder=str(Path(process.__file__).parent)))
    peer = JsonProcess("vllm", [sys.executable, str(script)], os.environ, tmp_path / "log")
    peer.ask("load", vocab_size=64, largest=10)
    yield peer
    peer.close()


def test_a_peer_process_decodes_and_prefills(fake):
    fake.ask("begin", batch=3, prompt_tokens=5, steps=4)
    assert len(fake.ask("steps", count=4)["seconds"]) == 4
    fake.ask("end")
    assert fake.ask("prefill", lengths=[4, 7])["seconds"] > 0
    fake.ask("begin", batch=1, prompt_tokens=2, steps=3)  # and again
    assert all(seconds >= 0 for seconds in fake.ask("steps", count=3)["seconds"])


def test_a_peer_s_failure_says_what_it_printed(fake):
    with pytest.raises(PeerFailed, match=r"vllm failed in 'prefill': ValueError: prompt too long") as caught:
        fake.ask("prefill", lengths=[11])
    assert "noise on stdout" in caught.value.__notes__


def test_a_peer_that_dies_is_not_waited_for(fake):
    fake._process.kill()
    with pytest.raises(PeerFailed, match="the process exited"):
        fake.ask("prefill", lengths=[4])


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

"""Tests other engines in their own environments: their installation, and their process, driven by JSON lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from overfill.errors import InvalidRequest
from overfill.lab.bench.engine.peers import environment, process
from overfill.lab.bench.engine.peers.environment import (
    PeerEnvironment,
    PeerInstallFailed,
    install,
    install_missing,
    python_of,
)
from overfill.lab.bench.engine.peers.process import PeerFailed, PeerProcess

FAKE = """
import sys
sys.path.insert(0, {folder!r})
import subprocess_peer

class Fake:
    version = "1.2"
    def __init__(self, threads, largest):
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

subprocess_peer.ENGINES["fake"] = Fake
subprocess_peer.main()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(folder=str(Path(process.__file__).parent)))
    monkeypatch.setattr(process, "_SCRIPT", script)
    peer = PeerProcess("fake", Path(sys.executable), 1, tmp_path / "log", vocab_size=64, largest=10)
    yield peer
    peer.close()


def test_a_peer_process_decodes_and_prefills(fake):
    assert (fake.name, fake.version) == ("fake", "1.2")
    fake.begin(3, 5, 4)
    assert len(fake.steps(4)) == 4
    fake.end()
    assert fake.prefill([4, 7]) > 0
    fake.begin(1, 2, 3)  # and again
    assert all(seconds >= 0 for seconds in fake.steps(3))


def test_a_peer_process_plays_a_trace(fake):
    times = fake.serve([(0.01, [1, 2, 3], 2), (0.0, [4], 3)])
    assert [len(of_one) for of_one in times] == [2, 3]
    assert times[0][0] >= 0.01
    assert all(of_one == sorted(of_one) for of_one in times)


def test_a_peer_s_failure_says_what_it_printed(fake):
    with pytest.raises(PeerFailed, match=r"fake failed in 'prefill': ValueError: prompt too long") as caught:
        fake.prefill([11])
    assert "noise on stdout" in caught.value.__notes__


def test_a_peer_that_dies_is_not_waited_for(fake):
    fake._process.kill()
    with pytest.raises(PeerFailed, match="the process exited"):
        fake.prefill([4])


def test_an_environment_exists_only_after_a_complete_installation(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    monkeypatch.setitem(environment.ENVIRONMENTS, "thing", PeerEnvironment((str(tmp_path / "no-such-package"),)))
    with pytest.raises(PeerInstallFailed, match=r"pip .*install .*no-such-package"):
        install("thing")
    assert python_of("thing") is None
    monkeypatch.setitem(environment.ENVIRONMENTS, "thing", PeerEnvironment(()))
    python = install("thing")
    install_missing(("transformers", "thing"))  # neither needs an installation
    assert python_of("thing") == python
    assert python.exists()


def test_unknown_peers_are_named():
    from overfill.lab.bench.engine.peers.choose import PEERS, parse_peers

    assert parse_peers("all") == PEERS
    assert parse_peers("none") == ()
    assert parse_peers("vllm, transformers") == ("vllm", "transformers")
    with pytest.raises(InvalidRequest, match=r"peers: unknown: nobody; choose from"):
        parse_peers("vllm,nobody")
